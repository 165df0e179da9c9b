"""What OpenAI's own client checks and what its users rely on, asked of the running server with the real base."""

import asyncio
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from tests.e2e.server_process import ADMIN_KEY, ServerProcess

pytestmark = pytest.mark.e2e

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
API_KEY = "user-key"
ROWS = 4  # sequences that the server admits; one more is too many
QUESTION: Any = [{"role": "user", "content": "Name three animals that live in the forest, and what they eat."}]
WORDS = "日本語 🦊🦊 é ẞ \u0928\u092e\u0938\u094d\u0924\u0947"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(DEMO_STORE, folder / "store")
    settings: dict[str, object] = {
        "server__api_keys": API_KEY,
        "server__max_queue": 0,
        "server__max_body_bytes": 2**20,
        "engine__max_batch_rows": ROWS,
    }
    with ServerProcess(folder / "store", folder / "log", **settings) as process:
        yield process


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    """The base alone: these tests are not about mixes."""
    return next(model.id for model in client.models.list() if model.id.endswith(":base"))


def ask(client: OpenAI, model: str, **fields: Any) -> openai.types.chat.ChatCompletion:
    """A greedy answer of some tokens, unless other fields are given."""
    given = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    answer: openai.types.chat.ChatCompletion = client.chat.completions.create(model=model, **given)
    return answer


def stream(client: OpenAI, model: str, **fields: Any) -> list[ChatCompletionChunk]:
    """The same as a stream."""
    given = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **fields}
    return list(client.chat.completions.create(model=model, stream=True, **given))


def text_of(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def raised(client: OpenAI, model: str, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, model, **fields)
    return caught.value


def test_each_status_is_the_clients_own_class_and_carries_the_request_id(
    server: ServerProcess, client: OpenAI, model: str
) -> None:
    admin = client.with_options(base_url=server.url, api_key=ADMIN_KEY)

    def register() -> object:
        body = {"stacks": [{"path": "x.safetensors"}]}
        return admin.put("/admin/domains/math", cast_to=httpx.Response, body=body)

    calls: list[tuple[Any, type[openai.APIStatusError], int, str]] = [
        (lambda: ask(client, model, messages=[]), openai.BadRequestError, 400, "invalid_value"),
        (lambda: ask(client, model, temperature=9), openai.BadRequestError, 400, "invalid_value"),
        (lambda: ask(client, model, max_tokens=10**6), openai.BadRequestError, 400, "context_length_exceeded"),
        (lambda: ask(client.with_options(api_key="wrong"), model), openai.AuthenticationError, 401, "invalid_api_key"),
        (lambda: ask(client, "gpt-4o"), openai.NotFoundError, 404, "model_not_found"),
        (lambda: client.models.retrieve("gpt-4o"), openai.NotFoundError, 404, "model_not_found"),
        (lambda: client.embeddings.create(model=model, input="x"), openai.NotFoundError, 404, "not_found"),
        (register, openai.PermissionDeniedError, 403, "import_disabled"),
        (
            lambda: ask(client, model, messages=[{"role": "user", "content": "x" * 2**21}]),
            openai.APIStatusError, 413, "request_too_large",
        ),
    ]  # fmt: skip
    for call, cls, status, code in calls:
        with pytest.raises(cls) as caught:
            call()
        error = caught.value
        assert (error.status_code, error.code) == (status, code)
        assert error.type in ("invalid_request_error", "authentication_error", "permission_error")
        assert isinstance(error.body, dict)  # unwrapped: the client found `error` in it
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.request_id is not None
        assert error.request_id.startswith("req-")
    assert raised(client, model, messages=[]).param == "messages"
    assert raised(client, "gpt-4o").param == "model"


def test_bad_values_of_known_fields_are_named_and_unknown_fields_are_tolerated(client: OpenAI, model: str) -> None:
    wrong: dict[str, Any] = {
        "top_p": 2, "n": 0, "seed": "x", "stop": [1], "logit_bias": {"5": 999}, "presence_penalty": -3,
        "max_completion_tokens": 0, "stream_options": {"include_usage": True}, "top_logprobs": 2,
    }  # fmt: skip
    for name, value in wrong.items():
        error = raised(client, model, **{name: value})
        assert isinstance(error, openai.BadRequestError)
        assert name in error.message
    extra = {"guided_choice": ["a"], "ignore_me": {"a": [None]}}
    known: Any = {"user": "me", "store": False, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert ask(client, model, extra_body=extra, **known).choices[0].message.content == (
        ask(client, model).choices[0].message.content
    )


def test_request_id_is_the_servers_or_the_callers(client: OpenAI, model: str) -> None:
    first, second = ask(client, model, max_tokens=1), ask(client, model, max_tokens=1)
    assert first._request_id is not None
    assert first._request_id != second._request_id
    assert ask(client, model, max_tokens=1, extra_headers={"x-request-id": "mine-7"})._request_id == "mine-7"


def test_full_house_is_a_rate_limit_that_the_client_waits_out(client: OpenAI, model: str) -> None:
    fields = {"n": ROWS, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    running = client.chat.completions.create(model=model, messages=QUESTION, stream=True, **fields)  # type: ignore[call-overload]
    next(iter(running))
    error = raised(client, model)
    assert isinstance(error, openai.RateLimitError)
    assert (error.code, error.response.headers["retry-after"]) == ("queue_full", "1")
    patient = client.with_options(max_retries=20)
    began = time.monotonic()
    answer = patient.chat.completions.with_raw_response.create(model=model, messages=QUESTION, max_tokens=1)
    assert answer.retries_taken >= 1
    assert time.monotonic() - began >= 1  # as the header said
    running.close()


def test_conflict_is_not_tried_again(server: ServerProcess, client: OpenAI) -> None:
    admin = client.with_options(base_url=server.url, api_key=ADMIN_KEY, max_retries=3)

    def num_conflicts() -> float:
        return server.metric("brainstacks_requests_total", endpoint="/admin/domains/{name}", status="412")

    before = num_conflicts()
    with pytest.raises(openai.APIStatusError) as caught:
        admin.delete("/admin/domains/math", cast_to=httpx.Response, options={"headers": {"if-match": "999"}})
    assert caught.value.status_code == 412
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert num_conflicts() == before + 1


@pytest.mark.parametrize("wants_usage", [False, True])
def test_stream_has_one_id_a_role_first_and_one_terminal_chunk(client: OpenAI, model: str, wants_usage: bool) -> None:
    options: Any = {"stream_options": {"include_usage": True}} if wants_usage else {}
    chunks = stream(client, model, **options)
    assert {(c.id, c.created, c.model, c.object) for c in chunks} == {
        (chunks[0].id, chunks[0].created, model, "chat.completion.chunk")
    }
    assert chunks[0].id.startswith("chatcmpl-")
    if wants_usage:
        last = chunks.pop()
        assert last.choices == []
        assert last.usage is not None
        assert last.usage.completion_tokens == 12
        assert last.usage.total_tokens == last.usage.prompt_tokens + 12
        assert all("usage" in chunk.model_fields_set for chunk in chunks)
    else:
        assert not any("usage" in chunk.model_fields_set for chunk in chunks)
    assert all(chunk.usage is None for chunk in chunks)
    choices = [chunk.choices[0] for chunk in chunks]
    assert choices[0].delta.role == "assistant"
    assert all(choice.delta.role is None for choice in choices[1:])
    assert all(choice.finish_reason is None for choice in choices[:-1])
    assert choices[-1].finish_reason == "length"
    assert choices[-1].delta.model_dump(exclude_unset=True) == {}
    assert text_of(chunks) == ask(client, model).choices[0].message.content


def test_events_are_lines_that_end_with_done(server: ServerProcess, model: str) -> None:
    body = {"model": model, "messages": QUESTION, "max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {API_KEY}"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert events.pop() == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_choices_differ_and_a_seed_repeats_them(client: OpenAI, model: str) -> None:
    fields = {"n": 3, "temperature": 1.2, "seed": 11}
    first, again = ask(client, model, **fields), ask(client, model, **fields)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert first.usage is not None
    assert first.usage.completion_tokens == 36
    chunks = stream(client, model, **fields)
    assert [text_of(chunks, index) for index in range(3)] == texts
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason is not None]
    assert sorted(finished) == [0, 1, 2]
    assert ask(client, model, **{**fields, "seed": 12}).choices[0].message.content != texts[0]


def test_stop_strings_end_the_answer_and_are_not_in_it(client: OpenAI, model: str) -> None:
    whole = ask(client, model, max_tokens=24, logprobs=True).choices[0]
    assert whole.message.content is not None
    assert whole.logprobs is not None
    text, tokens = whole.message.content, [entry.token for entry in whole.logprobs.content or []]
    # The end of a token and the beginning of the next, which no single token has, where it first occurs.
    joints = [(tokens[place] + tokens[place + 1], len(tokens[place])) for place in range(4, len(tokens) - 1)]
    split = next(both[cut - 2 : cut + 2] for both, cut in joints if cut >= 3 and both[cut - 2 : cut + 2] in text)
    assert not any(split in token for token in tokens)
    for stop in (split, ["never said", split]):
        cut = ask(client, model, max_tokens=24, stop=stop).choices[0]
        assert (cut.message.content, cut.finish_reason) == (text.partition(split)[0], "stop")
        chunks = stream(client, model, max_tokens=24, stop=stop)
        assert text_of(chunks) == cut.message.content
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_tell_every_token_and_its_likeliest_rivals(client: OpenAI, model: str) -> None:
    choice = ask(client, model, logprobs=True, top_logprobs=3).choices[0]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 12
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == choice.message.content
    for entry in content:
        rivals = [rival.logprob for rival in entry.top_logprobs]
        assert len(rivals) == 3
        assert rivals == sorted(rivals, reverse=True)
        assert entry.logprob == rivals[0] <= 0  # greedy
        assert entry.token == entry.top_logprobs[0].token
    streamed = stream(client, model, logprobs=True, top_logprobs=3)
    parts = [part.choices[0].logprobs for part in streamed]
    assert [entry for part in parts if part is not None for entry in part.content or []] == content
    plain = ask(client, model, logprobs=True).choices[0].logprobs
    assert plain is not None
    assert all(entry.top_logprobs == [] for entry in plain.content or [])
    assert ask(client, model).choices[0].logprobs is None


def test_logit_bias_forbids_and_forces(server: ServerProcess, client: OpenAI, model: str) -> None:
    headers = {"authorization": f"Bearer {API_KEY}"}
    said = ask(client, model, max_tokens=1).choices[0].message.content
    body = {"prompt": said, "add_special_tokens": False}
    (first,) = server.http.post("/tokenize", json=body, headers=headers).json()["tokens"]
    (fox,) = server.http.post("/tokenize", json={**body, "prompt": " forest"}, headers=headers).json()["tokens"]
    assert ask(client, model, max_tokens=1, logit_bias={first: -100}).choices[0].message.content != said
    assert ask(client, model, max_tokens=3, logit_bias={fox: 100}).choices[0].message.content == " forest" * 3


def test_token_limit_has_an_old_and_a_new_name(client: OpenAI, model: str) -> None:
    for fields in ({"max_completion_tokens": 5, "max_tokens": None}, {"max_tokens": 5}):
        answer = ask(client, model, **fields)
        assert answer.usage is not None
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (5, "length")
    ask(client, model, max_tokens=5, max_completion_tokens=5)
    assert isinstance(raised(client, model, max_tokens=5, max_completion_tokens=6), openai.BadRequestError)


def test_content_parts_are_their_text_and_a_developer_is_a_system(client: OpenAI, model: str) -> None:
    question = QUESTION[0]["content"]
    parts = [{"type": "text", "text": question[:20]}, {"type": "text", "text": question[20:]}]
    system = {"role": "system", "content": "Answer in one word."}
    plain = ask(client, model, messages=[system, *QUESTION])
    same = ask(client, model, messages=[{**system, "role": "developer"}, {"role": "user", "content": parts}])
    assert same.choices[0].message.content == plain.choices[0].message.content
    assert same.usage is not None
    assert plain.usage is not None
    assert same.usage.prompt_tokens == plain.usage.prompt_tokens
    picture: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    assert raised(client, model, messages=[{"role": "user", "content": picture}]).code == "unsupported_parameter"


class Said(BaseModel):
    words: Literal["日本語 🦊🦊 é ẞ \u0928\u092e\u0938\u094d\u0924\u0947"]


def test_characters_of_several_tokens_come_whole(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=QUESTION, response_format=Said, max_completion_tokens=120
    ) as events:
        deltas = [event.delta for event in events if event.type == "content.delta"]
        parsed = events.get_final_completion().choices[0].message.parsed
    assert parsed is not None
    assert parsed.words == WORDS
    assert len(deltas) > 5
    assert not any("\ufffd" in delta for delta in deltas)
    assert Said.model_validate_json("".join(deltas)) == parsed


def test_answer_that_is_cut_is_an_error_of_the_clients_stream(client: OpenAI, model: str) -> None:
    with (
        pytest.raises(openai.LengthFinishReasonError),
        client.chat.completions.stream(model=model, messages=QUESTION, response_format=Said, max_tokens=2) as events,
    ):
        events.until_done()


def test_completions_continue_echo_and_count(client: OpenAI, model: str) -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0, echo=True, logprobs=2)
    choice = answer.choices[0]
    assert answer.object == "text_completion"
    assert choice.text.startswith(prompt)
    assert choice.logprobs is not None
    assert answer.usage is not None
    counted = answer.usage.total_tokens
    for values in (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset):
        assert values is not None
        assert len(values) == counted
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None  # nothing stands before it
    assert "".join(choice.logprobs.tokens or []) == choice.text
    chunks = list(client.completions.create(model=model, prompt=prompt, max_tokens=4, temperature=0, stream=True))
    assert prompt + "".join(chunk.choices[0].text for chunk in chunks) == choice.text
    reasons: list[str | None] = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["length"]
    several = client.completions.create(model=model, prompt=[prompt, "Once upon"], max_tokens=2, temperature=0)
    assert [each.index for each in several.choices] == [0, 1]


def test_async_client_asks_and_streams_side_by_side_and_hangs_up(
    server: ServerProcess, client: OpenAI, model: str
) -> None:
    alone = ask(client, model).choices[0].message.content

    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=60) as asked:
            fields: Any = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 0}

            async def streamed() -> str:
                chunks = [chunk async for chunk in await asked.chat.completions.create(stream=True, **fields)]
                return text_of(chunks)

            async def whole() -> str:
                answer = await asked.chat.completions.create(**fields)
                return answer.choices[0].message.content or ""

            assert set(await asyncio.gather(streamed(), whole(), streamed())) == {alone}
            with pytest.raises(openai.NotFoundError):
                await asked.chat.completions.create(**{**fields, "model": "gpt-4o"})
            long: Any = {**fields, "max_tokens": 500, "extra_body": {"ignore_eos": True}}
            left = await asked.chat.completions.create(stream=True, **long)
            await anext(aiter(left))
            await left.close()

    asyncio.run(run())
    ends = time.monotonic() + 5
    while server.metric("brainstacks_requests_running"):
        assert time.monotonic() < ends, "a request runs on without its client"


def test_models_are_listed_and_found(client: OpenAI, model: str) -> None:
    models = client.models.list().data
    assert all((each.object, each.owned_by) == ("model", "brainstacks") for each in models)
    assert client.models.retrieve(model).id == model
