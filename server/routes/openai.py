"""The endpoints that OpenAI's clients call, and their neighbours for routes and tokens. Knows HTTP and the service."""

from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.access import ApiRoute
from server.answer_grammar import read_form
from server.answers import AnswerShape, collect_answer
from server.app_state import deadline_of, service_of
from server.boundary import record_of
from server.disconnect import run_for_client
from server.errors import ModelNotFound
from server.generation import Generation
from server.jobs import read_chat_job, read_completion_job
from server.prompts import Prompt, PromptReader, last_user_text
from server.schemas import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RouteRequest,
    SamplingFields,
    TokenizeRequest,
)
from server.service import Job, Service
from server.shapes import ChatShape, CompletionShape, EchoedPrompt
from server.streams import AnswerStream

MIX_HEADER = "x-brainstacks-mix"

router = APIRouter(route_class=ApiRoute, tags=["openai"])


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatCompletionRequest) -> Response:
    """Answers a chat, whole or as a stream."""
    service = service_of(request)
    read = partial(read_chat_job, service, body, service.choose(body.model, body.brainstacks))

    def shape_of(generation: Generation) -> AnswerShape:
        return ChatShape(
            model=body.model or service.served_name,
            wants_logprobs=bool(body.logprobs),
            text=service.token_text,
            has_tools=body.may_call_tools,
        )

    return await _answer(request, body, body.n or 1, read, shape_of)


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest) -> Response:
    """Continues one or several texts, whole or as a stream."""
    service = service_of(request)
    read = partial(read_completion_job, service, body, service.choose(body.model, body.brainstacks))

    def shape_of(generation: Generation) -> AnswerShape:
        return CompletionShape(
            model=body.model or service.served_name,
            wants_logprobs=body.logprobs is not None,
            text=service.token_text,
            echoes=_echoes(service, body, generation) if body.echo else None,
        )

    num_prompts, num_choices = len(body.prompts), body.n or 1
    asked_by = "n" if num_choices > 1 else "prompt"
    return await _answer(request, body, num_prompts * num_choices, read, shape_of, asked_by=asked_by)


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """The routed model, the base alone, and each domain alone."""
    return {"object": "list", "data": [_model(name) for name in service_of(request).models()]}


@router.get("/v1/models/{model:path}")
async def show_model(request: Request, model: str) -> dict[str, Any]:
    """One model."""
    if model not in service_of(request).models():
        raise ModelNotFound(f"the model {model!r} does not exist", param="model")
    return _model(model)


@router.post("/v1/route")
async def route(request: Request, body: RouteRequest) -> dict[str, Any]:
    """Scores and mix of a text, and the policy that made one of the other. Nothing is generated."""
    service = service_of(request)
    service.choose(body.model, None)
    text = body.prompt if body.prompt is not None else last_user_text(body.messages or [])
    route, mix = await run_for_client(request.receive, service.route(text), deadline=deadline_of(request))
    router = service.routing.router
    return {
        "object": "route",
        "scores": dict(route.scores),
        "mix": mix,
        "gap": route.gap,
        "stale": [name for name in service.stale_domains() if name in route.scores],
        "policy": None if router is None else asdict(router.policy),
    }


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeRequest) -> dict[str, Any]:
    """Text or messages -> token ids, as a completion would read them. Admitted as a sequence."""
    service = service_of(request)
    with service.admission.admit(1):
        prompt = await _read(service.reader, body)
    return {"tokens": prompt.token_ids, "count": len(prompt.token_ids), "max_model_len": service.reader.max_model_len}


async def _read(reader: PromptReader, body: TokenizeRequest) -> Prompt:
    if body.messages is not None:
        return await reader.read_chat(
            body.messages,
            functions=read_form(None, body.tools, None, parallel_calls=True).functions,
            add_generation_prompt=body.add_generation_prompt,
            add_special_tokens=bool(body.add_special_tokens),
        )
    add_special_tokens = True if body.add_special_tokens is None else body.add_special_tokens
    return (await reader.read_texts([body.prompt or ""], add_special_tokens=add_special_tokens))[0]


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest) -> dict[str, str]:
    """Token ids -> text. Admitted as a sequence."""
    service = service_of(request)
    with service.admission.admit(1):
        return {"prompt": await service.reader.decode_long(body.tokens)}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    """Special tokens and chat template, for clients that tokenize here. Named as vLLM has it."""
    return service_of(request).reader.tokenizer_info()


async def _answer(
    request: Request,
    body: SamplingFields,
    num_sequences: int,
    read: Callable[[], Awaitable[Job]],
    shape_of: Callable[[Generation], AnswerShape],
    *,
    asked_by: str = "n",
) -> Response:
    """Admits, reads, routes, leases, generates; all of it only as long as the client is there."""
    record, deadline = record_of(request), deadline_of(request)
    begin = service_of(request).begin(num_sequences, read, asked_by=asked_by)
    generation = await run_for_client(request.receive, begin, deadline=deadline)
    record.generation = generation
    headers = {MIX_HEADER: generation.shown_mix}
    with ExitStack() as undo:
        undo.callback(generation.close)
        shape = shape_of(generation)
        if body.stream:
            undo.pop_all()
            return AnswerStream(
                generation,
                shape,
                record=record,
                wants_usage=body.wants_usage_chunk,
                wants_running_usage=body.wants_running_usage,
                deadline=deadline,
                headers=headers,
            )
        answer = await run_for_client(request.receive, collect_answer(generation, shape), deadline=deadline)
    return Response(answer, media_type="application/json", headers={MIX_HEADER: generation.shown_mix})


def _echoes(service: Service, body: CompletionRequest, generation: Generation) -> list[EchoedPrompt]:
    echoes = []
    for given, run in zip(body.prompts, generation.runs, strict=True):
        text = given if isinstance(given, str) else service.reader.decode(given)
        echoes.extend([EchoedPrompt(text, run.plan.token_ids)] * len(run.plan.samplings))
    return echoes


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "brainstacks"}
