"""Writes a comparison as Markdown: for each domain a table of measures by variant. Knows words, no reports."""

from collections.abc import Iterator, Mapping, Sequence

from training.comparison import Comparison, Spread, VariantNumbers
from training.reports import DomainName

# Field of DomainNumbers -> what people read, and how its numbers look.
MEASURES: Mapping[str, tuple[str, str]] = {
    "parameters": ("parameters of a stack", ",.0f"),
    "base_loss": ("base loss", ".4f"),
    "context_loss": ("loss in context, before", ".4f"),
    "loss": ("loss in context, after", ".4f"),
    "gain": ("gain over the base", ".4f"),
    "isolated": ("isolated, at the end", ".4f"),
    "ungated": ("ungated, at the end", ".4f"),
    "routed": ("routed, at the end", ".4f"),
    "rounds_kept": ("rounds kept", ".3g"),
    "seconds": ("seconds", ".1f"),
    "protected_energy": ("protected energy, largest", ".2g"),
    "mean_cosine": ("mean cosine with earlier", ".4f"),
    "least_expert_share": ("expert share, least", ".4f"),
    "largest_expert_share": ("expert share, largest", ".4f"),
    "near_uniform_experts": ("expert shares within 40 % of 1/E", ".1%"),
}
NOTE = (
    "Losses in nats per held-out answer token; over several seeds the median (lowest to highest). "
    "In context: with what else was active while the domain trained."
)


def as_markdown(comparison: Comparison) -> str:
    """The whole comparison: title, a table for each domain, and the runs that failed."""
    parts = [f"# {comparison.title}", NOTE]
    for domain in comparison.domains:
        parts += [f"## {domain}", "\n".join(_table(comparison, domain))]
    failures = comparison.failures()
    if failures:
        parts += ["## Not finished", "\n".join(f"- {failure}" for failure in failures)]
    return "\n\n".join(parts) + "\n"


def _table(comparison: Comparison, domain: DomainName) -> Iterator[str]:
    heads = [f"{name} ({_seeds(variant, domain)})" for name, variant in comparison.variants.items()]
    yield _row(["", *heads])
    yield _row(["---", *("---:" for _ in heads)])
    for field, (words, form) in MEASURES.items():
        spreads = [variant.summary.get(domain, {}).get(field) for variant in comparison.variants.values()]
        yield _row([words, *(_cell(spread, form) for spread in spreads)])


def _seeds(variant: VariantNumbers, domain: DomainName) -> str:
    count = sum(domain in run.domains for run in variant.runs)
    return f"{count} of {len(variant.runs)} seeds" if count < len(variant.runs) else f"{count} seed{'s'[: count > 1]}"


def _cell(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "-"
    if spread.lowest == spread.highest:
        return format(spread.median, form)
    return f"{spread.median:{form}} ({spread.lowest:{form}} to {spread.highest:{form}})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
