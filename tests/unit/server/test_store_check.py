"""A store's files against its manifest, without a server."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.store_check import check_store
from stack_store.format import StackHeader
from stack_store.manifest import stack_file
from stack_store.registry import StackRegistry
from tests.fakes import tiny_geometry, tiny_header, write_random_stack
from tests.servers import BASE
from tests.terminals import Terminal

DEMO_STORE = Path(__file__).parents[3] / "demo" / "store"

runner = CliRunner()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Two domains, without a router."""
    with_stacks = StackRegistry.create(tmp_path / "store", base_fingerprint=BASE, geometry=tiny_geometry())
    for seed, domain in enumerate(("law", "math")):
        write_random_stack(tmp_path / f"{domain}.safetensors", tiny_header(domain=domain), seed=seed)
        with_stacks.register_domain(domain, [tmp_path / f"{domain}.safetensors"])
    with_stacks.close()
    return tmp_path / "store"


def findings(store: Path) -> dict[str, str]:
    """Kind by domain or file name."""
    return {Path(f.file).parent.name if "domains" in f.file else f.file: f.kind for f in check_store(store)}


def only_file(store: Path, domain: str) -> Path:
    (file,) = (store / "domains" / domain).iterdir()
    return file


def test_whole_store_is_good(store: Path) -> None:
    assert findings(store) == {"law": "good", "math": "good"}
    result = runner.invoke(app, ["stacks", "verify", str(store)])
    assert result.exit_code == 0
    assert "good    domains/law/1-" in result.stdout


def test_sound_stack_of_another_digest_is_bad(store: Path) -> None:
    write_random_stack(only_file(store, "law"), tiny_header(domain="law"), seed=7)
    result = runner.invoke(app, ["stacks", "verify", str(store)])
    assert result.exit_code == 1
    assert "has the digest" in result.stdout
    assert findings(store) == {"law": "bad", "math": "good"}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (tiny_header(domain="tax"), "domain 'tax' for 'law'"),
        (tiny_header(domain="law", round=2), "round 2 for 1"),
        (tiny_header(domain="law", base_fingerprint="other"), "base 'other' for 'tiny-base'"),
        (tiny_header(domain="law", geometry=tiny_geometry(num_layers=3)), "geometry Geometry(num_layers=3"),
    ],
)
def test_right_digest_under_the_header_of_another_stack_is_bad(store: Path, header: StackHeader, words: str) -> None:
    file = store / "domains" / "law" / "new.safetensors"
    digest = write_random_stack(file, header, seed=3)
    file = file.rename(store / stack_file("law", 1, digest))
    manifest = json.loads((store / "manifest.json").read_text())
    (law,) = (domain for domain in manifest["domains"] if domain["name"] == "law")
    law["stacks"][0] |= {"digest": digest, "file": str(file.relative_to(store)), "bytes": file.stat().st_size}
    (store / "manifest.json").write_text(json.dumps(manifest))
    (wrong,) = (finding for finding in check_store(store) if finding.kind == "bad")
    assert wrong.file == law["stacks"][0]["file"]
    assert words in wrong.said


def test_missing_file_is_told_apart_from_a_bad_one(store: Path) -> None:
    only_file(store, "law").unlink()
    only_file(store, "math").write_bytes(b"junk")
    assert findings(store) == {"law": "missing", "math": "bad"}
    assert runner.invoke(app, ["stacks", "verify", str(store)]).exit_code == 1


def test_extra_file_is_told_and_is_no_fault(store: Path) -> None:
    shutil.copy(only_file(store, "law"), store / "domains" / "law" / "9-aaaaaaaaaaaa.safetensors")
    (store / "reports").mkdir()
    (store / "reports" / "law.json").write_text("{}")
    result = runner.invoke(app, ["stacks", "verify", str(store)])
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines() if line.startswith("extra")] == [
        "domains/law/9-aaaaaaaaaaaa.safetensors:"
    ]


def test_router_of_the_demo_store_is_checked_too(tmp_path: Path) -> None:
    shutil.copytree(DEMO_STORE, tmp_path / "demo", ignore=shutil.ignore_patterns("reports"))
    (router,) = (tmp_path / "demo" / "routers").iterdir()
    assert {finding.kind for finding in check_store(tmp_path / "demo")} == {"good"}
    with router.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    wrong = [finding for finding in check_store(tmp_path / "demo") if finding.kind != "good"]
    assert [finding.file for finding in wrong] == [f"routers/{router.name}"]
    assert "digest" in wrong[0].said
    router.unlink()
    assert [finding.kind for finding in check_store(tmp_path / "demo") if finding.kind != "good"] == ["missing"]


def test_damaged_manifest_is_one_line_and_status_1(store: Path) -> None:
    (store / "manifest.json").write_text("{")
    result = runner.invoke(app, ["stacks", "verify", str(store)])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")


def test_folder_without_a_stack_is_an_error(tmp_path: Path) -> None:
    result = runner.invoke(app, ["stacks", "verify", str(tmp_path)])
    assert result.exit_code == 1
    assert "no stack file under" in result.stderr


def test_folder_without_a_stack_is_an_error_beside_a_good_store(store: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["stacks", "verify", str(store), str(tmp_path / "empty")])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"error: no stack file under {tmp_path / 'empty'}"


def test_findings_stand_on_lines_of_their_own_above_the_bar(store: Path) -> None:
    with Terminal(sys.executable, "-m", "server.cli", "stacks", "verify", str(store), kind="xterm") as terminal:
        terminal.wait_for("domain=math")
        assert terminal.status() == 0
    assert len(re.findall(r"(?:\n|\x1b\[2K)good    domains/", terminal.shown)) == 2, terminal.shown
