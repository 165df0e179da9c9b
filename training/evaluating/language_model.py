"""A store's base and domains as a language model of lm-evaluation-harness, each request under a mix of its own.

Knows the harness's requests; imported only where the harness is. Every token of a continuation counts.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from training.data.examples import Example
from training.discovery.candidate_losses import Row
from training.errors import EvaluationInvalid
from training.evaluating.finished import Finished, Progress
from training.evaluating.generation import GreedyTexts, Prompt
from training.evaluating.scoring import RowScores
from training.evaluating.subject import Mix, Subject

DEFAULT_NEW_TOKENS = 256
NEUTRAL = {"do_sample": False, "temperature": 0.0}  # what greedy decoding already does

MixesOf = Callable[[Sequence[Instance]], Sequence[Mix]]
TokenRequest = tuple[Any, list[int], list[int]]  # the harness's own key, context, continuation


class MixedLM(TemplateLM):  # type: ignore[misc]
    """What is finished is taken from the file; everything else is measured batch by batch."""

    def __init__(
        self,
        subject: Subject,
        mixes_of: MixesOf,
        *,
        finished: Finished,
        max_tokens: int,
        on_progress: Progress = lambda *_: None,
    ) -> None:
        """A scoring pass holds at most `max_tokens` with padding, or one row."""
        super().__init__()
        self.tokenizer = subject.base.tokenizer
        self._subject, self._mixes_of, self._finished = subject, mixes_of, finished
        self._on_progress = on_progress
        self._scores = RowScores(subject.base, subject.stacks, max_tokens=max_tokens)
        self._texts = GreedyTexts(subject.base, subject.stacks)

    @property
    def eot_token_id(self) -> int:
        return min(self._subject.base.eos_token_ids)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._subject.base.fingerprint

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokenizer's own special tokens come in front, as in serving, unless a chat template put them there."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(context, continuation) of each request -> its log-likelihood in nats, and whether it is the greedy one."""
        encoded = [(request.args, *self._encode(*request.args)) for request in requests]
        return self._loglikelihood_tokens(encoded, mixes=self._mixes_of(requests))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-likelihood, every token once, in windows as long as the context."""
        windows: list[TokenRequest] = []
        window_mixes: list[Mix] = []
        owners: list[int] = []
        for owner, (request, mix) in enumerate(zip(requests, self._mixes_of(requests), strict=True)):
            of_text = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._subject.base.max_positions - 1,
                context_len=1,
            )
            pairs = [make_disjoint_window(window) for window in of_text]
            windows += [(request.args, list(context), list(continuation)) for context, continuation in pairs]
            window_mixes += [mix] * len(pairs)
            owners += [owner] * len(pairs)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows, mixes=window_mixes), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, each cut before the first of its stop strings."""
        mixes = self._mixes_of(requests)
        prompts = [self._prompt(*request.args, mix=mix) for request, mix in zip(requests, mixes, strict=True)]
        keys = [self._subject.key("text", p.mix, p.token_ids, p.max_new_tokens, p.stops) for p in prompts]
        return self._finished.complete(keys, partial(self._texts.texts, prompts), self._on_progress)

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], mixes: Sequence[Mix] | None = None, **_: Any
    ) -> list[tuple[float, bool]]:
        """Tokens in place of texts; without mixes, of the base alone."""
        rows = [
            Row(self._example(*request), mix)
            for request, mix in zip(requests, mixes or [{}] * len(requests), strict=True)
        ]
        keys = [self._subject.key("score", r.weights, r.example.token_ids, r.example.prompt_length) for r in rows]
        scores = self._finished.complete(keys, partial(self._scores.scores, rows), self._on_progress)
        return [(value, is_greedy) for value, is_greedy in scores]

    def _encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            encoded: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
            return encoded
        return [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)

    def _example(self, key: Any, context: Sequence[int], continuation: Sequence[int]) -> Example:
        if not context or not continuation:
            raise EvaluationInvalid(f"nothing to score in {key!r}: one side has no tokens")
        self._require_fits(len(context) + len(continuation), key)
        return Example((*context, *continuation), len(context))

    def _prompt(self, context: str, settings: Mapping[str, Any], *, mix: Mix) -> Prompt:
        unknown = [name for name in settings if name not in ("until", "max_gen_toks", *NEUTRAL)]
        unknown += [name for name, value in NEUTRAL.items() if settings.get(name, value) not in (value, None)]
        if unknown:
            raise EvaluationInvalid(f"generation is greedy: {unknown[0]}={settings[unknown[0]]!r} is not supported")
        until = settings.get("until") or ()
        token_ids = tuple(self.tok_encode(context))
        max_new_tokens = int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        self._require_fits(len(token_ids) + max_new_tokens, context)
        return Prompt(token_ids, mix, max_new_tokens, (until,) if isinstance(until, str) else tuple(until))

    def _require_fits(self, num_tokens: int, what: Any) -> None:
        """Nothing is cut: a benchmark of shortened questions would be another benchmark."""
        limit = self._subject.base.max_positions
        if num_tokens > limit:
            raise EvaluationInvalid(f"{num_tokens} tokens do not fit the base's context of {limit}: {str(what)[:80]!r}")
