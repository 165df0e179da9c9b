"""What a comparison found: every run's numbers, each variant's medians and spreads. Knows no stores and no console."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median

from training.reports import DomainName
from training.run_numbers import Curve, DomainNumbers

VariantName = str


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over the seeds."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class RunNumbers:
    """One run: the domains that it finished and, if they are not all, why."""

    seed: int
    domains: Mapping[DomainName, DomainNumbers]
    failure: str | None


@dataclass(frozen=True, slots=True)
class VariantNumbers:
    """One variant: its runs, and each measure of each domain over the seeds that finished it."""

    runs: tuple[RunNumbers, ...]
    summary: Mapping[DomainName, Mapping[str, Spread]]  # domain -> field of DomainNumbers


@dataclass(frozen=True, slots=True)
class Comparison:
    """The whole result."""

    title: str
    domains: tuple[DomainName, ...]
    variants: Mapping[VariantName, VariantNumbers]

    def failures(self) -> list[str]:
        """A sentence for each run that did not finish its domains."""
        return [
            f"{name}, seed {run.seed}: {run.failure}"
            for name, variant in self.variants.items()
            for run in variant.runs
            if run.failure is not None
        ]

    def curves(self, domain: DomainName) -> dict[VariantName, list[Curve]]:
        """The validation curves of a domain: one for each seed that finished it, of the variants that have any."""
        curves = {
            name: [run.domains[domain].validation for run in variant.runs if domain in run.domains]
            for name, variant in self.variants.items()
        }
        return {name: of_seeds for name, of_seeds in curves.items() if of_seeds}


def compare_runs(
    title: str, domains: tuple[DomainName, ...], runs: Mapping[VariantName, Sequence[RunNumbers]]
) -> Comparison:
    """The comparison of these runs."""
    variants = {
        name: VariantNumbers(
            tuple(of_seeds), {domain: spreads for domain in domains if (spreads := _summary(of_seeds, domain))}
        )
        for name, of_seeds in runs.items()
    }
    return Comparison(title, domains, variants)


def _summary(runs: Sequence[RunNumbers], domain: DomainName) -> dict[str, Spread]:
    """field -> spread, of the numbers that every seed which finished the domain has."""
    finished = [dict(_measures(run.domains[domain])) for run in runs if domain in run.domains]
    names = [name for name in (finished[0] if finished else ()) if all(name in measures for measures in finished)]
    return {name: _spread([measures[name] for measures in finished]) for name in names}


def _measures(numbers: DomainNumbers) -> Iterator[tuple[str, float]]:
    for field in fields(numbers):
        value = getattr(numbers, field.name)
        if isinstance(value, int | float):
            yield field.name, value


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))
