"""Builds tiny random bases with a real tokenizer and chat template, as folders that load_base can read."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipVisionConfig,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY = 384
# Two key heads, so that queries share them; sizes that quantise in whole blocks of 64.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@functools.cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text is encodable and decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and says hello to the world"], trainer)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@functools.cache
def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2, TinyLlama and Gemma have it: words with a leading ▁, unknown characters as bytes."""
    words = ["▁hello", "▁world", "▁", "é"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {word: len(vocabulary) + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_llama(folder: Path, **changes: Any) -> Path:
    """A random Llama."""
    torch.manual_seed(0)
    return _save(LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})), folder)


def make_gemma3(folder: Path) -> Path:
    """A random Gemma 3 with a vision tower; its sliding window is shorter than the tests' prompts."""
    torch.manual_seed(0)
    layer_types = ["sliding_attention", "full_attention", "sliding_attention"]
    text = Gemma3TextConfig(**SHAPE, sliding_window=8, layer_types=layer_types)
    vision = SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return _save(Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)), folder)


def make_qwen2(folder: Path) -> Path:
    """A random Qwen 2, whose q, k and v have biases."""
    torch.manual_seed(0)
    return _save(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), folder)


def make_qwen3(folder: Path) -> Path:
    """A random Qwen 3."""
    torch.manual_seed(0)
    return _save(Qwen3ForCausalLM(Qwen3Config(**SHAPE)), folder)


def make_mistral(folder: Path) -> Path:
    """A random Mistral with a sliding window in every layer."""
    torch.manual_seed(0)
    return _save(MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)), folder)


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": make_llama,
    "gemma3": make_gemma3,
    "qwen2": make_qwen2,
    "qwen3": make_qwen3,
    "mistral": make_mistral,
}
