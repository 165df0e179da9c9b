"""What is refused, with which status, and in OpenAI's shape."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import TypeAdapter, ValidationError

from engine.errors import EngineFailed
from server.schemas import SeveralPrompts, TokenIds
from tests.servers import LiveServer, run_live_server, wait_until

MESSAGES = [{"role": "user", "content": "hello"}]


def refuse(server: LiveServer, path: str, body: Any, status: int) -> dict[str, Any]:
    """The error of an answer that must have this status."""
    with server.client() as client:
        response = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "hello"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"seed": 2**70}, "seed"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {str(number): 1 for number in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"1" * 5000: 1}}, "logit_bias"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"brainstacks": {"mix": {"math": 1.5}}}, "brainstacks.mix.math"),
        ({"brainstacks": {"mode": "most"}}, "brainstacks.mode"),
        ({"brainstacks": {"modus": "base"}}, "brainstacks.modus"),
    ],
)
def test_bad_value_is_named(shared_server: LiveServer, fields: dict[str, Any], param: str) -> None:
    error = refuse(shared_server, "/v1/chat/completions", {"messages": MESSAGES, **fields}, 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert param.rpartition(".")[2] in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [0] * 8192}, "messages.0"),
        ("/v1/chat/completions", {"messages": [0] * 8193}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 8191}]}, "messages.0.content"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [0] * 8192}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [0] * 8192}]}, "messages"),
        ("/v1/completions", {"prompt": [1] * 200_000 + [-1]}, "prompt"),
        ("/v1/completions", {"prompt": [[1], *[[-1]] * 2000]}, "prompt"),
        ("/v1/completions", {"prompt": ["x"] * 2049}, "prompt"),
        ("/detokenize", {"tokens": [""] * 200_000}, "tokens.0"),
    ],
)
def test_one_fault_of_many_is_enough(shared_server: LiveServer, path: str, body: dict[str, Any], param: str) -> None:
    """A report on each would take seconds, in which nobody is answered."""
    error = refuse(shared_server, path, body, 400)
    assert (error["param"], error["message"].count(";") < 2) == (param, True)


def test_a_list_is_left_at_its_first_fault() -> None:
    """Also those of which a union tells one sentence only."""
    with pytest.raises(ValidationError) as error:
        TypeAdapter(TokenIds).validate_python([1] + [-1] * 1000)
    assert error.value.error_count() == 1
    several = Annotated[list[TokenIds], SeveralPrompts]
    with pytest.raises(ValidationError) as error:
        TypeAdapter(several).validate_python([[-1]] * 1000)
    assert error.value.error_count() == 1


def test_more_messages_than_the_context_has_tokens_are_refused_unread(shared_server: LiveServer) -> None:
    error = refuse(shared_server, "/v1/chat/completions", {"messages": MESSAGES * 401}, 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "maximum context length is 400 tokens, the request has 401 messages" in error["message"]


@pytest.mark.parametrize(("path", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt")])
def test_what_no_tokens_could_make_short_enough_is_refused_uncounted(
    shared_server: LiveServer, path: str, param: str
) -> None:
    """Four times the context of 400, of the longest token, which has seven characters."""

    def body(num_characters: int) -> dict[str, Any]:
        texts = ["x", "x" * (num_characters - 1)] if param == "messages" else ["x", "x" * num_characters]
        return {param: texts if param == "prompt" else [{"role": "user", "content": text} for text in texts]}

    error = refuse(shared_server, path, body(4 * 7 * 400 + 1), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert "maximum context length is 400 tokens, the request has 11201 characters" in error["message"]
    assert "characters" not in refuse(shared_server, path, body(4 * 7 * 400), 400)["message"]
    with shared_server.client() as client:
        assert client.post("/tokenize", json={"prompt": "x" * 20_000}).json()["count"] == 20_000


def test_more_log_probabilities_than_memory_should_hold_are_refused(
    shared_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.MAX_ALTERNATIVES", 2 * 3 * (4 + 5) * 6)
    body = {"prompt": ["four", "four"], "n": 3, "max_tokens": 5, "logprobs": 5, "echo": True}
    with shared_server.client() as client:
        assert client.post("/v1/completions", json=body).status_code == 200
    for more in ({"prompt": ["four", "fives"]}, {"max_tokens": 6}, {"logprobs": 6}, {"n": 4}):
        assert refuse(shared_server, "/v1/completions", body | more, 400)["param"] == "logprobs"
    chat = {"messages": MESSAGES, "n": 3, "max_tokens": 18, "logprobs": True, "top_logprobs": 11}
    assert refuse(shared_server, "/v1/chat/completions", chat, 400)["param"] == "logprobs"
    assert body.pop("logprobs")  # without them the same is fine
    with shared_server.client() as client:
        assert client.post("/v1/chat/completions", json=chat | {"top_logprobs": 5}).status_code == 200
        assert (
            client.post("/v1/chat/completions", json=chat | {"stream": True}).status_code == 200
        )  # holds none of them
        assert client.post("/v1/completions", json=body | {"max_tokens": 300}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"top_logprobs": 2},
        {"stream_options": {"include_usage": True}},
        {"stop": ["x", ""]},
        {"max_tokens": 3, "max_completion_tokens": 4},
        {"brainstacks": {"mode": "base", "mix": {}}},
    ],
)
def test_values_that_contradict_each_other_are_refused(shared_server: LiveServer, fields: dict[str, Any]) -> None:
    refuse(shared_server, "/v1/chat/completions", {"messages": MESSAGES, **fields}, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    ],
)
def test_what_cannot_be_honoured_is_refused_as_unsupported(
    shared_server: LiveServer, fields: dict[str, Any], param: str
) -> None:
    error = refuse(shared_server, "/v1/chat/completions", {"messages": MESSAGES, **fields}, 400)
    assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    assert "not supported" in error["message"]


def test_neutral_values_of_unsupported_fields_are_fine(shared_server: LiveServer) -> None:
    neutral: dict[str, Any] = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "audio": None,
    }
    assert shared_server.chat(**neutral).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [99999]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "end"}, "suffix"),
    ],
)
def test_bad_completion_field_is_named(shared_server: LiveServer, fields: dict[str, Any], param: str) -> None:
    assert refuse(shared_server, "/v1/completions", {"prompt": "a", **fields}, 400)["param"] == param


def test_best_of_is_refused(shared_server: LiveServer) -> None:
    error = refuse(shared_server, "/v1/completions", {"prompt": "a", "best_of": 2}, 400)
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("model", ["gpt-4", "tiny:history", "tiny:", ":math", "other:math"])
def test_unknown_model_is_not_found(shared_server: LiveServer, model: str) -> None:
    error = refuse(shared_server, "/v1/chat/completions", {"messages": MESSAGES, "model": model}, 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_too_long_prompt_is_refused_with_the_numbers(shared_server: LiveServer) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x" * 500}]}
    error = refuse(shared_server, "/v1/chat/completions", body, 400)
    assert error["code"] == "context_length_exceeded"
    assert "400" in error["message"]
    assert str(500 + len("<|user|>\n<|assistant|>")) in error["message"]


def test_answer_that_would_not_fit_is_refused_with_the_numbers(shared_server: LiveServer) -> None:
    error = refuse(shared_server, "/v1/completions", {"prompt": "abc", "max_tokens": 398}, 400)
    assert error["code"] == "context_length_exceeded"
    assert "3 in the prompt and 398 in the completion" in error["message"]


@pytest.mark.parametrize("body", [b"{", b"", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_broken_body_is_a_400(shared_server: LiveServer, body: bytes) -> None:
    with shared_server.client() as client:
        response = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": [{"type": "\ud800", "text": "hello"}]}]},
        {"messages": MESSAGES, "tools": [{"type": "\ud800", "function": {"name": "f"}}]},
        {"messages": MESSAGES, "\ud800": 1, "tool_choice": {"type": "\ud800"}},
    ],
)
def test_half_a_character_in_a_name_of_a_kind_is_a_400(shared_server: LiveServer, fields: dict[str, Any]) -> None:
    refuse(shared_server, "/v1/chat/completions", fields, 400)


def test_unknown_path_and_method_have_the_same_shape(shared_server: LiveServer) -> None:
    with shared_server.client() as client:
        for response, status in ((client.get("/v1/nothing"), 404), (client.delete("/v1/chat/completions"), 405)):
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_error_that_nobody_foresaw_tells_nothing_of_the_inside(server: LiveServer) -> None:
    server.engine.refuse_with = RuntimeError("secret detail")
    response = server.chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert "x-request-id" in response.headers


def test_large_body_is_refused_while_it_comes(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"max_body_bytes": 1000}}) as server:
        response = server.chat("x" * 1000)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_full_queue_answers_429(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"max_queue": 0}}) as server:
        server.engine.may_run.clear()
        with server.client() as client:
            body = {"messages": MESSAGES, "n": 4, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body):
                wait_until(lambda: server.service.admission.admitted == 4, what="the house is full")
                refused = server.chat()
                assert refused.status_code == 429
                assert refused.headers["retry-after"] == "1"
                assert refused.json()["error"]["type"] == "rate_limit_error"
                server.engine.may_run.set()
        wait_until(lambda: server.service.admission.admitted == 0, what="the house is empty")
        assert server.chat().status_code == 200


def test_more_choices_than_the_house_holds_are_refused_for_good(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"max_queue": 0}}) as server:
        error = refuse(server, "/v1/chat/completions", {"messages": MESSAGES, "n": 5}, 400)
    assert error["param"] == "n"


def test_too_many_prompts_are_refused_before_any_is_read(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"max_queue": 0}}) as server:
        too_long = "x" * 500
        error = refuse(server, "/v1/completions", {"prompt": [too_long] * 3, "n": 2}, 400)
        assert (error["param"], "6 sequences" in error["message"]) == ("n", True)
        assert refuse(server, "/v1/completions", {"prompt": [too_long] * 5}, 400)["param"] == "prompt"
        ticket = server.service.admission.admit(4)
        assert refuse(server, "/v1/completions", {"prompt": too_long}, 429)["code"] == "queue_full"
        assert refuse(server, "/v1/chat/completions", {"messages": MESSAGES}, 429)["code"] == "queue_full"
        ticket.give_back()


def test_route_is_refused_when_the_house_is_full(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"max_queue": 0}}) as server:
        ticket = server.service.admission.admit(4)
        assert refuse(server, "/v1/route", {"prompt": "math=0.9"}, 429)["code"] == "queue_full"
        ticket.give_back()
        with server.client() as client:
            assert client.post("/v1/route", json={"prompt": "math=0.9"}).status_code == 200
        assert server.service.admission.admitted == 0


@pytest.mark.parametrize("stream", [False, True])
def test_failure_of_the_engine_tells_nothing_of_its_inside(server: LiveServer, stream: bool) -> None:
    server.engine.fail_with = EngineFailed("a step of the engine failed: mat1 and mat2 in /secret/place.py")
    text = server.chat(stream=stream).text
    assert '"code":"engine_failed"' in text
    assert "secret" not in text


def test_domain_that_cannot_be_loaded_is_named_without_its_place(server: LiveServer) -> None:
    damaged, gone = (server.registry.stack_path(server.registry.domain(n).stacks[0]) for n in ("math", "code"))
    damaged.write_bytes(damaged.read_bytes()[:-8] + b"\0" * 8)
    gone.unlink()
    for domain in ("math", "code"):
        response = server.chat(model=f"tiny:{domain}")
        assert response.json()["error"]["code"] == "load_failed"
        assert domain in response.json()["error"]["message"]
        assert str(server.registry.path) not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_request_that_takes_too_long_is_ended(tmp_path: Path, stream: bool) -> None:
    with run_live_server(tmp_path, settings={"server": {"request_timeout_seconds": 1.5}}) as server:
        assert server.chat().status_code == 200  # so that route and load are known when time counts
        server.engine.may_decode.clear()
        response = server.chat(stream=stream)
        if stream:
            assert '"code":"request_timed_out"' in response.text
        else:
            assert response.status_code == 504
            assert response.headers["x-should-retry"] == "false"
        wait_until(lambda: len(server.engine.cancelled) == 1, what="the engine was told")


def test_api_key_is_asked_for_before_anything_is_read(tmp_path: Path) -> None:
    with run_live_server(tmp_path, settings={"server": {"api_keys": ["one", "two"]}}) as server:
        for key, status in ((None, 401), ("three", 401), ("one", 200), ("two", 200)):
            with server.client(key) as client:
                assert client.get("/v1/models").status_code == status
                broken = client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
                assert broken.status_code == (401 if status == 401 else 400)
        with server.client() as client:
            assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
            for open_path in ("/health/live", "/health/ready", "/metrics", "/"):
                assert client.get(open_path).status_code == 200
