"""A conversation in a terminal, streamed, with the mix of every answer. Knows the client; keeps the history."""

import sys
from typing import Any

from rich.console import Console

from server.client import Json, ServerClient


def run_chat(client: ServerClient, fields: dict[str, Any]) -> None:
    """Reads questions until an empty line or the end of input."""
    console = Console()
    messages: list[dict[str, str]] = []
    while question := _read_question(console):
        messages.append({"role": "user", "content": question})
        answer, report = _answer(client, console, messages, fields)
        messages.append({"role": "assistant", "content": answer})
        console.print(f"[dim]{describe_report(report)}[/dim]", highlight=False)


def _read_question(console: Console) -> str:
    try:
        return console.input("[bold cyan]you[/bold cyan] " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _answer(
    client: ServerClient, console: Console, messages: list[dict[str, str]], fields: dict[str, Any]
) -> tuple[str, Json]:
    """The text, printed as it comes, and the report of the last chunk."""
    text, report = "", Json()
    for chunk in client.stream_chat(messages, **fields):
        report = chunk.get("brainstacks", report)
        for choice in chunk["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            console.out(piece, end="", highlight=False)
    console.print()
    return text, report


def describe_report(report: Json) -> str:
    """`mix chat=0.20 math=0.93 (cold: math)  scores ...`, on one line."""
    parts = ["mix " + (_weights(report.get("mix", {})) or "base only")]
    if report.get("cold"):
        parts.append("cold " + " ".join(report["cold"]))
    if report.get("dropped"):
        parts.append("dropped " + _weights(report["dropped"]))
    if report.get("scores"):
        parts.append("scores " + _weights(report["scores"]))
    return "  ".join(parts)


def _weights(weights: dict[str, float]) -> str:
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return " ".join(f"{domain}={weight:.2f}" for domain, weight in ordered)
