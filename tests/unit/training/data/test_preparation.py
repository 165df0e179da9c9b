"""From a recipe's files to what each domain trains on and holds out, and the account of every record."""

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from training.data.data_report import DataReport, RecordCounts
from training.data.preparation import PreparedData, prepare_data
from training.data.records import normalise_text
from training.errors import DataUnusable, RecipeInvalid
from training.recipe import Recipe, RecipeFile

FATES = ("filtered", "bad", "duplicates", "duplicates_elsewhere", "dropped", "leaked", "capped", "train", "held_out")
KEYWORDS = {"chat": ["hello", "thanks"], "code": ["import", "print"], "math": ["sum", "root"]}
NAMES = tuple(KEYWORDS)
ROWS = 150  # of each source


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def prepare(
    folder: Path, *domains: Mapping[str, Any], seed: int = 1, own_tokens: tuple[str, ...] = (), **data: object
) -> PreparedData:
    settings = RecipeFile.model_validate({"seed": seed, "data": data, "domains": domains})
    return prepare_data(Recipe(settings, folder, "digest"), own_tokens=own_tokens)


def numbered(name: str, count: int) -> list[dict[str, Any]]:
    return [{"instruction": f"{name} {i}", "output": f"answer {i}"} for i in range(count)]


def messy_rows(seed: int, name: str) -> list[dict[str, Any]]:
    """Rows of which some are bad, repeated, asked twice, full of chat tokens, or another domain's."""
    draw = random.Random(f"{seed} {name}")
    words = [word for patterns in KEYWORDS.values() for word in patterns]
    rows: list[dict[str, Any]] = []
    for _ in range(ROWS):
        said = " ".join(draw.choices(words, k=draw.randint(0, 6)))
        answer = draw.choice(["<|im_end|>", "", f"{said} answer", f"{said} answer<|im_end|>", "short"])
        rows.append({"instruction": f"question {draw.randint(0, 100)}", "output": answer, "keep": draw.random() < 0.9})
    return rows


def messy(folder: Path, seed: int, **overrides: Any) -> PreparedData:
    for name in NAMES:
        for part in "ab":
            write(folder / f"{name}-{part}.jsonl", messy_rows(seed, f"{name}-{part}"))
    domains = [
        {
            "name": name,
            "files": [f"{name}-a.jsonl"],
            "sources": [{"file": f"{name}-b.jsonl", "where": "{{ keep }}", "cap": 20, "weight": 2.0}],
            "held_out": 5 + 10 * index,
            "max_records": 25,
            "keywords": KEYWORDS[name],
            **overrides,
        }
        for index, name in enumerate(NAMES)
    ]
    return prepare(folder, *domains, seed=seed, decontaminate=True, max_bad_share=1.0)


def test_every_row_of_every_source_has_one_fate(tmp_path: Path) -> None:
    met: Counter[str] = Counter()
    for seed in range(5):
        report = messy(tmp_path, seed).report
        for domain in report.domains.values():
            for source in domain.sources:
                counts = asdict(source.counts)
                assert counts["read"] == ROWS == sum(counts[fate] for fate in FATES)
                assert len(source.first_bad) == min(counts["bad"], 20)
        for fate in FATES:  # of all sources together as of all domains together
            by_source = sum(getattr(s.counts, fate) for d in report.domains.values() for s in d.sources)
            assert by_source == sum(getattr(d.counts, fate) for d in report.domains.values())
            met[fate] += by_source
    assert all(met[fate] > 0 for fate in FATES)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_domain_reads_and_gets_is_what_it_gives_and_keeps(seed: int, tmp_path: Path) -> None:
    prepared = messy(tmp_path, seed)
    domains = prepared.report.domains
    for name, domain in domains.items():
        counts = asdict(domain.counts)
        fates = sum(counts[fate] for fate in FATES)
        assert counts["read"] + domain.reassigned_in == fates + counts["reassigned"]
        assert counts["reassigned"] == sum(domain.reassigned_to.values())
        assert domain.reassigned_in == sum(other.reassigned_to.get(name, 0) for other in domains.values())
        assert (counts["train"], counts["held_out"]) == (
            len(prepared.domains[name].train),
            len(prepared.domains[name].held_out),
        )
    assert sum(domain.reassigned_in for domain in domains.values()) > 0


@pytest.mark.parametrize("seed", range(5))
def test_no_prompt_that_is_held_out_is_trained_on_anywhere(seed: int, tmp_path: Path) -> None:
    domains = messy(tmp_path, seed).domains.values()
    held_out = {normalise_text(record.prompt) for domain in domains for record in domain.held_out}
    assert not held_out & {normalise_text(record.prompt) for domain in domains for record in domain.train}
    assert all(domain.held_out for domain in domains)  # fewer than asked for where an earlier domain trains on the rest
    assert all(len(domain.train) <= 25 for domain in domains)


def test_the_same_recipe_and_files_give_the_same_and_another_seed_does_not(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", numbered("a", 40))
    domain = {"name": "a", "files": ["a.jsonl"], "held_out": 5, "max_records": 10}
    first, again, other = (prepare(tmp_path, domain, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.domains != other.domains


def test_what_is_held_out_depends_on_no_cap(tmp_path: Path) -> None:
    free, tight = (messy(tmp_path, 1, max_records=n) for n in (1000, 3))
    assert {n: d.held_out for n, d in free.domains.items()} == {n: d.held_out for n, d in tight.domains.items()}
    for name, domain in tight.domains.items():
        assert len(domain.train) == 3
        assert [record for record in free.domains[name].train if record in domain.train] == domain.train


def test_the_first_training_records_are_a_fair_sample_of_all_sources(tmp_path: Path) -> None:
    """Not those of the source that was cut most, though it gives its share of the seeded order's front."""
    write(tmp_path / "many.jsonl", numbered("many", 2000))
    write(tmp_path / "few.jsonl", numbered("few", 110))
    sources = [{"file": "many.jsonl", "cap": 100}, {"file": "few.jsonl"}]
    train = prepare(tmp_path, {"name": "a", "sources": sources, "held_out": 10}).domains["a"].train
    assert 25 < sum(record.prompt.startswith("many") for record in train[:100]) < 75


def test_steps_can_be_turned_off(tmp_path: Path) -> None:
    rows = [{"instruction": f"q {i // 2}", "output": "a<|im_end|>"} for i in range(20)]
    write(tmp_path / "a.jsonl", rows)
    domain = {"name": "a", "files": ["a.jsonl"], "held_out": 2}
    off = prepare(tmp_path, domain, strip_chat_tokens=False, deduplicate=False, own_tokens=("a",)).domains["a"]
    assert len(off.train) == 18
    assert {record.output for record in off.train} == {"a<|im_end|>"}
    on = prepare(tmp_path, domain)
    assert {record.output for record in on.domains["a"].train} == {"a"}
    counts = on.report.domains["a"].counts
    assert (counts.chat_tokens, counts.duplicates, counts.train, counts.held_out) == (20, 10, 8, 2)


def test_a_record_of_nothing_but_chat_tokens_is_a_bad_one(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*numbered("a", 9), {"instruction": "q", "output": "<own> <|im_end|>"}])
    domain = {"name": "a", "files": ["a.jsonl"], "held_out": 2}
    with pytest.raises(DataUnusable, match=r"'a\.jsonl' of domain 'a'.*1 of 10.*a\.jsonl:10: without its chat tokens"):
        prepare(tmp_path, domain, own_tokens=("<own>",))
    report = prepare(tmp_path, domain, own_tokens=("<own>",), max_bad_share=0.1).report
    assert report.domains["a"].counts.bad == 1
    assert report.domains["a"].sources[0].first_bad[0].place == "a.jsonl:10"


def test_a_domain_with_too_few_records_for_both_sides_names_itself_and_the_numbers(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", numbered("a", 5))
    with pytest.raises(DataUnusable, match="domain 'a' has 0 records to train on and 5 held out, of 5 rows"):
        prepare(tmp_path, {"name": "a", "files": ["a.jsonl"], "held_out": 40})


def test_a_bad_template_or_keyword_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    missing = {"name": "a", "files": ["not there.jsonl"]}
    with pytest.raises(RecipeInvalid, match="of domain 'b'"):
        prepare(tmp_path, missing, {"name": "b", "files": ["x"], "keywords": ["("]})
    with pytest.raises(RecipeInvalid, match="of domain 'b'"):
        prepare(tmp_path, missing, {"name": "b", "sources": [{"file": "x", "where": "{{"}]})


def test_the_report_survives_json(tmp_path: Path) -> None:
    report = messy(tmp_path, 1).report
    assert TypeAdapter(DataReport).validate_json(json.dumps(asdict(report))) == report
    assert {*FATES, "read", "chat_tokens", "reassigned"} == {field.name for field in fields(RecordCounts)}
