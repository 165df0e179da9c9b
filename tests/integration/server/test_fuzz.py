"""A short fuzz run: whatever is sent, the answer is one that the server's own document describes, and no 5xx.

The long one: `python -m tests.fuzz --minutes 20 --seed 1`.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.fuzz.generated import run_generated
from tests.fuzz.judge import Judge
from tests.fuzz.mutated import run_mutated
from tests.fuzz.target import Target, fuzzed_server
from tests.tiny_bases import VOCABULARY

SEED = 7


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with fuzzed_server(tmp_path_factory.mktemp("fuzzed")) as running:
        yield running


def test_valid_requests_with_something_wrong_in_them_are_answered_as_documented(target: Target) -> None:
    num_cases, findings = run_mutated(target, seed=SEED, cases=500, seconds=60)
    assert not findings, "\n".join(findings)
    assert num_cases == 500


def test_random_requests_of_the_documents_schemas_are_answered_as_documented(target: Target) -> None:
    num_cases, findings = run_generated(target, seed=SEED, examples=8)
    assert not findings, "\n".join(findings)
    assert num_cases > 150


def test_random_requests_find_what_departs_from_the_document(target: Target) -> None:
    document = copy.deepcopy(target.document)
    document["paths"] = {path: document["paths"][path] for path in ("/v1/models", "/detokenize")}
    document["components"]["schemas"]["ModelList"]["required"].append("surprise")
    del document["paths"]["/detokenize"]["post"]["responses"]["400"]
    _, findings = run_generated(replace(target, document=document), seed=SEED, examples=4)
    assert {finding.partition("\n")[0] for finding in findings} == {
        "GET /v1/models: Response violates schema (200)",
        "POST /detokenize: Undocumented status code (400)",
    }


def chat(target: Target, **fields: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2, **fields}
    with target.client() as http:
        return http.post("/v1/chat/completions", json=body, headers={"authorization": "Bearer user"})


def test_top_k_beyond_every_number_type_keeps_all_tokens(target: Target) -> None:
    fields = {"seed": 1, "temperature": 1.0, "logprobs": True}
    answers = [chat(target, top_k=top_k, **fields) for top_k in (VOCABULARY, 10**400)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def faults(document: dict[str, Any], response: httpx.Response) -> list[str]:
    return list(Judge(document).faults(response, method="POST", path="/v1/chat/completions"))


@pytest.mark.parametrize("stream", [False, True])
def test_judge_sees_what_departs_from_the_document(target: Target, stream: bool) -> None:
    document = copy.deepcopy(target.document)
    response = chat(target, stream=stream)
    assert not faults(document, response)
    shape = document["components"]["schemas"]["ChatCompletionChunk" if stream else "ChatCompletion"]
    shape["required"].append("surprise")
    assert any("surprise" in fault for fault in faults(document, response))
    del document["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    assert faults(document, response) == ["undocumented status 200"]


def test_judge_knows_a_stream_that_ends_with_an_error(target: Target) -> None:
    response = chat(target, stream=True)
    begun = response.content.removesuffix(b"data: [DONE]\n\n")
    refusal = chat(target, temperature=-1).content

    def faults_with_end(end: bytes) -> list[str]:
        return faults(target.document, httpx.Response(200, headers=response.headers, content=begun + end))

    assert not faults_with_end(b"data: " + refusal + b"\n\n")
    internal = refusal.replace(b"invalid_request_error", b"server_error")
    assert any("error of the server" in fault for fault in faults_with_end(b"data: " + internal + b"\n\n"))
    for end in (b'data: {"error": "m"}\n\n', b"data: \n\n", b""):
        assert any("neither with [DONE] nor with an error" in fault for fault in faults_with_end(end)), end


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_judge_refuses_what_only_python_reads_as_json(target: Target, constant: str) -> None:
    response = chat(target)
    content = response.text.replace('"created":', f'"seconds":{constant},"created":', 1).encode()
    spoilt = httpx.Response(200, headers={"x-request-id": "1", "content-type": "application/json"}, content=content)
    assert [fault.partition(":")[0] for fault in faults(target.document, spoilt)] == [f"{constant} is no JSON"]


def test_judge_sees_a_broken_stream_and_a_missing_header(target: Target) -> None:
    response = chat(target, stream=True)
    cut = httpx.Response(200, headers=response.headers, content=response.content[:-14])
    assert any("[DONE]" in fault for fault in faults(target.document, cut))
    bare = httpx.Response(400, json={"error": {"message": "m", "type": "t", "param": None, "code": "c"}})
    assert faults(target.document, bare) == ["400 without the header x-request-id"]
    failed = httpx.Response(500, headers={"x-request-id": "1"}, json={"detail": "x"})
    assert len(faults(target.document, failed)) == 2  # its status and its shape
