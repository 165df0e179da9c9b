"""Decides which domains answer in each mode, and how strongly. Knows names, weights and texts, no losses.

| mode | mix |
|---|---|
| `base` | none |
| `label` | what the router's policy makes of the right label: the domain itself, the floor domain at its floor |
| `ungated` | every domain of the store at 1 |
| `routed` | what the store's router and its policy make of the prompt |
| `oracle` | searched per record with its answer known (`oracle.py`): an upper bound, not a way to serve |
"""

from collections.abc import Iterator, Mapping, Sequence

from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished, Progress
from training.evaluating.modes import Mode
from training.evaluating.subject import DomainName, Mix, Subject


class Mixes:
    """The mixes of one subject. Routes are remembered by router and text."""

    def __init__(self, subject: Subject, finished: Finished) -> None:
        self._subject, self._finished = subject, finished

    def of_label(self, domain: DomainName) -> Mix:
        """The policy's mix if this domain is right. Raises EvaluationInvalid if the store lacks it."""
        if domain not in self._subject.digests:
            has = list(self._subject.digests)
            raise EvaluationInvalid(f"mode 'label' needs the domain {domain!r}, which the store lacks; it has {has}")
        return self._subject.policy.mix_from_scores({name: float(name == domain) for name in self._subject.digests})

    def of_everything(self) -> Mix:
        """Every domain at weight 1."""
        return dict.fromkeys(self._subject.digests, 1.0)

    def of_texts(self, texts: Sequence[str], on_progress: Progress = lambda *_: None) -> list[Mix]:
        """What the router makes of each text. Raises EmptyText for one without tokens."""
        digest, router = self._subject.router_digest, self._subject.router
        if router is None:
            raise EvaluationInvalid("mode 'routed' needs a router, which the store lacks; train one first")
        keys = [self._subject.key("route", {}, digest, text) for text in texts]

        def route(missing: list[int]) -> Iterator[Mapping[int, Mapping[DomainName, float]]]:
            for index in missing:
                yield {index: dict(router.route(texts[index]).scores)}

        scores = self._finished.complete(keys, route, on_progress)
        return [self._of_scores(of_text) for of_text in scores]

    def of_mode(
        self, mode: Mode, *, labels: Sequence[DomainName], texts: Sequence[str], on_progress: Progress = lambda *_: None
    ) -> list[Mix]:
        """The mix of each of N prompts, by its label or its text. Mode `oracle` has none to begin with: ValueError."""
        match mode:
            case "base":
                return [{}] * len(texts)
            case "label":
                return [self.of_label(label) for label in labels]
            case "ungated":
                return [self.of_everything()] * len(texts)
            case "routed":
                return self.of_texts(texts, on_progress)
            case "oracle":
                raise ValueError("the oracle's mix is found by searching, with the answer known")

    def _of_scores(self, scores: Mapping[DomainName, float]) -> Mix:
        mix = self._subject.policy.mix_from_scores(scores)
        return {name: weight for name, weight in mix.items() if name in self._subject.digests}
