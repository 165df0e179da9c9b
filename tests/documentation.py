"""Runs the examples of a page of docs/ against a server, as a reader would who copies them one after the other."""

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLE_SECONDS = 60.0


class Page:
    """One page, its server's address being the one of a server that runs."""

    def __init__(self, name: str, url: str) -> None:
        self.text = (ROOT / "docs" / name).read_text()
        shown = self.text.replace("http://localhost:8000", url).replace("localhost:8000", url)
        self._name = name
        self._blocks = BLOCK.findall(shown)

    def run_bash(self, folder: Path) -> list[str]:
        """What each of the page's shell examples prints, each run in the checkout; one that fails raises.

        A refusal makes curl fail. `folder` is for curl's settings.
        """
        (folder / ".curlrc").write_text("fail-with-body\n")
        environ = {**os.environ, "CURL_HOME": str(folder)}
        return [_run(code, environ) for kind, code in self._blocks if kind == "bash"]

    def run_python(self) -> dict[str, Any]:
        """Runs the page's Python examples as one program; the names that it has at its end."""
        known: dict[str, Any] = {"__name__": "documentation"}
        for kind, code in self._blocks:
            if kind == "python":
                exec(compile(code, self._name, "exec"), known)
        return known


def _run(code: str, environ: Mapping[str, str]) -> str:
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=EXAMPLE_SECONDS)
    assert done.returncode == 0, f"{code}\nfailed: {done.stdout}{done.stderr}"
    return done.stdout
