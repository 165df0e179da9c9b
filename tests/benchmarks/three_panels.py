"""Asks the same questions of the base, of all domains at once, and of the routed mix; prints the answers as they are.

    python -m tests.benchmarks.three_panels [--store DIR] [--max-tokens N]

The paper's "three-panel result" (section 5.3), with the subjects that it names, through the HTTP server, greedily.
Prints Markdown.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.e2e.server_process import ServerProcess

PANELS = {"base": "base", "ungated": "all", "routed": "auto"}
QUESTIONS = (
    "Explain what a neural network is in simple terms.",
    "Write a Python function that reverses a string.",
    "What are the symptoms of diabetes?",
    "A train travels 120 km in 2 hours. What is its average speed?",
    "A patient takes 500 mg of a medicine in 3 doses a day. How many mg does the patient take in a week?",
    "A person weighs 70 kg and is 1.75 m tall. Calculate the BMI and say what it means.",
)


def main() -> None:
    """Starts a server on a copy of the store, asks, prints."""
    parser = argparse.ArgumentParser(description="The paper's three panels.")
    parser.add_argument("--store", type=Path, default=Path("demo/store"))
    parser.add_argument("--max-tokens", type=int, default=96)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        shutil.copytree(arguments.store, store, ignore=shutil.ignore_patterns("training"))
        with ServerProcess(store, Path(folder) / "log", engine__dtype="auto") as server:
            for question in QUESTIONS:
                print_panels(server, question, arguments.max_tokens)


def print_panels(server: ServerProcess, question: str, max_tokens: int) -> None:
    """One question, and below it each panel's mix and text."""
    print(f"### {question}\n")
    for panel, mode in PANELS.items():
        answer = server.openai.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": question}],
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"brainstacks": {"mode": mode}},
        )
        mix = (answer.model_extra or {})["brainstacks"]["mix"]
        weights = ", ".join(f"{domain} {weight:.2f}" for domain, weight in mix.items()) or "no domain"
        end = "" if answer.choices[0].finish_reason == "stop" else f" (cut at {max_tokens} tokens)"
        print(f"**{panel}** ({weights}){end}\n")
        print("".join(f"> {line}\n" for line in (answer.choices[0].message.content or "").splitlines()))


if __name__ == "__main__":
    main()
