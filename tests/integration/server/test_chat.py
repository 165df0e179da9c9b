"""The chat endpoint as OpenAI's clients check it."""

import json
from typing import Any

import openai
import pytest

from engine.errors import EngineFailed
from tests.servers import ANSWER, LiveServer


def chunks_of(server: LiveServer, **fields: Any) -> list[dict[str, Any]]:
    """The JSON events of a streamed chat; asserts that [DONE] ends it."""
    text = server.chat(stream=True, **fields).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_whole_answer_has_openai_shape(server: LiveServer) -> None:
    answer = server.chat("hello").json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    prompt_tokens = len("<|user|>hello\n<|assistant|>")
    completion_tokens = len(ANSWER.encode())
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_stream_opens_with_the_role_and_closes_with_an_empty_delta(server: LiveServer) -> None:
    chunks = chunks_of(server)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_no_chunk_holds_half_a_character(server: LiveServer) -> None:
    contents = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks_of(server)]
    assert "\ufffd" not in "".join(contents)
    assert "é" in contents


def test_usage_comes_in_a_last_chunk_if_asked_for(server: LiveServer) -> None:
    chunks = chunks_of(server, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(ANSWER.encode())


def test_usage_so_far_is_on_every_chunk_if_asked_for(server: LiveServer) -> None:
    chunks = chunks_of(server, stream_options={"include_usage": True, "continuous_usage_stats": True})
    written = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert written[0] == 0
    assert written == sorted(written)
    assert written[-1] == len(ANSWER.encode())
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len("<|user|>hello\n<|assistant|>")}
    without = chunks_of(server, stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in without)


def test_extension_rides_in_the_chunk_with_the_finish_reason(server: LiveServer) -> None:
    chunks = chunks_of(server, messages=[{"role": "user", "content": "math=0.9"}])
    assert ["brainstacks" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    report = chunks[-1]["brainstacks"]
    assert report["scores"] == {"chat": 0.01, "code": 0.01, "math": 0.9}
    assert report["mix"] == {"chat": 0.2, "math": 0.9}
    assert sorted(report["cold"]) == ["chat", "math"]
    assert set(report["seconds"]) == {"queue", "route", "page_in", "prefill", "decode"}
    assert "dropped" not in report


@pytest.mark.parametrize("stream", [False, True])
def test_mix_is_in_a_header(server: LiveServer, stream: bool) -> None:
    assert server.chat("math=0.93", stream=stream).headers["x-brainstacks-mix"] == "chat=0.20,math=0.93"
    base_only = server.chat("math=0.93", stream=stream, model="tiny:base")
    assert base_only.headers["x-brainstacks-mix"] == "base"


def test_choices_are_seeded_apart_and_share_one_prompt(server: LiveServer) -> None:
    answer = server.chat("hello", n=3, seed=7).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert sorted(request.sampling.seed or 0 for request in server.engine.submitted) == [7, 8, 9]
    assert answer["usage"]["prompt_tokens"] == len("<|user|>hello\n<|assistant|>")
    assert answer["usage"]["completion_tokens"] == 3 * len(ANSWER.encode())


def test_streamed_choices_each_open_and_finish_once(server: LiveServer) -> None:
    chunks = chunks_of(server, n=2)
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == ANSWER
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]
    assert sum("brainstacks" in chunk for chunk in chunks) == 1


def test_logprobs_have_one_entry_a_token(server: LiveServer) -> None:
    content = server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == ANSWER
    assert content[0] == {
        "token": "c",
        "logprob": -0.5,
        "bytes": [ord("c")],
        "top_logprobs": [
            {"token": "c", "logprob": -0.5, "bytes": [ord("c")]},
            {"token": "!", "logprob": -1.0, "bytes": [ord("!")]},
        ],
    }


def test_streamed_logprobs_cover_tokens_without_text(server: LiveServer) -> None:
    entries: list[dict[str, Any]] = []
    for chunk in chunks_of(server, logprobs=True):
        logprobs = chunk["choices"][0]["logprobs"]
        entries += logprobs["content"] if logprobs else []
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == ANSWER


def test_token_limit_has_two_names(server: LiveServer) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        limit: dict[str, Any] = {field: 2}
        choice = server.chat(**limit).json()["choices"][0]
        assert choice["message"]["content"] == ANSWER[:2]
        assert choice["finish_reason"] == "length"


def test_answer_may_fill_the_context_if_no_limit_is_given(server: LiveServer) -> None:
    server.chat("hello")
    request = server.engine.submitted[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == server.engine.max_model_len


def test_content_parts_and_developer_role_are_rendered(server: LiveServer) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert server.chat(messages=messages).status_code == 200
    prompt = server.service.reader.decode(server.engine.submitted[0].prompt_ids)
    assert prompt == "<|system|>be kind\n<|user|>hello\n<|assistant|>"


def test_only_the_last_user_message_is_routed(server: LiveServer) -> None:
    messages = [
        {"role": "system", "content": "code=0.9"},
        {"role": "user", "content": "code=0.9"},
        {"role": "assistant", "content": "code=0.9"},
        {"role": "user", "content": "math=0.9"},
        {"role": "assistant", "content": "well"},
    ]
    assert set(server.chat(messages=messages).json()["brainstacks"]["mix"]) == {"chat", "math"}


def test_sampling_fields_reach_the_engine(server: LiveServer) -> None:
    server.chat(
        temperature=0.5,
        top_p=0.9,
        top_k=-1,
        min_tokens=1,
        ignore_eos=True,
        repetition_penalty=1.2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        stop="x",
        logit_bias={"3": -100},
    )
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 0)
    assert (sampling.min_tokens, sampling.ignore_eos, sampling.repetition_penalty) == (1, True, 1.2)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, 0.2)
    assert (sampling.stop, dict(sampling.logit_bias)) == (("x",), {3: -100})


def test_null_fields_mean_openai_defaults(server: LiveServer) -> None:
    names = ("temperature", "top_p", "n", "stop", "seed", "logit_bias", "max_tokens", "stream", "tools", "brainstacks")
    fields: dict[str, Any] = dict.fromkeys(names)
    assert server.chat(**fields).status_code == 200
    sampling = server.engine.submitted[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (1.0, 1.0, None)


def test_unknown_fields_are_tolerated(server: LiveServer) -> None:
    assert server.chat(metadata={"a": "b"}, store=True, service_tier="auto", wonder=1).status_code == 200


def test_failure_in_the_middle_of_a_stream_is_an_event_and_ends_it(server: LiveServer) -> None:
    server.engine.fail_with = EngineFailed("a step of the engine failed")
    events = [line for line in server.chat(stream=True).text.split("\n\n") if line]
    error = json.loads(events[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_failed"
    assert "a step" not in error["message"]  # what went wrong inside is for the log
    assert "data: [DONE]" not in events


def test_failure_of_a_whole_answer_has_the_status_of_the_table(server: LiveServer) -> None:
    server.engine.fail_with = EngineFailed("a step of the engine failed")
    response = server.chat()
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


def test_official_client_reads_answers_streams_and_errors(server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        hello: Any = [{"role": "user", "content": "math=0.9"}]
        answer = client.chat.completions.create(model="tiny", messages=hello)
        assert answer.choices[0].message.content == ANSWER
        assert (answer.model_extra or {})["brainstacks"]["mix"] == {"chat": 0.2, "math": 0.9}
        assert answer._request_id is not None
        stream = client.chat.completions.create(
            model="tiny", messages=hello, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
        assert chunks[-1].usage is not None
        forced = client.chat.completions.create(
            model="tiny", messages=hello, extra_body={"brainstacks": {"mix": {"code": 0.5}}}
        )
        assert (forced.model_extra or {})["brainstacks"]["mix"] == {"code": 0.5}
        assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny:base"]
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            client.chat.completions.create(model="wrong", messages=hello)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(model="tiny", messages=hello, temperature=9)
        server.engine.fail_with = EngineFailed("a step of the engine failed")
        with pytest.raises(openai.APIError, match="internal error"):
            list(client.chat.completions.create(model="tiny", messages=hello, stream=True))
