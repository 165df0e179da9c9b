"""A conversation in a terminal, streamed, with the mix of every answer. Knows the client; keeps the history.

A line that begins with `/` is a command; `//` begins a question that begins with `/`.
"""

import io
import re
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console

from server.cli_shared import printable
from server.client import Json, ServerClient
from server.errors import RequestFailed
from server.terminal_mix import parse_mix, show_weights
from server.terminal_tables import domains_table, route_table, router_lines

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}  # order of writing
COLOURS = re.compile(r"(?:\x1b\[[\d;]*m)+")


def run_chat(client: ServerClient, fields: dict[str, Any]) -> None:
    """Reads questions and commands until /quit or the end of input.

    A person may try again after a refusal; where nobody sits there, the first one ends it, as RequestFailed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an answer may have what this terminal cannot show
    Chat(client, Console(), fields, is_interactive=sys.stdin.isatty()).run()


@dataclass(frozen=True, slots=True)
class Command:
    """What a line with a `/` does. `run` gets the words behind it, as one text."""

    usage: str
    says: str
    run: Callable[[str], None]


class Chat:
    """One conversation: its messages so far, and how the next answer is mixed."""

    def __init__(self, client: ServerClient, console: Console, fields: dict[str, Any], *, is_interactive: bool) -> None:
        self._client = client
        self._console = console
        self._fields = dict(fields)
        self._is_interactive = is_interactive
        self._prompt = _make_prompt(console) if is_interactive else ""
        self._messages: list[dict[str, str]] = []
        self._has_ended = False
        self._commands = {
            "mix": Command("/mix DOMAIN=WEIGHT ...", "force a mix; /mix auto lets the router decide", self._set_mix),
            "base": Command("/base", "let the base alone answer; /mix auto ends it", self._set_base),
            "route": Command("/route TEXT", "show the scores of a text, and the mix made of them", self._route),
            "stacks": Command("/stacks", "show the domains of the server", self._show_stacks),
            "new": Command("/new", "forget the conversation", self._forget),
            "help": Command("/help", "show this", self._help),
            "quit": Command("/quit", "end; so does Ctrl-D", self._quit),
        }

    def run(self) -> None:
        """Until /quit or the end of input."""
        if self._is_interactive:
            self._say("/help lists commands; Ctrl-C stops an answer")
        while not self._has_ended and (line := self._read_line()) is not None:
            try:
                self._take(line)
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                self._say_on_new_line("stopped")
            except RequestFailed as error:
                if not self._is_interactive:
                    raise
                self._complain(str(error))

    def _read_line(self) -> str | None:
        """None at the end of input. An empty line asks nothing, nor does one that Ctrl-C broke off."""
        try:
            return input(self._prompt).strip()
        except KeyboardInterrupt:
            if not self._is_interactive:
                raise
            self._say_on_new_line("/quit or Ctrl-D ends")
            return ""
        except UnicodeDecodeError as error:
            if not self._is_interactive:
                raise RequestFailed(f"the input is not {error.encoding}: {error}") from error
            self._complain(f"that was not {error.encoding}: {error}")
            return ""
        except EOFError:
            return None

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if (command := self._commands.get(name)) is None:
                self._complain(f"there is no command /{name}; /help lists them")
            else:
                command.run(rest.strip())
        elif line:
            self._ask(line.removeprefix("/"))

    def _ask(self, question: str) -> None:
        """As far as an answer came, it stays in the conversation, however it ended; a question without one does not."""
        messages = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        report: Json = {}
        was_stopped = was_cut = False
        try:
            with closing(self._client.stream_chat(messages, **self._fields)) as chunks:
                for chunk in chunks:
                    report = chunk.get("brainstacks", report)
                    for choice in chunk["choices"]:
                        piece = choice["delta"].get("content") or ""
                        answer += piece
                        self._show(piece)
                        was_cut = was_cut or choice.get("finish_reason") == "length"
        except KeyboardInterrupt:  # closing the stream tells the server
            if not self._is_interactive:
                raise
            was_stopped = True
        finally:
            if answer:
                self._messages = [*messages, {"role": "assistant", "content": answer}]
            if answer or was_stopped:
                self._console.print()
        if was_stopped:
            self._say("stopped")
        if was_cut:
            self._say("cut at --max-tokens")
        if report:
            self._say(describe_report(report))

    def _show(self, piece: str) -> None:
        """As the model wrote it, but for what would steer the terminal."""
        self._console.file.write(piece.translate(CONTROLS))
        self._console.file.flush()

    def _set_mix(self, text: str) -> None:
        if text == "auto":
            self._fields.pop("brainstacks", None)
        elif text:
            try:
                mix = parse_mix(text.split())
            except ValueError as error:
                self._complain(str(error))
                return
            if unknown := sorted(mix.keys() - set(self._domains())):
                self._complain(f"the server has no domain {', '.join(unknown)}; it has {', '.join(self._domains())}")
                return
            self._fields["brainstacks"] = {"mix": mix}
        self._say_mix()

    def _set_base(self, _: str) -> None:
        self._fields["brainstacks"] = {"mode": "base"}
        self._say_mix()

    def _say_mix(self) -> None:
        wanted = self._fields.get("brainstacks", {})
        forced = "the base alone" if wanted.get("mode") == "base" else show_weights(wanted.get("mix", {}))
        self._say(f"answers come from {forced}" if forced else "the router decides")

    def _route(self, text: str) -> None:
        if text:
            self._console.print(route_table(self._client.route(text)))
        else:
            self._complain("which text? /route TEXT")

    def _show_stacks(self, _: str) -> None:
        """Where they are is for administrators; without their key the names must do."""
        if self._client.is_admin:
            answer = self._client.domains()
            self._console.print(domains_table(answer))
            for line in router_lines(answer):
                self._say(line)
        else:
            self._say(" ".join(self._domains()) or "the server has no domains")

    def _domains(self) -> list[str]:
        routed, _, *domains = self._client.models()
        return [name.removeprefix(f"{routed}:") for name in domains]

    def _forget(self, _: str) -> None:
        self._messages = []
        self._say("a new conversation")

    def _help(self, _: str) -> None:
        for command in self._commands.values():
            self._say(f"{command.usage:<24}{command.says}")

    def _quit(self, _: str) -> None:
        self._has_ended = True

    def _say(self, text: str) -> None:
        self._console.print(printable(text), style="dim", markup=False, highlight=False)

    def _say_on_new_line(self, text: str) -> None:
        """Behind what Ctrl-C left of a line."""
        self._console.print()
        self._say(text)

    def _complain(self, text: str) -> None:
        self._console.print(f"error: {printable(text)}", style="red", markup=False, highlight=False)


def _make_prompt(console: Console) -> str:
    """What input() shows. Lets it edit the line, if this Python can: then a line may also be of any length."""
    with console.capture() as shown:
        console.print("you ", style="bold cyan", end="")
    try:
        import_module("readline")  # not at the top: it may write to the terminal, which may be another program's
    except ImportError:
        return shown.get()
    return COLOURS.sub("\x01\\g<0>\x02", shown.get())  # what takes no room, so that the cursor is found


def describe_report(report: Json) -> str:
    """`mix chat=0.20 math=0.93  cold math  scores ...`, on one line."""
    parts = ["mix " + (show_weights(report.get("mix", {})) or "base only")]
    if report.get("cold"):
        parts.append("cold " + " ".join(report["cold"]))
    if report.get("dropped"):
        parts.append("dropped " + show_weights(report["dropped"]))
    if report.get("stale"):
        parts.append("stale " + " ".join(report["stale"]))
    if report.get("scores"):
        parts.append("scores " + show_weights(report["scores"]))
    return "  ".join(parts)
