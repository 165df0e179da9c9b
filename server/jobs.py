"""Reads an OpenAI request into a job for the service. Knows field names and token limits, not how a job is run."""

import asyncio

from engine.errors import GrammarBusy, GrammarUnsupported
from engine.grammar import Grammar
from engine.types import SamplingParams
from server.answer_grammar import AnswerForm, read_form
from server.errors import InvalidRequest
from server.mixes import MixChoice
from server.schemas import ChatCompletionRequest, CompletionRequest, SamplingFields
from server.service import Job, Service

DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's reference of /v1/completions
COMPILE_SECONDS = 10.0
MAX_ID_DIGITS = 20
MAX_ALTERNATIVES = 2**22  # log probabilities that an answer may hold at once: half a gigabyte


async def read_chat_job(service: Service, request: ChatCompletionRequest, choice: MixChoice) -> Job:
    """Renders, counts and checks. Everything else that is wrong with the request is raised here."""
    form = _read_form(request)
    service.reader.check_length(sum(len(message.text) for message in request.messages), param="messages")
    prompt = await service.reader.read_chat(request.messages, functions=form.functions)
    max_tokens = service.reader.fit(prompt, request.token_limit, param="messages")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    _check_alternatives(request, logprobs, num_positions=0 if request.stream else max_tokens)
    if form.content is not None:  # alone first, so that a fault of it is not taken for one of the tools
        await _compile(service, AnswerForm(form.content, ()))
    grammar = await _compile(service, form)
    sampling = _read_sampling(service, request, max_tokens=max_tokens, logprobs=logprobs, grammar=grammar)
    return Job((prompt,), (sampling,), request.n or 1, choice)


async def read_completion_job(service: Service, request: CompletionRequest, choice: MixChoice) -> Job:
    """As for chat; each prompt is counted on its own."""
    texts = (text for text in request.prompts if isinstance(text, str))
    service.reader.check_length(max(map(len, texts), default=0), param="prompt")
    prompts = await service.reader.read_texts(request.prompts, add_special_tokens=request.add_special_tokens)
    samplings = []
    num_positions = 0
    for prompt in prompts:
        max_tokens = service.reader.fit(prompt, request.max_tokens, param="prompt")
        if request.max_tokens is None:
            max_tokens = min(max_tokens, DEFAULT_COMPLETION_TOKENS)
        num_positions += (0 if request.stream else max_tokens) + (len(prompt.token_ids) if request.echo else 0)
        samplings.append(
            _read_sampling(service, request, max_tokens=max_tokens, logprobs=request.logprobs, echo=request.echo)
        )
    _check_alternatives(request, request.logprobs, num_positions=num_positions)
    return Job(tuple(prompts), tuple(samplings), request.n or 1, choice)


def _check_alternatives(request: SamplingFields, logprobs: int | None, *, num_positions: int) -> None:
    """InvalidRequest for an answer of so many positions, in each choice, that could hold too many log probabilities."""
    if logprobs is not None and num_positions * (request.n or 1) * (1 + logprobs) > MAX_ALTERNATIVES:
        raise InvalidRequest(
            f"logprobs: the answer may have more than {MAX_ALTERNATIVES} log probabilities at once; "
            "ask for fewer tokens, choices or prompts",
            param="logprobs",
        )


def _read_form(request: ChatCompletionRequest) -> AnswerForm:
    parallel_calls = request.parallel_tool_calls is not False
    return read_form(request.response_format, request.tools, request.tool_choice, parallel_calls=parallel_calls)


async def _compile(service: Service, form: AnswerForm) -> Grammar | None:
    """Off the event loop and off the engine's thread. InvalidRequest, with the reason, for what cannot be followed."""
    if form.grammar is None:
        return None
    begun = service.grammars.compile(form.grammar)
    compiling = asyncio.wrap_future(begun)
    compiling.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if nobody waits any more
    try:
        async with asyncio.timeout(COMPILE_SECONDS):
            return await asyncio.shield(compiling)  # others may wait for the same grammar
    except GrammarUnsupported as error:
        raise InvalidRequest(f"{form.param}: {error}", param=form.param) from error
    except TimeoutError as error:
        if not begun.running():
            raise GrammarBusy(f"others' schemas have been compiled for {COMPILE_SECONDS:.0f} seconds") from error
        raise InvalidRequest(
            f"{form.param}: the schema takes longer than {COMPILE_SECONDS:.0f} seconds to compile", param=form.param
        ) from error


def _read_sampling(
    service: Service,
    request: SamplingFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    echo: bool | None = False,
    grammar: Grammar | None = None,
) -> SamplingParams:
    """OpenAI's defaults where a field is missing or null."""

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    logit_bias = _read_logit_bias(service, request)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=request.min_tokens or 0,
            temperature=given(request.temperature, 1.0),
            top_p=max(given(request.top_p, 1.0), 1e-9),  # OpenAI allows 0, which leaves the likeliest token
            top_k=max(request.top_k or 0, 0),  # vLLM writes "off" as -1
            seed=request.seed,
            stop=request.stop_strings,
            ignore_eos=bool(request.ignore_eos),
            repetition_penalty=given(request.repetition_penalty, 1.0),
            presence_penalty=given(request.presence_penalty, 0.0),
            frequency_penalty=given(request.frequency_penalty, 0.0),
            logit_bias=logit_bias,
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
            grammar=grammar,
        )
    except ValueError as error:
        raise InvalidRequest(str(error), param=str(error).split(maxsplit=1)[0]) from error


def _read_logit_bias(service: Service, request: SamplingFields) -> dict[int, float]:
    biases = {}
    for key, bias in (request.logit_bias or {}).items():
        if not key.isdecimal() or len(key) > MAX_ID_DIGITS:
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is not a token id", param="logit_bias")
        service.reader.check_token_id(int(key), param="logit_bias")
        biases[int(key)] = bias
    return biases
