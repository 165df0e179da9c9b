"""Runs the examples of a page of docs/ against a server, as a reader would who copies them one after the other."""

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLE_SECONDS = 60.0
END = "\x1e"  # of what an example prints: the record separator, which no answer has in it


class Page:
    """One page, its server's address being the one of a server that runs."""

    def __init__(self, name: str, url: str) -> None:
        self.text = (ROOT / "docs" / name).read_text()
        shown = self.text.replace("http://localhost:8000", url).replace("localhost:8000", url)
        self._name = name
        self._blocks = BLOCK.findall(shown)

    def run_bash(self, folder: Path, *, times: int = 1) -> list[str]:
        """What each of the page's shell examples prints; one that fails raises, and so does a refusal.

        They run in one shell that begins in the checkout, the whole page `times` times. `folder` is for curl.
        """
        (folder / ".curlrc").write_text("fail-with-body\n")
        environ = {**os.environ, "CURL_HOME": str(folder)}
        return _run([code for kind, code in self._blocks if kind == "bash"] * times, environ)

    def run_python(self) -> dict[str, Any]:
        """Runs the page's Python examples as one program; the names that it has at its end."""
        known: dict[str, Any] = {"__name__": "documentation"}
        for kind, code in self._blocks:
            if kind == "python":
                exec(compile(code, self._name, "exec"), known)
        return known


def _run(examples: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    command = ["bash", "-euo", "pipefail", "-c", f"printf '{END}'\n".join(examples)]
    seconds = EXAMPLE_SECONDS * len(examples)
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    printed = done.stdout.split(END)
    assert done.returncode == 0, f"{examples[len(printed) - 1]}\nfailed: {printed[-1]}{done.stderr}"
    return printed
