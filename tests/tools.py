"""Finds programs that are no Python packages of ours, or skips the test and says what brings them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BROUGHT_BY = {
    "docker-compose": "make check",
    "hadolint": "make check",
    "prometheus": "make system-tools",
    "promtool": "make system-tools",
}


def tool(name: str) -> str:
    """The program's path: that of the virtual environment first."""
    beside_python = Path(sys.executable).parent / name
    found = str(beside_python) if beside_python.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `{BROUGHT_BY[name]}` brings it")
    return found


def run_tool(name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What it prints; its complaint is the test's."""
    command = [tool(name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
