"""The command says what it wrote and what is missing, and ends with a status."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.training.figures.synthetic_reports import write_store
from training.figures.command import run_figures


def test_written_files_and_missing_reports_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "a [bold] store", ("chat",), num_layers=1, reports=["domains"])
    assert run_figures(store, None) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("validation_curves.png", "expert_utilisation.png", "figures.json"):
        assert f"written: {store / 'figures' / name}" in lines
        assert (store / "figures" / name).is_file()
    assert "missing: reports/forgetting.json" in lines
    assert "missing: reports/subspaces.json" in lines


def test_another_folder_may_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=1, reports=["forgetting"])
    assert run_figures(store, tmp_path / "paper") == 0
    assert f"written: {tmp_path / 'paper' / 'interference_routed.png'}" in capsys.readouterr().out
    assert not (store / "figures").exists()


def test_a_mistake_is_named_and_ends_with_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_figures(tmp_path / "nowhere", None) == 1
    assert f"error: {tmp_path / 'nowhere'} is not a store" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=1)
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"  # what an import finds when a package is not there
        "from pathlib import Path; from training.figures.command import run_figures\n"
        "sys.exit(run_figures(Path(sys.argv[1]), None))"
    )
    done = subprocess.run([sys.executable, "-c", program, store], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "error: figures need matplotlib: pip install -c constraints.txt -e '.[train]'" in done.stderr
