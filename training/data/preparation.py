"""Turns a recipe's sources into each domain's training and held-out records. Knows the order of the steps.

read, strip chat tokens, deduplicate, decontaminate, split by prompt, remove what an earlier domain holds out, caps and
weights. These last touch training only: what is held out depends on no cap. The same recipe, files and seed give the
same records in the same order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.data.chat_tokens import strip_record
from training.data.data_report import DataReport, RecordCounts, Tally
from training.data.decontamination import Keywords, compile_keywords, decontaminate
from training.data.deduplication import deduplicate
from training.data.mixing import mix_sources
from training.data.records import DomainName, DomainRecords, Pools, Record, SourcedRecord, SourceKey
from training.data.rows import BadRow
from training.data.sources import SourceRecords, read_source, require_usable
from training.data.split import split_pools
from training.data.templates import SourceTemplates, compile_templates, require_text
from training.errors import BadRecord, DataUnusable
from training.recipe import DataSection, Recipe, RecipeFile

Templates = Mapping[SourceKey, SourceTemplates]


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Every domain's records in the recipe's order, and what became of all that was read."""

    domains: Mapping[DomainName, DomainRecords]
    report: DataReport


def prepare_data(recipe: Recipe, *, own_tokens: Sequence[str] = ()) -> PreparedData:
    """Reads and prepares all domains of a recipe; `own_tokens` are the base's special tokens, to strip with the rest.

    Raises RecipeInvalid for a template or keyword that does not compile, before anything is read, and DataUnusable for
    a source or domain that cannot be used.
    """
    settings = recipe.settings
    keywords = compile_keywords(settings.domains)
    templates = {
        SourceKey(domain.name, index): compile_templates(section, domain.name)
        for domain in settings.domains
        for index, section in enumerate(domain.all_sources)
    }
    tally = Tally()
    pools = _clean(_read(recipe, templates, own_tokens, tally), keywords, settings.data, tally)
    train, held_out = _split(pools, settings, tally)
    report = tally.report(settings.domains)
    for name, domain in report.domains.items():
        _require_both_sides(name, domain.counts)
    domains = {name: DomainRecords(name, _records(train[name]), _records(held_out[name])) for name in pools}
    return PreparedData(domains, report)


def _read(recipe: Recipe, templates: Templates, own_tokens: Sequence[str], tally: Tally) -> Pools:
    pools: dict[DomainName, list[SourcedRecord]] = {}
    settings = recipe.settings
    for domain in settings.domains:
        pools[domain.name] = []
        for index, section in enumerate(domain.all_sources):
            key = SourceKey(domain.name, index)
            source = read_source(section, templates[key], recipe.folder)
            if settings.data.strip_chat_tokens:
                source, num_tokens = _strip(source, own_tokens)
                tally.add("chat_tokens", key, num_tokens)
            require_usable(source, templates[key].label, max_bad_share=settings.data.max_bad_share)
            tally.add("read", key, source.num_rows)
            tally.add("filtered", key, source.filtered)
            tally.add_bad(key, source.bad)
            pools[domain.name].extend(SourcedRecord(record, place, key) for place, record in source.records)
    return pools


def _strip(source: SourceRecords, own_tokens: Sequence[str]) -> tuple[SourceRecords, int]:
    """A record of nothing but chat tokens is a bad one."""
    records: list[tuple[str, Record]] = []
    bad = list(source.bad)
    total = 0
    for place, record in source.records:
        stripped, num_tokens = strip_record(record, own_tokens)
        total += num_tokens
        try:
            require_text("instruction", stripped.instruction)
            require_text("output", stripped.output)
        except BadRecord as error:
            bad.append(BadRow(place, f"without its chat tokens: {error}"))
        else:
            records.append((place, stripped))
    return SourceRecords(records, bad, source.filtered, source.num_rows), total


def _clean(pools: Pools, keywords: Keywords, section: DataSection, tally: Tally) -> Pools:
    if section.deduplicate:
        unique = deduplicate(pools)
        tally.add_fate("duplicates", unique.repeated)
        tally.add_fate("duplicates_elsewhere", unique.elsewhere)
        pools = unique.kept
    if section.decontaminate:
        sorted_out = decontaminate(pools, keywords)
        tally.add_moved(sorted_out.moved)
        tally.add_fate("dropped", sorted_out.dropped)
        pools = sorted_out.kept
    return pools


def _split(pools: Pools, settings: RecipeFile, tally: Tally) -> tuple[Pools, Pools]:
    split = split_pools(
        pools, held_out={domain.name: domain.held_out for domain in settings.domains}, seed=settings.seed
    )
    mixed = mix_sources(split.train, settings.domains, seed=settings.seed)
    for field, records in (
        ("held_out", split.held_out),
        ("leaked", split.leaked),
        ("capped", mixed.left_out),
        ("train", mixed.kept),
    ):
        tally.add_fate(field, records)
    return mixed.kept, split.held_out


def _require_both_sides(domain: DomainName, counts: RecordCounts) -> None:
    if not counts.train or not counts.held_out:
        raise DataUnusable(
            f"domain {domain!r} has {counts.train} records to train on and {counts.held_out} held out, "
            f"of {counts.read} rows; both sides need some: {counts}"
        )


def _records(items: Sequence[SourcedRecord]) -> list[Record]:
    return [item.record for item in items]
