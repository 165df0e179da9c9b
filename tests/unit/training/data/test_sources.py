"""Reading a source: templates, what is kept, and how what cannot be used is named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from training.data.records import Record
from training.data.rows import BadRow
from training.data.sources import SourceRecords, read_source, require_usable
from training.data.templates import compile_templates
from training.errors import DataUnusable, RecipeInvalid
from training.recipe import SourceSection

GOOD = '{"instruction": "a", "output": "b"}'


def read_lines(folder: Path, text: str | bytes, **section: object) -> SourceRecords:
    (folder / "data.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    source = SourceSection.model_validate({"file": "data.jsonl", **section})
    return read_source(source, compile_templates(source, "math"), folder)


def read(folder: Path, *rows: Mapping[str, Any], **section: object) -> SourceRecords:
    return read_lines(folder, "\n".join(json.dumps(row) for row in rows), **section)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("not json", "not JSON"),
        ("[1]", "list"),
        ('{"output": "x"}', "'instruction'"),
        ('{"instruction": "x", "output": "  "}', "'output'"),
        ('{"instruction": "x", "output": 7}', "got 7"),
        ('{"instruction": "x", "output": "y", "input": 3}', "'input'"),
        ('{"instruction": "x", "output": "y", "source": 3}', "'source'"),
        ('{"instruction": "x", "output": "\\ud800"}', "surrogate"),
        (b"\xff\xfe", "not JSON"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(line: str | bytes, named: str, tmp_path: Path) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    source = read_lines(tmp_path, GOOD.encode() + b"\n\n" + raw + b"\n" + GOOD.encode())
    assert source.records == [("data.jsonl:1", Record("a", "b")), ("data.jsonl:4", Record("a", "b"))]
    assert [bad.place for bad in source.bad] == ["data.jsonl:3"]
    assert named in source.bad[0].reason
    assert (source.filtered, source.num_rows) == (0, 3)


def test_files_with_windows_lines_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    assert len(read_lines(tmp_path, b"\xef\xbb\xbf" + GOOD.encode() + b"\r\n" + GOOD.encode() + b"\r\n").records) == 2


def test_optional_fields_may_be_absent_or_null(tmp_path: Path) -> None:
    source = read(
        tmp_path,
        {"instruction": "a", "output": "b", "input": None, "source": None},
        {"instruction": "a", "output": "b", "input": "c", "source": "d"},
    )
    assert [record for _, record in source.records] == [Record("a", "b"), Record("a", "b", "c", "d")]


def test_templates_reach_conversations_and_columns_with_spaces(tmp_path: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": " 4\n"}],
        "final answer": 4,
    }
    source = read(
        tmp_path,
        row,
        instruction="Solve.\n{{ messages[0].content }}\n",
        input="{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}",
        output="{{ messages[1].content }}#### {{ row['final answer'] }}",
    )
    assert source.records == [("data.jsonl:1", Record("Solve.\n2 + 2?\n", " 4\n#### 4"))]


def test_where_keeps_rows_that_it_renders_for_and_false_renders_nothing(tmp_path: Path) -> None:
    rows = [{"instruction": str(n), "output": "x", "n": n, "tag": "ab"[n % 2]} for n in range(6)]
    for where in ("{{ n > 3 }}", "{% if n > 3 %}yes{% endif %}", "{{ n if n > 3 else None }}"):
        source = read(tmp_path, *rows, where=where)
        assert [record.instruction for _, record in source.records] == ["4", "5"]
        assert (source.filtered, source.num_rows, source.bad) == (4, 6, [])


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{{ messages[5].content }}", "no element 5"),
        ("{{ messages[0].text }}", "no attribute 'text'"),
        ("{{ messages }}", "prints [{'content': 'hi'}]"),  # its Python form is nothing to learn
        ("{{ nothing }}", "prints None"),
        ("{{ 1 // number }}", "division"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_on_a_row_makes_a_bad_record(template: str, named: str, tmp_path: Path) -> None:
    row = {"instruction": "a", "messages": [{"content": "hi"}], "nothing": None, "number": 0}
    source = read(tmp_path, row, output=template)
    assert source.records == []
    assert source.bad[0].place == "data.jsonl:1"
    assert "'output'" in source.bad[0].reason
    assert named in source.bad[0].reason


def test_a_row_without_a_column_that_others_have_is_a_bad_record(tmp_path: Path) -> None:
    source = read(tmp_path, {"q": "a", "output": "b"}, {"output": "b"}, instruction="{{ q }}")
    assert source.bad == [BadRow("data.jsonl:2", "template 'instruction': 'q' is undefined")]


@pytest.mark.parametrize("name", ["instruction", "input", "output", "where"])
def test_a_column_that_no_row_has_names_template_column_and_columns(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataUnusable) as caught:
        read(tmp_path, {"instruction": "a", "output": "b"}, **{name: "{{ qestion }}"})
    for part in ("'data.jsonl'", "'math'", f"template {name!r}", "'qestion'", "['instruction', 'output']"):
        assert part in str(caught.value)


def test_a_source_without_a_template_or_column_for_a_field_names_both(tmp_path: Path) -> None:
    with pytest.raises(DataUnusable, match=r"no template 'instruction' and no column 'instruction'.*\['output', 'q'\]"):
        read(tmp_path, {"q": "a", "output": "b"})


def test_columns_may_have_the_names_of_jinjas_own(tmp_path: Path) -> None:
    row = {"range": "a", "row": "b"}
    source = read(tmp_path, row, instruction="{{ range }}", output="{{ row }}{% for i in [1, 2] %}{{ i }}{% endfor %}")
    assert [record for _, record in source.records] == [Record("a", "b12")]


@pytest.mark.parametrize("template", ["{{ open", "{% if %}", "{{ x | no_such_filter }}", "{{ [1, 2] | random }}"])
def test_a_template_that_does_not_compile_names_source_domain_and_template(template: str) -> None:
    section = SourceSection(file="data.jsonl", output=template)
    with pytest.raises(RecipeInvalid) as caught:
        compile_templates(section, "math")
    for part in ("'data.jsonl'", "'math'", "'output'", template):
        assert part in str(caught.value)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    section = SourceSection(file="gone.jsonl")
    with pytest.raises(DataUnusable, match=r"gone\.jsonl"):
        read_source(section, compile_templates(section, "math"), tmp_path)


def usable(num_good: int, num_bad: int, max_bad_share: float, filtered: int = 0) -> None:
    records = [(f"f:{i}", Record("a", "b")) for i in range(num_good)]
    bad = [BadRow(f"f:{i}", f"reason {i}") for i in range(num_bad)]
    source = SourceRecords(records, bad, filtered, num_good + num_bad + filtered)
    require_usable(source, "source 'f'", max_bad_share=max_bad_share)


def test_more_bad_records_than_the_share_allows_name_count_share_limit_and_the_first_places() -> None:
    usable(9, 1, 0.1)
    with pytest.raises(DataUnusable) as caught:
        usable(8, 4, 0.25, filtered=100)  # rows that nobody asked for make no share smaller
    for part in ("source 'f'", "4 of 12", "0.3333", "0.25", "f:0: reason 0", "f:1: reason 1", "f:2: reason 2"):
        assert part in str(caught.value)
    assert "f:3" not in str(caught.value)


@pytest.mark.parametrize(("num_bad", "filtered"), [(0, 0), (3, 0), (0, 5)])
def test_a_source_that_gives_nothing_is_refused_whatever_share_is_allowed(num_bad: int, filtered: int) -> None:
    with pytest.raises(DataUnusable, match=f"gives no record: {num_bad + filtered} rows, {filtered} not kept"):
        usable(0, num_bad, 1.0, filtered)
