"""What an import refuses: each fault by itself, in one line that names it, with no store made or changed."""

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from engine.model.base import BaseIdentity, identify_base
from server.cli import app
from stack_store.locks import FolderShare
from stack_store.registry import StackRegistry
from tests.published import PublishedFiles, published_files

TinyBase = Callable[[str], Path]
UP = "model.layers.1.mlp.up_proj.active_stack"
Q = "model.layers.0.self_attn.q_proj.active_stack"


class Importer:
    """Imports one published store of a tiny Llama into one store, and shows the answers."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.base = base
        self.folder = folder / "published"
        self.store = folder / "store"
        self.identity: BaseIdentity = identify_base(str(base))
        self.files: PublishedFiles = published_files(base.name, self.identity.geometry)

    def run(self, *options: str, base: Path | None = None) -> Any:
        store = ["--store", str(self.store), "--base", str(base or self.base)]
        return CliRunner().invoke(app, ["stacks", "import-reference", str(self.folder), *store, *options])

    def refusal(self, *options: str, write: bool = True, base: Path | None = None) -> str:
        """The error's one line, after checking that nothing else came of the command."""
        if write:
            self.files.write(self.folder)
        before = contents(self.store.parent)
        result = self.run(*options, base=base)
        assert result.exit_code == 1, result.stdout
        assert result.stdout == ""
        assert contents(self.store.parent) == before
        error: str = result.stderr.splitlines()[-1]
        assert error.startswith("error: ")
        assert result.stderr.count("error: ") == 1
        assert "Traceback" not in result.stderr
        return error

    def accept(self, *options: str) -> None:
        self.files.write(self.folder)
        result = self.run(*options)
        assert result.exit_code == 0, result.stderr


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder under the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def importer(tmp_path: Path, tiny_base_folder: TinyBase) -> Importer:
    return Importer(tmp_path, tiny_base_folder("llama"))


def drop(prefix: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]

    return change


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: value})


def spoil(key: str, value: float) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        state[key].view(-1)[3] = value

    return change


def cast(key: str, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    return lambda state: state.update({key: state[key].to(dtype)})


def only_noise(state: dict[str, Any]) -> None:
    noise = state[f"{UP}.noise_linear.weight"]
    drop(UP)(state)
    state[f"{UP}.noise_linear.weight"] = noise


# torch warns of the constructor, not of the archive.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([torch.zeros(2, 64), torch.zeros(2, 64)])

STACK_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "missing projection": (drop(UP), "projection layers.1.mlp.up_proj is missing"),
    "first projection missing": (drop(Q), "projection layers.0.self_attn.q_proj is missing"),
    "projection of noise alone": (only_noise, "layers.1.mlp.up_proj lacks experts.0.A.weight of 4 experts"),
    "missing expert": (drop(f"{UP}.experts.2"), "layers.1.mlp.up_proj lacks experts.2.A.weight of 4 experts"),
    "missing B": (drop(f"{UP}.experts.1.B"), "layers.1.mlp.up_proj lacks experts.1.B.weight of 4 experts"),
    "missing gate": (drop(f"{UP}.router"), "layers.1.mlp.up_proj lacks router.weight of 4 experts"),
    "duplicate projection": (
        put("language_model.model.layers.1.mlp.up_proj.active_stack.router.weight", torch.zeros(4, 64)),
        "are the same parameter twice",
    ),
    "extra expert": (
        put(f"{UP}.experts.4.A.weight", torch.zeros(16, 64)),
        f"key '{UP}.experts.4.A.weight' is one more than 4 experts have",
    ),
    "extra layer": (
        put("model.layers.3.mlp.up_proj.active_stack.router.weight", torch.zeros(4, 64)),
        "is of layer 3, the base has 3 layers",
    ),
    "extra projection": (
        put("model.layers.1.mlp.q_proj.active_stack.router.weight", torch.zeros(4, 64)),
        "key 'model.layers.1.mlp.q_proj.active_stack.router.weight' is not that of a stack's parameter",
    ),
    "extra key": (put("alpha", 16), "key 'alpha' is not that of a stack's parameter"),
    "unknown prefix": (
        put("transformer.layers.1.mlp.up_proj.active_stack.router.weight", torch.zeros(4, 64)),
        "is not that of a stack's parameter",
    ),
    "key that is no text": (put(7, torch.zeros(4)), "key 7 is not that of a stack's parameter"),  # type: ignore[arg-type]
    "misshapen A": (
        put(f"{UP}.experts.1.A.weight", torch.zeros(16, 65)),
        f"tensor '{UP}.experts.1.A.weight' has shape [16, 65], must be [16, 64]",
    ),
    "misshapen B": (
        put(f"{UP}.experts.1.B.weight", torch.zeros(16, 128)),
        f"tensor '{UP}.experts.1.B.weight' has shape [16, 128], must be [128, 16]",
    ),
    "misshapen gate": (
        put(f"{UP}.router.weight", torch.zeros(3, 64)),
        f"tensor '{UP}.router.weight' has shape [3, 64], must be [4, 64]",
    ),
    "another rank": (
        put(f"{UP}.experts.0.A.weight", torch.zeros(8, 64)),
        f"tensor '{UP}.experts.0.A.weight' has shape [8, 64], must be [16, 64]",
    ),
    "rank 0": (put(f"{Q}.experts.0.A.weight", torch.zeros(0, 64)), "has shape [0, 64], must be (rank, in features)"),
    "NaN": (
        spoil(f"{UP}.experts.1.B.weight", float("nan")),
        f"tensor '{UP}.experts.1.B.weight' holds a value that is not finite in torch.bfloat16",
    ),
    "infinity": (spoil(f"{UP}.router.weight", float("-inf")), "holds a value that is not finite in torch.bfloat16"),
    "infinite only in bfloat16": (
        spoil(f"{UP}.experts.1.A.weight", torch.finfo(torch.float32).max),
        f"tensor '{UP}.experts.1.A.weight' holds a value that is not finite in torch.bfloat16",
    ),
    "float64": (
        cast(f"{UP}.router.weight", torch.float64),
        f"tensor '{UP}.router.weight' is torch.float64, must be one of torch.float32, torch.float16, torch.bfloat16",
    ),
    "int8": (cast(f"{UP}.router.weight", torch.int8), "is torch.int8, must be one of"),
    "sparse": (
        put(f"{UP}.router.weight", torch.zeros(4, 64).to_sparse()),
        f"tensor '{UP}.router.weight' is torch.sparse_coo on cpu, must be dense, on the CPU",
    ),
    "tensor without values": (
        put(f"{UP}.router.weight", torch.empty(4, 64, device="meta")),
        "is torch.strided on meta, must be dense, on the CPU",
    ),
    "nested": (put(f"{UP}.router.weight", NESTED), "is nested on cpu, must be dense, on the CPU"),
    "one value for many": (
        put(f"{UP}.router.weight", torch.zeros(1, 1).expand(4, 64)),
        f"tensor '{UP}.router.weight' promises 256 values, its storage has 1",
    ),
    "no tensor": (put(f"{UP}.router.weight", [1.0]), f"'{UP}.router.weight' is a list, must be a tensor"),
}


@pytest.mark.parametrize("fault", STACK_FAULTS)
def test_a_stack_that_is_not_whole_is_refused(fault: str, importer: Importer) -> None:
    change, told = STACK_FAULTS[fault]
    change(importer.files.stacks["math"][1])
    error = importer.refusal()
    assert "stacks/math/stack_2.pt" in error
    assert told in error


def test_a_file_that_is_no_flat_dict_is_refused(importer: Importer) -> None:
    importer.files.stacks["math"][1] = [torch.zeros(2)]
    assert "stacks/math/stack_2.pt holds a list, must be a flat dict of tensors" in importer.refusal()


class RunsCode:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["stacks/math/stack_2.pt", "meta_router.pt"])
def test_a_file_that_holds_code_is_refused_and_the_code_not_run(file: str, importer: Importer, tmp_path: Path) -> None:
    importer.files.write(importer.folder)
    torch.save({"state_dict": RunsCode(tmp_path / "ran")}, importer.folder / file)
    assert f"{file} is not a torch archive of plain tensors" in importer.refusal(write=False)
    assert not (tmp_path / "ran").exists()
    torch.load(importer.folder / file, weights_only=False)
    assert (tmp_path / "ran").is_dir()  # the file would have run it


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(kept: float, importer: Importer) -> None:
    importer.files.write(importer.folder)
    path = importer.folder / "stacks" / "math" / "stack_1.pt"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    assert "stacks/math/stack_1.pt is not a torch archive of plain tensors" in importer.refusal(write=False)


def test_a_file_of_other_bytes_than_were_written_is_refused(importer: Importer) -> None:
    """One bit of a weight: torch reads archives without looking at their checksums."""
    importer.files.write(importer.folder)
    path = importer.folder / "stacks" / "math" / "stack_1.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "stacks/math/stack_1.pt is damaged: its part 'stack_1/data/" in importer.refusal(write=False)


def test_a_compressed_archive_is_refused(importer: Importer) -> None:
    """torch.save compresses nothing, and a small file could unfold into more than there is memory."""
    importer.files.write(importer.folder)
    path = importer.folder / "stacks" / "math" / "stack_1.pt"
    with zipfile.ZipFile(path) as plain:
        parts = {name: plain.read(name) for name in plain.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in parts.items():
            packed.writestr(name, content)
    assert "stacks/math/stack_1.pt is not a torch archive of plain tensors: 'stack_1/" in importer.refusal(write=False)


@pytest.mark.parametrize("junk", [b"junk", b"\x80\x04.", b"\x80\x02}q\x00.", b"PK\x03\x04", b"{}" * 1000, b""])
def test_a_file_that_is_no_archive_is_refused(junk: bytes, importer: Importer) -> None:
    importer.files.write(importer.folder)
    (importer.folder / "stacks" / "math" / "stack_1.pt").write_bytes(junk)
    assert "stacks/math/stack_1.pt is not a torch archive of plain tensors" in importer.refusal(write=False)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("manifest.json", "the manifest is missing"),
        ("meta_router.pt", "the router is missing"),
        ("stacks/chat/stack_2.pt", "the stack of round 2 of domain 'chat' is missing"),
    ],
)
def test_a_missing_file_is_refused(file: str, told: str, importer: Importer) -> None:
    importer.files.write(importer.folder)
    (importer.folder / file).unlink()
    error = importer.refusal(write=False)
    assert told in error
    assert file in error


def test_a_missing_folder_is_refused(importer: Importer) -> None:
    assert "published' is not a folder" in importer.refusal(write=False)


@pytest.mark.parametrize(
    ("recorded", "told"),
    [
        ("../outside/stack_1.pt", "path '../outside/stack_1.pt' contains '..'"),
        ("stacks/../../outside/stack_1.pt", "contains '..'"),
        ("/nowhere/stack_1.pt", "path '/nowhere/stack_1.pt' is absolute"),
        ("linked.pt", "path 'linked.pt' leaves the import root through a symlink"),
        ("linked/stack_1.pt", "path 'linked/stack_1.pt' leaves the import root through a symlink"),
        ("dangling.pt", "path 'dangling.pt' can't be found"),
        ("stacks", "path 'stacks' is not a regular file"),
    ],
)
def test_a_stack_outside_of_the_folder_is_refused(recorded: str, told: str, importer: Importer, tmp_path: Path) -> None:
    importer.files.manifest["domains"][0]["stack_files"][0] = recorded
    importer.files.write(importer.folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "stack_1.pt").write_bytes((importer.folder / "stacks/chat/stack_1.pt").read_bytes())
    (importer.folder / "linked").symlink_to(outside)
    (importer.folder / "linked.pt").symlink_to(outside / "stack_1.pt")
    (importer.folder / "dangling.pt").symlink_to(tmp_path / "nothing")
    error = importer.refusal(write=False)
    assert "the stack of round 1 of domain 'chat'" in error
    assert told in error


@pytest.mark.parametrize("option", ["--manifest", "--router"])
def test_manifest_and_router_outside_of_the_folder_are_refused(option: str, importer: Importer) -> None:
    assert "path '../elsewhere' contains '..'" in importer.refusal(option, "../elsewhere")


def test_one_file_for_two_rounds_is_refused(importer: Importer) -> None:
    importer.files.manifest["domains"][0]["stack_files"] = ["a/stack_1.pt", "b/stack_1.pt"]
    error = importer.refusal()
    assert "stacks/chat/stack_1.pt is the stack of round 1 of domain 'chat' and of round 2 of domain 'chat'" in error


def test_a_copy_of_one_round_as_another_is_refused(importer: Importer) -> None:
    importer.files.write(importer.folder)
    math = importer.folder / "stacks" / "math"
    (math / "stack_2.pt").write_bytes((math / "stack_1.pt").read_bytes())
    told = "stacks/math/stack_2.pt is a copy of round 1 of domain 'math'"
    assert told in importer.refusal(write=False)


def domain_field(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["domains"][1].update({key: value})


MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no model": (lambda m: m.pop("model"), "model: Field required"),
    "no total": (lambda m: m.pop("total_stacks"), "total_stacks: Field required"),
    "no domains": (lambda m: m.update(domains=[]), "domains: List should have at least 1 item"),
    "unknown key": (put("alpha", 16), "alpha: Extra inputs are not permitted, got 16"),
    "unknown key of a domain": (domain_field("top_k", 3), "domains.1.top_k: Extra inputs are not permitted, got 3"),
    "files that are no list": (domain_field("stack_files", "x.pt"), "domains.1.stack_files: Input should be a valid"),
    "number as text": (domain_field("num_inner_stacks", "1"), "domains.1.num_inner_stacks: Input should be a valid"),
    "number of rounds": (domain_field("num_inner_stacks", 2), "'code' has num_inner_stacks 2 and 1 stack_files"),
    "total": (put("total_stacks", 6), "total_stacks is 6, the domains have 5"),
    "same domain twice": (domain_field("name", "chat"), "a domain appears twice in ['chat', 'chat', 'math']"),
    "reserved name": (domain_field("name", "base"), "domain name 'base' is reserved"),
    "name that leads outside": (domain_field("name", "../code"), "domain name '../code' does not match"),
    "another base": (
        put("model", "maker/other-7b"),
        "the manifest's model is 'maker/other-7b', the base is 'tiny-llama'",
    ),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_a_manifest_that_is_not_as_published_is_refused(fault: str, importer: Importer) -> None:
    change, told = MANIFEST_FAULTS[fault]
    change(importer.files.manifest)
    assert told in importer.refusal()


def test_what_a_file_says_cannot_steer_the_terminal(importer: Importer) -> None:
    importer.files.manifest["\x1b[2J\nstore is at generation 1"] = 1
    told = "error: manifest.json: \\x1b[2J\\nstore is at generation 1: Extra inputs are not permitted, got 1"
    assert importer.refusal() == told


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model": 1}', "\ufeff{}"])
def test_a_manifest_that_is_no_object_is_refused(text: str, importer: Importer) -> None:
    importer.files.write(importer.folder)
    (importer.folder / "manifest.json").write_text(text)
    assert "error: manifest.json: " in importer.refusal(write=False)


def test_a_base_of_another_name_must_be_said_to_be_the_same(importer: Importer) -> None:
    importer.files.manifest["model"] = "maker/other-7b"
    told = "the manifest's model is 'maker/other-7b', not 'maker/other-8b'"
    assert told in importer.refusal("--trained-on", "maker/other-8b")
    importer.accept("--trained-on", "maker/other-7b")


def state(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda router: change(router["state_dict"])


def widened(router: dict[str, Any]) -> None:
    """A file of a few thousand bytes whose network would take 80 GB."""
    for key, tensor in router["state_dict"].items():
        shape = [{24: 100_000, 48: 200_000}.get(length, length) for length in tensor.shape]
        router["state_dict"][key] = torch.zeros([1] * tensor.ndim).expand(shape)


ROUTER_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another domain": (
        put("domain_names", ["math", "chat", "law"]),
        "domain_names are ['chat', 'law', 'math'], the manifest's domains ['chat', 'code', 'math']",
    ),
    "a domain less": (
        lambda r: r.update(domain_names=["math", "chat"], n_domains=2),
        "domain_names are ['chat', 'math'], the manifest's domains ['chat', 'code', 'math']",
    ),
    "same domain twice": (put("domain_names", ["math", "chat", "chat"]), "a domain appears twice in domain_names"),
    "number of domains": (put("n_domains", 4), "n_domains is 4, domain_names has 3"),
    "width of the base": (put("token_dim", 65), "token_dim is 65, the base's hidden size is 64"),
    "another version": (put("version", "v2"), "version is 'v2', this build knows 'reasoning_aware'"),
    "no version": (lambda r: r.pop("version"), "version: Field required"),
    "no floor": (lambda r: r.pop("chat_floor"), "chat_floor: Field required"),
    "floor above 1": (put("chat_floor", 1.5), "floor must be in [0, 1], not 1.5"),
    "threshold that is no number": (put("gate_threshold", float("nan")), "gate_threshold: Input should be a finite"),
    "threshold as text": (put("gate_threshold", "0.12"), "gate_threshold: Input should be a valid number"),
    "unknown key": (put("max_domains", 3), "max_domains: Extra inputs are not permitted"),
    "missing queries": (state(drop("domain_queries")), "tensor 'domain_queries' is missing"),
    "missing tensor": (state(drop("ctx_ln.bias")), "lacks the tensor 'ctx_ln.bias'"),
    "unknown tensor": (state(put("key_proj.weight", torch.zeros(2))), "has the unknown tensor 'key_proj.weight'"),
    "queries of fewer domains": (
        state(put("domain_queries", torch.zeros(2, 24))),
        "tensor 'domain_queries' has shape [2, 24], must be [3, 24]",
    ),
    "flat queries": (state(put("domain_queries", torch.zeros(72))), "tensor 'domain_queries' is [72], must be"),
    "several temperatures": (
        state(put("log_temperature", torch.zeros(3))),
        "tensor 'log_temperature' has shape [3], must be []",
    ),
    "misshapen": (state(put("ff.0.weight", torch.zeros(24, 24))), "'ff.0.weight' has shape [24, 24], must be [24, 48]"),
    "NaN": (state(spoil("ff.4.weight", float("nan"))), "tensor 'ff.4.weight' holds a value that is not finite"),
    "float64": (state(cast("out.bias", torch.float64)), "tensor 'out.bias' is torch.float64, must be one of"),
    "width that only strides have": (widened, "tensor 'domain_queries' promises 300000 values, its storage has 1"),
    "no tensor": (state(put("out.bias", 1.0)), "'out.bias' is a float, must be a tensor"),
}


@pytest.mark.parametrize("fault", ROUTER_FAULTS)
def test_a_router_that_ours_cannot_be_is_refused(fault: str, importer: Importer) -> None:
    change, told = ROUTER_FAULTS[fault]
    change(importer.files.router)
    error = importer.refusal()
    assert "error: meta_router.pt" in error
    assert told in error


def test_a_router_that_is_no_dict_is_refused(importer: Importer) -> None:
    importer.files.router = torch.zeros(2)
    assert "meta_router.pt: as a whole: Input should be a valid dictionary" in importer.refusal()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--top-k", "5"], "top_k is 5, more than the 4 experts"),
        (["--top-k", "0"], "top_k is 0, must be a whole number from 1"),
        (["--scale", "0"], "scale is 0.0, must be a positive number"),
        (["--scale", "nan"], "scale is nan, must be a positive number"),
        (["--mid-layer", "4"], "mid_layer is 4, the base has 3 layers"),
        (["--mid-layer", "-1"], "mid_layer must be at least 0, not -1"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, not 0"),
        (["--mid-weight", "inf"], "mid_weight and last_weight must be finite, not inf and 0.55"),
    ],
)
def test_an_impossible_option_is_refused(options: list[str], told: str, importer: Importer) -> None:
    assert told in importer.refusal(*options)


def test_the_scale_of_another_rank_must_be_named(importer: Importer) -> None:
    importer.files = published_files(importer.base.name, importer.identity.geometry, rank=8)
    assert "stacks/chat/stack_1.pt has rank 8, and the scale 4.0 is that of rank 16" in importer.refusal()
    importer.accept("--scale", "5.65")


def test_a_dry_run_checks_everything_and_leaves_nothing(importer: Importer) -> None:
    importer.files.write(importer.folder)
    before = contents(importer.store.parent)
    result = importer.run("--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "dry run: nothing was changed" in result.stdout
    assert contents(importer.store.parent) == before
    spoil(f"{UP}.router.weight", float("nan"))(importer.files.stacks["math"][1])
    assert "not finite" in importer.refusal("--dry-run")


def test_what_a_killed_import_left_beside_the_store_is_removed(importer: Importer, tmp_path: Path) -> None:
    left, running = (tmp_path / f".brainstacks-import-{name}" for name in ("left", "running"))
    for folder in (left, running):
        folder.mkdir()
        (folder / "chat-1.safetensors").write_bytes(b"half")
    share = FolderShare(running, when_alone=lambda: None)  # as another import holds it while it lives
    importer.accept()
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "published", "store"]
    assert (running / "chat-1.safetensors").is_file()
    share.close()
    importer.accept("--dry-run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "store"]


def test_an_import_is_one_change_and_the_same_once_more_is_none(importer: Importer) -> None:
    importer.accept()
    first = contents(importer.store)
    assert json.loads(first["manifest.json"] or b"")["generation"] == 1
    importer.accept()
    assert contents(importer.store) == first


def test_the_store_of_another_base_is_refused(importer: Importer, tiny_base_folder: TinyBase) -> None:
    importer.accept()
    error = importer.refusal(base=tiny_base_folder("qwen3"))
    assert f"is for base '{importer.identity.fingerprint}', not for 'tiny-qwen3@" in error


def test_a_folder_that_holds_something_else_is_refused(importer: Importer) -> None:
    importer.store.mkdir()
    (importer.store / "notes.txt").write_text("mine")
    assert "store' is neither a store nor an empty folder" in importer.refusal()


def test_a_stored_domain_and_router_are_replaced_only_when_told(importer: Importer) -> None:
    importer.accept()
    files = importer.files
    importer.files.router["chat_floor"] = 0.25
    assert "has another router" in importer.refusal()
    key = f"{UP}.router.weight"
    files.stacks["code"][0][key] = files.stacks["code"][0][key] + 1
    assert "has a domain 'code' with other stacks, version " in importer.refusal()
    old = StackRegistry.open(importer.store).manifest
    importer.accept("--replace")
    new = StackRegistry.open(importer.store).manifest
    assert new.generation == old.generation + 1
    assert [a == b for a, b in zip(old.domains, new.domains, strict=True)] == [True, False, True]
    assert old.router != new.router


def test_a_store_needs_no_base_to_be_named_again(importer: Importer) -> None:
    importer.accept()
    again = CliRunner().invoke(
        app, ["stacks", "import-reference", str(importer.folder), "--store", str(importer.store)]
    )
    assert again.exit_code == 0, again.stderr
    assert f"base     {importer.identity.fingerprint}" in again.stdout
