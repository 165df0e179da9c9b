"""The loop: takes requests from any thread, runs steps in its own, and tells each request what came of it.

Knows the order of things in a step, not how a step is computed. Everything that touches the device happens in the
engine's thread; other threads leave commands in a queue.
"""

import itertools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Rows
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from engine.block_table import BLOCK_TOKENS, num_blocks_for
from engine.errors import EngineError, EngineFailed, EngineStopped, PromptTooLong
from engine.kv_cache import KvCache
from engine.model.base import Base
from engine.model.hidden import hidden_states
from engine.runner import Runner, StepOutput
from engine.sampling import sample, token_logprobs
from engine.scheduler import ScheduledRow, Scheduler
from engine.sequence import Sequence, new_sequence
from engine.types import (
    EngineSnapshot,
    Event,
    FailedEvent,
    FinishReason,
    GenerationRequest,
    PromptEvent,
    SamplingParams,
    StatesEvent,
    TokenLogprob,
)

logger = logging.getLogger(__name__)

STEP_TOKENS = 512
FUSED_STEP_TOKENS = 128  # whose activations a core's second-level cache holds; more would not be faster
FUSED_PROMPT_TOKENS = 8  # beside one stream, such a step takes about twice as long as one without them
IDLE_WAIT_SECONDS = 0.5  # how often an idle engine shows that it is alive
MAX_FAILED_STEPS = 8  # one after the other: then it is not a request that is at fault
PROMPT_LOGITS_ROWS = 64  # positions whose logits over the whole vocabulary are in memory at once

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Submit:
    sequence: Sequence


@dataclass(frozen=True, slots=True)
class _Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class _Job(Generic[T]):
    work: Callable[[], T]
    result: "Future[T]"

    def run(self) -> None:
        """Runs the work and settles its future."""
        if not self.result.set_running_or_notify_cancel():
            return
        try:
            self.result.set_result(self.work())
        except BaseException as error:
            self.result.set_exception(error)
            if not isinstance(error, Exception):  # which belongs to the caller alone
                raise

    def refuse(self, reason: Exception) -> None:
        """Settles the future without running the work."""
        if self.result.set_running_or_notify_cancel():
            self.result.set_exception(reason)


class _Wake:
    """Ends an idle wait."""


_Command = _Submit | _Cancel | _Job[Any] | _Wake


class Engine:
    """Generates tokens for many requests at once, each with its own mix and its own sampling parameters."""

    def __init__(
        self,
        base: Base,
        *,
        max_batch_rows: int,
        max_model_len: int,
        kv_cache_tokens: int,
        max_step_tokens: int | None = None,
        prompt_tokens_beside_decode: int | None = None,
        fused_step: bool = True,
    ) -> None:
        """`fused_step` allows the fused step where there is one for the base and the device.

        `max_step_tokens` bounds the tokens of a step, by default to 128 where there is a fused step, or twice
        `max_batch_rows`, and elsewhere to 512. `prompt_tokens_beside_decode` bounds a step's prompt tokens while others
        decode, or as many as decode if these are more; by default it is 8 where there is a fused step, and elsewhere
        there is no other bound.
        """
        if max_model_len > base.max_positions:
            raise ValueError(f"max_model_len {max_model_len} is more than the base's {base.max_positions} positions")
        if max_step_tokens is not None and max_step_tokens <= max_batch_rows:
            raise ValueError(f"max_step_tokens {max_step_tokens} must be more than max_batch_rows {max_batch_rows}")
        if kv_cache_tokens < max_model_len:
            raise ValueError(f"kv_cache_tokens {kv_cache_tokens} does not hold one request of {max_model_len} tokens")
        self.base = base
        self.max_model_len = max_model_len
        num_blocks = num_blocks_for(kv_cache_tokens)
        self._runner = Runner(
            base,
            num_kv_positions=num_blocks * BLOCK_TOKENS,
            fused_step=fused_step,
            max_rows=max_batch_rows,
            max_model_len=max_model_len,
        )
        if prompt_tokens_beside_decode is None and self._runner.is_fused:
            prompt_tokens_beside_decode = FUSED_PROMPT_TOKENS
        if max_step_tokens is None:
            max_step_tokens = max(FUSED_STEP_TOKENS if self._runner.is_fused else STEP_TOKENS, 2 * max_batch_rows)
        self._scheduler = Scheduler(
            KvCache(num_blocks),
            max_rows=max_batch_rows,
            max_step_tokens=max_step_tokens,
            prompt_tokens_beside_decode=prompt_tokens_beside_decode,
        )
        self._failed_steps = 0  # since the last one that did not fail
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._sequences: dict[str, Sequence] = {}
        self._jobs: deque[_Job[Any]] = deque()
        self._read_numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping = threading.Event()
        self._end: EngineError = EngineStopped("the engine is shutting down")
        self._admission = threading.Lock()  # nothing is put behind the last drain
        self._alive_at = time.monotonic()
        self._steps = 0
        self._checked_steps = 0
        self._snapshot = EngineSnapshot(0, 0, 0.0, 0, 0)

    @property
    def wants_panels(self) -> bool:
        """Whether the stacks of a request's mix must be panelled, which the fused step reads, or must not."""
        return self._runner.is_fused

    def start(self) -> None:
        """Starts the engine's thread."""
        self._alive_at = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step; every request still in the engine fails with EngineStopped."""
        with self._admission:
            self._stopping.set()
            self._commands.put(_Wake())
        if self._thread.ident is None:  # never started: nobody else will answer what was submitted
            self._run()
        elif self._thread.is_alive():
            self._thread.join()

    def submit(self, request: GenerationRequest, on_event: Callable[[Event], None]) -> None:
        """Queues a request. `on_event` is called in the engine's thread, must not block and must not raise.

        Raises PromptTooLong if prompt and max_tokens exceed the context, ValueError for tokens outside the vocabulary.
        """
        self._check(request)
        self._put(_Submit(self._new_sequence(request, on_event)))

    def read(self, token_ids: Rows[int], layer: int) -> "Future[tuple[Tensor, Tensor]]":
        """Hidden states of a text under the base alone: behind a layer (T, H), and behind the final norm (T, H).

        Layers count from 1; 0 is the embedding. The text is computed beside what is generated and before prompts that
        wait. The future cannot be cancelled. ValueError for an empty text or a token outside the vocabulary.
        """
        if len(token_ids) > self.max_model_len:  # the cache may not hold it
            return self.run_on_device(partial(hidden_states, self.base, token_ids, layer))
        request = GenerationRequest(f"read {next(self._read_numbers)}", tuple(token_ids), SamplingParams(max_tokens=0))
        self._check(request)
        future: Future[tuple[Tensor, Tensor]] = Future()
        future.set_running_or_notify_cancel()

        def on_event(event: Event) -> None:
            match event:
                case StatesEvent(mid, last):
                    future.set_result((mid, last))
                case FailedEvent(error):
                    future.set_exception(error)

        self._put(_Submit(self._new_sequence(request, on_event, read_layer=layer)))
        return future

    def cancel(self, request_id: str) -> None:
        """Ends a request before its next step. A request that already ended is left alone."""
        self._put(_Cancel(request_id), quiet=True)

    def run_on_device(self, work: Callable[[], T]) -> "Future[T]":
        """Runs `work` in the engine's thread between two steps, with every stack off."""
        job = _Job(work, Future())
        self._put(job)
        return job.result

    def heartbeat_age_seconds(self) -> float:
        """Seconds since the loop last came round: under a second when idle, a step's length when busy.

        Infinite once the loop has ended.
        """
        return math.inf if self._stopping.is_set() else time.monotonic() - self._alive_at

    def snapshot(self) -> EngineSnapshot:
        """What the engine was doing after its latest step."""
        return self._snapshot

    def _check(self, request: GenerationRequest) -> None:
        num_prompt, max_tokens = len(request.prompt_ids), request.sampling.max_tokens
        if num_prompt == 0:
            raise ValueError("a prompt must have at least one token")
        if num_prompt + max_tokens > self.max_model_len:
            raise PromptTooLong(
                f"{num_prompt} prompt tokens and max_tokens {max_tokens} exceed the context of {self.max_model_len}"
            )
        vocabulary = self.base.text_config.vocab_size
        named = {*request.prompt_ids, *request.sampling.logit_bias}
        foreign = [token for token in named if not 0 <= token < vocabulary]
        if foreign:
            raise ValueError(f"token id {foreign[0]} is outside the vocabulary of {vocabulary}")

    def _new_sequence(
        self, request: GenerationRequest, on_event: Callable[[Event], None], *, read_layer: int | None = None
    ) -> Sequence:
        return new_sequence(
            request,
            on_event,
            tokenizer=self.base.tokenizer,
            eos_token_ids=self.base.eos_token_ids,
            read_layer=read_layer,
        )

    def _put(self, command: _Command, *, quiet: bool = False) -> None:
        with self._admission:
            if not self._stopping.is_set():
                self._commands.put(command)
            elif not quiet:
                raise self._end

    def _run(self) -> None:
        reason: EngineError = EngineStopped("the engine is shutting down")
        try:
            while not self._stopping.is_set():
                self._take_commands()
                self._run_one_job()
                rows = self._scheduler.schedule()
                if rows:
                    self._step(rows)
                self._beat()
        except BaseException as error:  # a panic in Rust is no Exception; nothing may end this thread unheard
            logger.exception("engine loop ended by an error")
            reason = EngineFailed(f"the engine's loop ended by an error: {error}")
        with self._admission:
            self._end = reason
            self._stopping.set()
        self._refuse_commands(reason)
        self._tell_all(reason)

    def _refuse_commands(self, reason: EngineError) -> None:
        """Tells everybody who is on the way. Nothing is handled any more: that may fail, and nobody hear of it."""
        while not self._commands.empty():
            match self._commands.get():
                case _Submit(sequence):
                    sequence.on_event(FailedEvent(reason))
                case _Job() as job:
                    job.refuse(reason)
        for job in self._jobs:
            job.refuse(reason)

    def _take_commands(self) -> None:
        """Handles every command there is; waits for the first if there is nothing to run."""
        has_work = self._scheduler.running or self._scheduler.waiting or self._jobs
        if not has_work and not self._stopping.is_set():
            try:
                self._handle(self._commands.get(timeout=IDLE_WAIT_SECONDS))
            except queue.Empty:
                self._check_integrity()
                return
        while True:
            try:
                self._handle(self._commands.get_nowait())
            except queue.Empty:
                return

    def _handle(self, command: _Command) -> None:
        match command:
            case _Submit(sequence):
                if sequence.request.request_id in self._sequences:
                    error = ValueError(f"request id {sequence.request.request_id!r} is in use")
                    sequence.on_event(FailedEvent(error))
                    return
                self._sequences[sequence.request.request_id] = sequence
                self._scheduler.add(sequence)
            case _Cancel(request_id):
                if (cancelled := self._sequences.get(request_id)) is not None:
                    self._finish(cancelled, "cancelled")
            case _Job():
                self._jobs.append(command)
            case _Wake():
                pass

    def _run_one_job(self) -> None:
        """One between two steps, so that a burst of them does not silence the running streams."""
        if self._jobs:
            self._runner.base_only()
            self._jobs.popleft().run()
            self._beat()

    def _step(self, rows: list[ScheduledRow]) -> None:
        try:
            output = self._runner.run(rows, self._scheduler.running)
            for row in rows:
                self._scheduler.advance(row)
            self._report_prompts(output)
            self._sample(output)
        except Exception as error:  # the engine outlives a step that fails, its requests do not
            logger.exception("step failed rows=%d", len(rows))
            self._fail_all(EngineFailed(f"a step of the engine failed: {error}"))
            self._failed_steps += 1
            if self._failed_steps == MAX_FAILED_STEPS:
                raise EngineFailed(f"{MAX_FAILED_STEPS} steps failed one after the other: {error}") from error
        else:
            self._failed_steps = 0
        self._steps += 1

    def _report_prompts(self, output: StepOutput) -> None:
        """Collects prompt logprobs chunk by chunk; tells each sequence whose prompt is complete."""
        for sequence, (mid, hidden) in output.states.items():
            if sequence.is_read_only:
                self._collect_states(sequence, mid, hidden)
                continue
            known = sequence.prompt_logprobs
            if not known:
                known.append(None)  # nothing predicts the first token
            num_top = sequence.request.sampling.prompt_logprobs or 0
            for part in hidden.split(PROMPT_LOGITS_ROWS):  # type: ignore[no-untyped-call]
                following = sequence.token_ids[len(known) : len(known) + len(part)]
                known += token_logprobs(self._runner.logits(part[: len(following)]), following, num_top)
        for sequence in output.sampled:
            if sequence.num_output == 0:
                wanted = sequence.request.sampling.prompt_logprobs is not None
                sequence.on_event(PromptEvent(tuple(sequence.prompt_logprobs) if wanted else None, sequence.num_reused))

    def _collect_states(self, sequence: Sequence, mid: Tensor, last: Tensor) -> None:
        sequence.states.append((mid, last))
        if sequence.num_pending == 0:
            mids, lasts = zip(*sequence.states, strict=True)
            event = StatesEvent(torch.cat(mids), torch.cat(lasts))
            self._forget(sequence)
            sequence.on_event(event)

    def _sample(self, output: StepOutput) -> None:
        """Extends every sampled sequence by one token, unless it wants none."""
        if not output.sampled:
            return
        logprobs = _RawLogprobs(output)
        tokens = sample(output.sampled_logits, [sequence.sampler for sequence in output.sampled])
        now = time.monotonic()
        for index, (sequence, token) in enumerate(zip(output.sampled, tokens, strict=True)):
            if sequence.first_token_at is None:
                sequence.first_token_at = now
            if sequence.request.sampling.max_tokens == 0:
                self._finish(sequence, "length")
                continue
            if (error := sequence.sampler.grammar_error) is not None:
                self._forget(sequence)
                sequence.on_event(FailedEvent(error))
                continue
            sequence.token_ids.append(token)
            event = sequence.detokenizer.push(token, logprobs.of(index, token))
            if event is not None:
                sequence.on_event(event)
            reason = self._finish_reason(sequence, token)
            if reason is not None:
                self._finish(sequence, reason)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        sampling = sequence.request.sampling
        ended = token in self.base.eos_token_ids and not sampling.ignore_eos
        if ended or sequence.detokenizer.stopped or sequence.sampler.is_complete:
            return "stop"
        return "length" if sequence.num_output >= sampling.max_tokens else None

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Lets go of everything that a sequence holds and sends its last events."""
        has_rest = reason != "cancelled" and not sequence.detokenizer.stopped
        rest = sequence.detokenizer.finish() if has_rest else None
        finished = sequence.finished(reason)
        self._forget(sequence)
        if rest is not None:
            sequence.on_event(rest)
        sequence.on_event(finished)

    def _fail_all(self, error: Exception) -> None:
        """Everybody is told before anything is let go of, because that may fail too where a step has."""
        for sequence in self._tell_all(error):
            self._forget(sequence)

    def _tell_all(self, error: Exception) -> list[Sequence]:
        """Ends every sequence for its caller, and returns those that were."""
        failed = list(self._sequences.values())
        self._sequences.clear()
        for sequence in failed:
            sequence.on_event(FailedEvent(error))
        return failed

    def _forget(self, sequence: Sequence) -> None:
        """Lets go of everything that a sequence holds. If that fails it is still known, and will be told."""
        self._scheduler.remove(sequence)
        if not self._scheduler.running:
            self._runner.release_pack()
        self._sequences.pop(sequence.request.request_id, None)

    def _check_integrity(self) -> None:
        """Once behind the latest step, when the engine has been idle for a while: it walks through the whole cache."""
        if self._checked_steps != self._steps:
            self._scheduler.check_integrity()
            self._checked_steps = self._steps

    def _beat(self) -> None:
        self._alive_at = time.monotonic()
        plan = self._scheduler
        self._snapshot = EngineSnapshot(
            len(plan.running), len(plan.waiting), plan.used_ratio, self._steps, plan.num_preempted
        )


class _RawLogprobs:
    """The logprobs of a step's rows, taken before sampling changes the logits; computed for rows that want them."""

    def __init__(self, output: StepOutput) -> None:
        self._num_top = [sequence.request.sampling.logprobs for sequence in output.sampled]
        self._logits = {
            index: output.sampled_logits[index : index + 1].clone()
            for index, num_top in enumerate(self._num_top)
            if num_top is not None
        }

    def of(self, index: int, token: int) -> TokenLogprob | None:
        """The logprob of a row's chosen token, or None if the row did not ask."""
        num_top = self._num_top[index]
        return None if num_top is None else token_logprobs(self._logits[index], [token], num_top)[0]
