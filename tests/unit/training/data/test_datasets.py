"""Datasets of the hub's library, as folders on disk: no network."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest

from training.data.records import Record
from training.data.sources import SourceRecords, read_source
from training.data.templates import compile_templates
from training.errors import DataUnusable
from training.recipe import SourceSection

ROWS = [
    {"question": f"q {i}", "answer": {"text": f"a {i}"}, "input": None, "source": i, "photo of": "x"} for i in range(4)
]
TEMPLATES = {"instruction": "{{ question }}", "output": "{{ answer.text }}"}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a dataset `small` of two configurations in it."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "small" / "few.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "small" / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: main, data_files: train.jsonl}\n- {config_name: few, data_files: few.jsonl}\n---\n"
    )
    return tmp_path


def read(folder: Path, **section: object) -> SourceRecords:
    source = SourceSection.model_validate({"dataset": "small", "config": "main", **TEMPLATES, **section})
    return read_source(source, compile_templates(source, "math"), folder)


def test_a_folder_beside_the_recipe_is_read_with_a_place_for_each_row(folder: Path) -> None:
    source = read(folder, where="{{ source != 1 }}", revision="v2")
    assert source.records == [(f"small/main:train[v2]:{i}", Record(f"q {i}", f"a {i}")) for i in (0, 2, 3)]
    assert (source.filtered, source.num_rows) == (1, 4)
    assert [place for place, _ in read(folder, split="train[1:3]").records] == [
        f"small/main:train[1:3]:{i}" for i in range(2)
    ]


def test_a_configuration_is_chosen_by_name(folder: Path) -> None:
    assert len(read(folder, config="few").records) == 1


def test_a_template_may_take_the_whole_row(folder: Path) -> None:
    source = read(folder, instruction="{{ row['photo of'] }} {{ row.question }}", split="train[:1]")
    assert [record.instruction for _, record in source.records] == ["x q 0"]


def test_an_unknown_column_is_named_with_the_columns_there_are(folder: Path) -> None:
    with pytest.raises(DataUnusable) as caught:
        read(folder, output="{{ anwser }}")
    assert "template 'output' reads column 'anwser'" in str(caught.value)
    assert str(sorted(ROWS[0])) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({"split": "tset"}, "split 'tset'"),
        ({"config": "big"}, "config 'big'"),
        ({"dataset": "/there/is/no/such/folder"}, "'/there/is/no/such/folder'"),
    ],
)
def test_what_is_not_there_names_dataset_config_and_split(section: dict[str, str], named: str, folder: Path) -> None:
    with pytest.raises(DataUnusable) as caught:
        read(folder, **section)
    for part in ("dataset ", "config ", "split ", "revision ", named):
        assert part in str(caught.value)


def test_without_the_library_the_extra_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataUnusable, match=r"'small/main:train'.*pip install -c constraints.txt -e '\.\[train\]'"):
        read(folder)
