"""What a user of the running server sees, with the real base and the demo store, through the official client."""

import itertools
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server_process import ServerProcess

pytestmark = pytest.mark.e2e

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
MATH = "Natalia sold 48 clips in April and half as many in May. How many clips did she sell altogether?"
MEDICAL = "What are the symptoms of iron deficiency anemia and how is it treated?"
OTHER_MEDICAL = "What are the treatments for chronic kidney disease?"
DOMAINS = ["chat", "code", "math", "medical", "reasoning"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(DEMO_STORE, folder / "store")
    with ServerProcess(folder / "store", folder / "log", store__import_root=DEMO_STORE) as process:
        yield process


def ask(server: ServerProcess, question: str, *, tokens: int = 24, **extra: Any) -> tuple[str, dict[str, Any]]:
    """A greedy answer and the brainstacks extension."""
    model = extra.pop("model", None) or server.model
    answer = server.openai.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        extra_body=extra,
    )
    text = answer.choices[0].message.content
    assert text is not None
    extension = answer.model_extra["brainstacks"] if answer.model_extra else {}
    return text, extension


def test_unlike_questions_get_unlike_mixes_and_the_second_of_a_kind_finds_its_stacks(server: ServerProcess) -> None:
    _, math = ask(server, MATH)
    _, medical = ask(server, MEDICAL)
    assert math["mix"] != medical["mix"]
    assert max(math["scores"], key=math["scores"].get) == "math"
    assert max(medical["scores"], key=medical["scores"].get) == "medical"
    assert "medical" in medical["cold"]
    misses = server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="miss")
    hits = server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="hit")
    _, again = ask(server, OTHER_MEDICAL)
    assert "medical" in again["mix"]
    assert "medical" not in again["cold"]
    assert server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="hit") > hits
    new_misses = server.metric("brainstacks_stack_cache_lookups_total", tier="device", result="miss") - misses
    assert new_misses == len(again["cold"])


def stream(server: ServerProcess, question: str, tokens: int) -> list[tuple[float, str]]:
    """When each piece of a streamed answer came, and what it was."""
    pieces = []
    chunks = server.openai.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            pieces.append((time.monotonic(), chunk.choices[0].delta.content))
    return pieces


def test_a_stream_shows_tokens_as_they_are_made(server: ServerProcess) -> None:
    pieces = stream(server, MATH, 40)
    assert len(pieces) > 20
    spread = pieces[-1][0] - pieces[0][0]
    gaps = [later - earlier for (earlier, _), (later, _) in itertools.pairwise(pieces)]
    assert max(gaps) < spread / 3  # not all at once at the end
    whole, _ = ask(server, MATH, tokens=40, ignore_eos=True)
    assert "".join(text for _, text in pieces) == whole


def test_two_clients_stream_at_once(server: ServerProcess) -> None:
    results: dict[str, list[tuple[float, str]]] = {}

    def client(question: str) -> None:
        results[question] = stream(server, question, 60)

    threads = [threading.Thread(target=client, args=(question,)) for question in (MATH, MEDICAL)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    first, second = results[MATH], results[MEDICAL]
    overlap = min(first[-1][0], second[-1][0]) - max(first[0][0], second[0][0])
    assert overlap > 0.5 * min(first[-1][0] - first[0][0], second[-1][0] - second[0][0])
    for question, pieces in results.items():  # in company as alone
        assert "".join(text for _, text in pieces) == ask(server, question, tokens=60, ignore_eos=True)[0]


def test_fixed_mixes_by_model_name_and_by_extension(server: ServerProcess) -> None:
    name = server.model
    by_model, extension = ask(server, MATH, model=f"{name}:math")
    assert extension["mix"] == {"math": 1.0}
    by_mix, _ = ask(server, MATH, brainstacks={"mix": {"math": 1.0}})
    assert by_mix == by_model
    base, extension = ask(server, MATH, model=f"{name}:base")
    assert extension["mix"] == {}
    assert base != by_model


def test_curl_as_the_readme_shows_it(server: ServerProcess) -> None:
    body = {"messages": [{"role": "user", "content": MATH}], "max_tokens": 16}
    name = server.model
    answer = server.http.post("/v1/chat/completions", json={"model": name, **body})
    assert answer.status_code == 200
    assert answer.json()["brainstacks"]["mix"]
    assert answer.headers["x-brainstacks-mix"]


def registered_files(domain: str) -> list[dict[str, str]]:
    """The shipped files of a domain's rounds, as an admin call names them."""
    manifest = json.loads((DEMO_STORE / "manifest.json").read_text())
    (entry,) = (d for d in manifest["domains"] if d["name"] == domain)
    return [{"path": stack["file"]} for stack in entry["stacks"]]


def test_a_domain_comes_and_goes_while_requests_run_and_survives_a_restart(tmp_path: Path) -> None:
    shutil.copytree(DEMO_STORE, tmp_path / "store")
    settings = {"store__import_root": DEMO_STORE}
    with ServerProcess(tmp_path / "store", tmp_path / "log", **settings) as server:
        name = server.model
        before, _ = ask(server, MATH, model=f"{name}:math")
        assert server.admin("DELETE", "/admin/domains/math").status_code == 200
        assert server.http.post("/v1/chat/completions", json=_body(f"{name}:math")).status_code == 404

        running = threading.Thread(target=stream, args=(server, MEDICAL, 150))
        running.start()
        put = server.admin("PUT", "/admin/domains/math", json={"stacks": registered_files("math")})
        assert put.status_code == 201, put.text
        assert ask(server, MATH, model=f"{name}:math")[0] == before
        running.join(timeout=120)

        whole, _ = ask(server, MATH, tokens=50, model=f"{name}:math", ignore_eos=True)
        pieces: list[str] = []
        started = threading.Event()

        def use() -> None:
            answer = server.openai.chat.completions.create(
                model=f"{name}:math",
                messages=[{"role": "user", "content": MATH}],
                max_tokens=50,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in answer:
                if chunk.choices and chunk.choices[0].delta.content:
                    pieces.append(chunk.choices[0].delta.content)
                    started.set()

        user = threading.Thread(target=use)
        user.start()
        assert started.wait(timeout=60)
        deleted = server.admin("DELETE", "/admin/domains/math")
        assert deleted.json()["status"] == "draining", deleted.text
        user.join(timeout=120)
        assert "".join(pieces) == whole  # it finished on the version that it had
        put = server.admin("PUT", "/admin/domains/math", json={"stacks": registered_files("math")})
        assert put.status_code == 201, put.text
    with ServerProcess(tmp_path / "store", tmp_path / "log", **settings) as server:
        assert ask(server, MATH, model=f"{name}:math")[0] == before


def _body(model: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": MATH}], "max_tokens": 4}


def test_a_budget_of_two_domains_serves_five_with_the_same_answers_in_flat_memory(
    server: ServerProcess, tmp_path: Path
) -> None:
    """Domains are used in turn, so nearly every request evicts one and loads another."""
    name = server.model
    expected = {domain: ask(server, MEDICAL, tokens=12, model=f"{name}:{domain}")[0] for domain in DOMAINS}
    shown = server.admin("GET", "/admin/domains").json()["domains"]
    budget = 2 * max(domain["resident_bytes"] for domain in shown)
    shutil.copytree(DEMO_STORE, tmp_path / "store")
    with ServerProcess(tmp_path / "store", tmp_path / "log", store__device_budget_bytes=budget) as small:
        memory = []
        for turn in range(60):
            domain = DOMAINS[turn % len(DOMAINS)]
            tokens = 12 if turn < 5 or turn >= 55 else 2
            text, extension = ask(small, MEDICAL, tokens=tokens, model=f"{name}:{domain}")
            assert list(extension["mix"]) == [domain]
            if tokens == 12:
                assert text == expected[domain]
            assert small.metric("brainstacks_stack_cache_resident_bytes", tier="device") <= budget
            memory.append(small.resident_memory_bytes())
        assert small.metric("brainstacks_stack_cache_evictions_total", tier="device") >= 50
        assert small.metric("brainstacks_stack_load_seconds_count") >= 50
        assert max(memory[45:]) < 1.05 * max(memory[15:30])
        assert small.stop() == 0


def test_the_log_has_one_line_a_request_and_no_prompt(server: ServerProcess) -> None:
    ask(server, "A very particular question about zebras", tokens=2)
    assert "zebras" not in server.log_text
