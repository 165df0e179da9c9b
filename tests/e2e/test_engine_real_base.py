"""The engine on the real base with the demo stacks: nobody's answer depends on who shares the batch."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.engine import Engine
from engine.model.base import find_base, load_base
from engine.model.moe_lora import MoeLoraConfig
from engine.slots import ResidentDomain, load_domain
from engine.types import SamplingParams
from stack_store.format import read_stack, unpack_projections
from stack_store.registry import StackRegistry
from tests.engines import Client, collect
from tests.reference import ReferenceModel, WeightedStack

pytestmark = pytest.mark.e2e

DEMO_STORE = Path(__file__).parents[2] / "demo" / "store"
QUESTIONS = [
    "What is 17 times 23?",
    "Write a Python function that reverses a list.",
    "What causes migraine headaches?",
    "Tell me a short story about a lighthouse keeper who finds a message in a bottle.",
    "If all roses are flowers and some flowers fade quickly, do all roses fade quickly?",
]
MIXES: list[dict[str, float]] = [
    {"math": 1.0, "chat": 0.2},
    {"code": 0.9},
    {"medical": 0.8, "chat": 0.2, "reasoning": 0.3},
    {},
    {"reasoning": 0.95, "chat": 0.25, "math": 0.4, "code": 0.15, "medical": 0.13},
]
TOKENS = 24


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    base = load_base(dtype="float32", base_format="nf4-dense")
    engine = Engine(base, max_batch_rows=8, max_model_len=512, kv_cache_tokens=4096)
    engine.start()
    yield Client(engine)
    engine.stop()


@pytest.fixture(scope="module")
def registry(client: Client) -> StackRegistry:
    base = client.engine.base
    return StackRegistry.open(DEMO_STORE, base_fingerprint=base.fingerprint, geometry=base.geometry)


def prompt_ids(client: Client, question: str) -> list[int]:
    ids: list[int] = client.engine.base.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    return ids


def resident(client: Client, registry: StackRegistry, name: str) -> ResidentDomain:
    base, panelled = client.engine.base, client.engine.wants_panels
    return load_domain(registry, registry.domain(name), dtype=base.dtype, device=base.device, panelled=panelled)


def test_greedy_text_alone_equals_its_text_in_a_mixed_batch(client: Client, registry: StackRegistry) -> None:
    domains = {entry.name: resident(client, registry, entry.name) for entry in registry.manifest.domains}
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)

    def submit_all() -> list[str]:
        events = [
            client.submit(prompt_ids(client, q), sampling, [(domains[d], w) for d, w in mix.items()])[1]
            for q, mix in zip(QUESTIONS, MIXES, strict=True)
        ]
        return [collect(queue).text for queue in events]

    alone = [
        client.run(prompt_ids(client, q), sampling, [(domains[d], w) for d, w in mix.items()]).text
        for q, mix in zip(QUESTIONS, MIXES, strict=True)
    ]
    assert submit_all() == alone
    assert submit_all() == alone
    without = client.run(prompt_ids(client, QUESTIONS[0]), sampling).text
    assert without != alone[0]  # the stacks do something


def test_served_logprobs_equal_a_slow_forward_of_the_real_base(client: Client, registry: StackRegistry) -> None:
    mix = {"math": 1.0, "chat": 0.2}
    served = [(resident(client, registry, name), weight) for name, weight in mix.items()]
    ids = prompt_ids(client, QUESTIONS[0])
    got = client.run(ids, SamplingParams(max_tokens=4, temperature=0.0, logprobs=5, ignore_eos=True), served)
    slow: list[WeightedStack] = []
    for name, weight in mix.items():
        for entry in registry.domain(name).stacks:
            stack = read_stack(registry.stack_path(entry), dtype=torch.float32)
            h = stack.header
            config = MoeLoraConfig(h.num_experts, h.rank, h.top_k, h.scale * h.rank**0.5)
            slow.append((config, unpack_projections(stack), weight))
    reference = ReferenceModel(None, base_format="nf4-dense")
    expected = reference.logits([*ids, *got.token_ids], slow).log_softmax(-1)
    for position, answer in enumerate(got.logprobs, len(ids) - 1):
        for token, logprob in answer.top:
            assert logprob == pytest.approx(expected[position, token].item(), abs=2e-3)


def test_the_embedded_base_is_converted_once_and_then_loaded(tmp_path: Path) -> None:
    first = find_base(None, cache_dir=tmp_path)
    files = {path.name: path.stat().st_mtime_ns for path in Path(first.location).iterdir()}
    assert "model.safetensors" in files
    assert find_base(None, cache_dir=tmp_path) == first
    assert {path.name: path.stat().st_mtime_ns for path in Path(first.location).iterdir()} == files
    assert [path.name for path in Path(first.location).parent.iterdir()] == [Path(first.location).name]
