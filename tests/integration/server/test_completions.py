"""Text completions, and the token endpoints beside them."""

import json
from pathlib import Path
from typing import Any

import httpx
from tokenizers.processors import TemplateProcessing

from tests.servers import ANSWER, LiveServer, run_live_server


def complete(server: LiveServer, **fields: Any) -> httpx.Response:
    """POST /v1/completions."""
    with server.client() as client:
        return client.post("/v1/completions", json={"prompt": "ab", **fields})


def test_answer_is_sixteen_tokens_long_unless_asked_otherwise(server: LiveServer) -> None:
    answer = complete(server).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == ANSWER
    assert server.engine.submitted[0].sampling.max_tokens == 16


def test_default_length_shrinks_to_what_is_left_of_the_context(server: LiveServer) -> None:
    assert complete(server, prompt="x" * (server.engine.max_model_len - 3)).status_code == 200
    assert server.engine.submitted[0].sampling.max_tokens == 3


def test_echo_with_logprobs_covers_prompt_and_answer(server: LiveServer) -> None:
    choice = complete(server, echo=True, logprobs=1, max_tokens=1, temperature=0).json()["choices"][0]
    assert choice["text"] == "abc"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "c"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2]


def test_tokens_that_the_tokenizer_adds_have_no_place_in_the_text(server: LiveServer) -> None:
    tokenizer = server.service.reader.tokenizer
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[end])
    choice = complete(server, echo=True, logprobs=0, max_tokens=1).json()["choices"][0]
    assert choice["text"] == "abc"
    assert choice["logprobs"]["tokens"] == ["<|end|>", "a", "b", "c"]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2]


def test_offsets_count_characters_and_parts_of_characters_have_names(server: LiveServer) -> None:
    logprobs = complete(server, prompt="é!", echo=True, logprobs=0, max_tokens=0).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert logprobs["text_offset"] == [0, 0, 1]


def test_prompt_may_be_token_ids(server: LiveServer) -> None:
    token_ids = list(server.service.reader.tokenizer.encode("math=0.9"))
    answer = complete(server, prompt=token_ids, echo=True).json()
    assert answer["choices"][0]["text"] == "math=0.9" + ANSWER
    assert answer["brainstacks"]["mix"] == {"chat": 0.2, "math": 0.9}


def test_each_of_several_prompts_has_its_own_mix(server: LiveServer) -> None:
    response = complete(server, prompt=["math=0.9", "code=0.9"], n=2)
    answer = response.json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [set(report["mix"]) for report in answer["brainstacks"]] == [{"chat", "math"}, {"chat", "code"}]
    assert answer["usage"]["prompt_tokens"] == 2 * len("math=0.9")
    assert {len(request.mix) for request in server.engine.submitted} == {2}


def test_streamed_prompts_each_report_their_mix_once(server: LiveServer) -> None:
    text = complete(server, prompt=["math=0.9", "code=0.9"], stream=True).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    reports = {c["choices"][0]["index"]: c["brainstacks"]["mix"] for c in chunks if "brainstacks" in c}
    assert {index: set(mix) for index, mix in reports.items()} == {0: {"chat", "math"}, 1: {"chat", "code"}}
    for index in (0, 1):
        assert "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == index) == ANSWER


def test_several_mixes_that_do_not_fit_together_take_turns(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=1) as server:
        server.router.domains = ("code", "math")
        answer = complete(server, prompt=[f"{domain}=0.9" for domain in ("math", "code", "math", "code")]).json()
        assert [report["mix"] for report in answer["brainstacks"]] == [{"math": 0.9}, {"code": 0.9}] * 2
        assert [choice["text"] for choice in answer["choices"]] == [ANSWER] * 4
        assert server.metric("brainstacks_stack_cache_evictions_total", tier="device") >= 1


def test_header_shows_the_planned_mix_of_a_prompt_that_still_waits(tmp_path: Path) -> None:
    with run_live_server(tmp_path, budget_domains=1) as server:
        server.router.domains = ("code", "math")
        server.engine.may_decode.clear()
        body = {"prompt": ["math=0.9", "code=0.8"], "stream": True}
        with server.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
            assert response.headers["x-brainstacks-mix"] == "math=0.90;code=0.80"
            server.engine.may_decode.set()


def test_header_says_how_many_mixes_there_are_where_it_would_be_too_long(tmp_path: Path) -> None:
    """Proxies and clients refuse headers of a few thousand characters."""
    with run_live_server(tmp_path, settings={"server": {"max_queue": 200}}) as server:
        prompts = [f"math=0.{50 + n % 50} code=0.{60 + n // 50}" for n in range(120)]
        few, many = complete(server, prompt=prompts[:2] * 20), complete(server, prompt=prompts)
    assert few.headers["x-brainstacks-mix"].count(";") == 1
    assert len({str(report["mix"]) for report in many.json()["brainstacks"]}) == 120
    assert many.headers["x-brainstacks-mix"] == "120 mixes"


def test_stream_echoes_the_prompt_first(server: LiveServer) -> None:
    text = complete(server, echo=True, stream=True, logprobs=1).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    first = chunks[0]["choices"][0]
    assert first["text"] == "ab"
    assert first["logprobs"]["token_logprobs"] == [None, -0.5]
    offsets = [o for c in chunks if c["choices"][0]["logprobs"] for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets[:4] == [0, 1, 2, 3]


def test_tokens_go_there_and_back(server: LiveServer) -> None:
    with server.client() as client:
        answer = client.post("/tokenize", json={"prompt": "héllo"}).json()
        assert answer["count"] == len(answer["tokens"]) == len("héllo".encode())
        assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "héllo"}


def test_messages_are_tokenized_as_the_model_reads_them(server: LiveServer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with server.client() as client:
        with_prompt = client.post("/tokenize", json={"messages": messages}).json()
        without = client.post("/tokenize", json={"messages": messages, "add_generation_prompt": False}).json()
        text = client.post("/detokenize", json={"tokens": with_prompt["tokens"]}).json()["prompt"]
    assert text == "<|user|>hi\n<|assistant|>"
    assert without["count"] == len("<|user|>hi\n")


def test_tools_are_counted_as_the_model_is_told_of_them(server: LiveServer) -> None:
    tools = [{"type": "function", "function": {"name": "find"}}]
    with server.client() as client:
        body = {"messages": [{"role": "user", "content": "hi"}], "tools": tools}
        tokens = client.post("/tokenize", json=body).json()["tokens"]
        text = client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text.startswith("<|system|># Tools\n")
    assert text.endswith("<|user|>hi\n<|assistant|>")


def test_special_tokens_are_added_as_asked_for(server: LiveServer) -> None:
    tokenizer = server.service.reader.tokenizer
    end = ("<|end|>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[end])
    messages = [{"role": "user", "content": "hi"}]
    with server.client() as client:
        for body, is_added in (
            ({"messages": messages}, False),
            ({"messages": messages, "add_special_tokens": True}, True),
            ({"prompt": "hi"}, True),
            ({"prompt": "hi", "add_special_tokens": False}, False),
        ):
            tokens = client.post("/tokenize", json=body).json()["tokens"]
            assert (tokens[0] == tokenizer.eos_token_id) is is_added, body
