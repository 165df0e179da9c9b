"""Reads the settings once: TOML file, then environment, then flags. Knows names and defaults, not what they configure.

A mistyped section, key or variable is an error that names it. Nothing else reads the environment.
"""

import os
import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.errors import ConfigInvalid
from stack_store.errors import ObjectStorageInvalid
from stack_store.object_url import check_root

ENV_PREFIX = "BRAINSTACKS_"
ENV_DELIMITER = "__"

MIB = 1024 * 1024

ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s*@?#]+")

SECRET_NAMES = ("key", "object_")  # parts of the names of settings whose values no message repeats


def _split_commas(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


CommaSeparated = Annotated[list[str], NoDecode, BeforeValidator(_split_commas)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ServerSettings(_Section):
    """The HTTP side."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; `0.0.0.0`: all")
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0: any free one")
    api_keys: CommaSeparated = Field(default=[], repr=False, description="API keys; empty: no key is asked for")
    admin_key: str | None = Field(
        default=None, min_length=1, repr=False, description="Key of the admin API, which is off without one"
    )
    served_model_name: str | None = Field(
        default=None, description="Name of the model that routes; default: the base's own id"
    )
    max_queue: int = Field(default=256, ge=0, description="Sequences that may wait beside the running ones")
    max_body_bytes: int = Field(default=8 * MIB, ge=1, description="Size limit of a JSON request")
    max_upload_bytes: int = Field(
        default=8192 * MIB, ge=1, description="Size limit of one uploaded stack or router file"
    )
    request_timeout_seconds: float = Field(
        default=600.0, gt=0, description="Time limit for a request's body, and then for its answer"
    )
    keep_alive_seconds: int = Field(
        default=75,
        ge=1,
        description="Seconds after which an idle connection is closed. Set it longer than the proxy's own idle "
        "timeout, so the proxy never reuses a connection the server has just closed.",
    )
    heartbeat_timeout_seconds: float = Field(default=30.0, gt=0, description="An engine silent for longer is not ready")
    shutdown_delay_seconds: float = Field(
        default=0.0, ge=0, description="At shutdown, time for load balancers to see that the server is not ready"
    )
    drain_seconds: float = Field(
        default=30.0, ge=0, description="How long running requests may take to finish at shutdown"
    )
    requests_per_minute: int | None = Field(
        default=None,
        ge=1,
        description="Requests of one API key, or of one address where no keys are set; default: no limit",
    )
    tokens_per_minute: int | None = Field(
        default=None, ge=1, description="Tokens read and written for one API key or address; default: no limit"
    )
    cors_origins: CommaSeparated = Field(
        default=[], description="Origins whose pages may call the server, `*` for all; empty: none"
    )
    trusted_proxies: CommaSeparated = Field(
        default=[], description="Addresses or networks whose X-Forwarded-For names the client; empty: none"
    )
    gap_log: Path | None = Field(
        default=None, description="File that keeps prompts no domain covers; default: none is kept"
    )
    gap_log_bytes: int = Field(
        default=MIB, ge=4096, description="Size limit of that file, and of the older one beside it"
    )

    @field_validator("api_keys", mode="before")
    @classmethod
    def _some_key(cls, value: object) -> object:
        if isinstance(value, str) and not _split_commas(value):
            raise ValueError("names no key; leave it out to ask for none")  # else commas alone would open the door
        return value

    @field_validator("api_keys")
    @classmethod
    def _no_empty_key(cls, keys: list[str]) -> list[str]:
        if any(not key.strip() for key in keys):
            raise ValueError("a key must not be empty")
        return keys

    @field_validator("api_keys", "admin_key")
    @classmethod
    def _keys_that_can_be_sent(cls, value: list[str] | str | None) -> list[str] | str | None:
        for key in [value] if isinstance(value, str) else value or []:
            if key != key.strip():  # clients' keys are stripped, so that nobody could ever send it
                raise ValueError("a key must not begin or end with white space")
        return value

    @field_validator("admin_key")
    @classmethod
    def _key_of_its_own(cls, key: str | None, checked: ValidationInfo) -> str | None:
        if key is not None and key in checked.data.get("api_keys", []):
            raise ValueError("must not be one of server.api_keys: whoever may ask could then change the store")
        return key

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if origin != "*" and not ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin; it must be SCHEME://HOST or SCHEME://HOST:PORT, or `*`")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: list[str]) -> list[str]:
        for proxy in proxies:
            ip_network(proxy)  # its ValueError names the value
        return proxies


class EngineSettings(_Section):
    """The base and how much of it runs at once."""

    base: str | None = Field(default=None, description="A folder or a hub id; default: the embedded base")
    base_format: Literal["auto", "nf4", "nf4-dense", "dense"] = Field(
        default="auto",
        description="`nf4`: 4 bits; `nf4-dense`: the same values in `dtype`; `dense`: as published; "
        "`auto`: `nf4` on CUDA, `nf4-dense` on a CPU",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of numbers to compute in; `auto`: bfloat16 where the hardware multiplies it, else float32",
    )
    device: str = Field(default="auto", description="`cpu`, `cuda`, `cuda:1`; `auto`: CUDA where there is one")
    threads: int | None = Field(
        default=None, ge=1, description="Threads for the engine's matrix products; default: chosen by cores"
    )
    max_batch_rows: int = Field(default=16, ge=1, description="Sequences that are computed together; others wait")
    max_model_len: int = Field(default=2048, ge=1, description="Most tokens of a prompt and its answer together")
    kv_cache_tokens: int = Field(
        default=16384, ge=1, description="Tokens whose keys and values are kept, of all sequences together"
    )
    prompt_tokens_beside_decode: int | None = Field(
        default=None,
        ge=1,
        description="Most prompt tokens in one step while other sequences decode: this number, or the number of "
        "decoding sequences if that is larger; default: 8 if fused, else no bound",
    )
    fused_step: bool = Field(default=True, description="Decode on a CPU in one compiled function, if the base allows")


class StoreSettings(_Section):
    """Where stacks lie and how many of their bytes may be resident."""

    path: Path = Field(
        default_factory=lambda: default_store_path(),
        description="Folder of the store, made if it is missing; default: `store`, in a checkout beside `demo`",
    )
    import_root: Path | None = Field(default=None, description="The only folder that admin calls may import files from")
    object_roots: CommaSeparated = Field(
        default=[], description="URLs under which admin calls may name objects; empty: none may be named"
    )
    object_options: dict[str, dict[str, Any]] = Field(
        default={}, repr=False, description="Options of fsspec's drivers, by scheme; credentials a driver finds itself"
    )
    device_budget_bytes: int | None = Field(
        default=None, ge=1, description="Most bytes of resident domains; default: a quarter of available memory"
    )
    host_budget_bytes: int | None = Field(
        default=None,
        ge=0,
        description="Bytes of pinned memory from which domains go to a CUDA device; "
        "default: a quarter of what is available",
    )
    loader_threads: int = Field(default=2, ge=1, le=64, description="Loads that run at once, in each tier")
    verify_bytes_per_second: int = Field(
        default=4 * MIB, ge=0, description="Speed at which registered files are read again and hashed; 0: never"
    )
    verify_interval_seconds: float = Field(
        default=3600.0, ge=0, description="From the start of one such pass over all files to the start of the next"
    )
    lease_timeout_seconds: float = Field(default=60.0, gt=0, description="How long a request waits for its mix")

    @field_validator("object_roots")
    @classmethod
    def _plain_roots(cls, roots: list[str]) -> list[str]:
        try:
            return [check_root(root) for root in roots]
        except ObjectStorageInvalid as error:
            raise ValueError(str(error)) from error

    @property
    def is_default_path(self) -> bool:
        """Whether nobody said where the store is."""
        return "path" not in self.model_fields_set


class LogSettings(_Section):
    """What operators see."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Lines below it are left out; at `debug`, libraries may write texts of requests"
    )
    format: Literal["text", "json"] = Field(default="text", description="`json`: one object a line")


class TelemetrySettings(_Section):
    """Traces of requests, for a collector."""

    otlp_endpoint: str | None = Field(
        default=None, description="URL of an OTLP/HTTP collector, as http://localhost:4318; default: no traces"
    )
    sample_ratio: float = Field(
        default=1.0, ge=0, le=1, description="Share of requests that are traced, where the caller did not decide"
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _http_url(cls, url: str | None) -> str | None:
        if url is not None and not (urlsplit(url).scheme in ("http", "https") and urlsplit(url).hostname):
            raise ValueError("must be an http or https URL")
        return url


class Settings(BaseSettings):
    """Every setting of the server, validated and frozen."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_nested_delimiter=ENV_DELIMITER,
        env_ignore_empty=True,
    )

    server: ServerSettings = ServerSettings()
    engine: EngineSettings = EngineSettings()
    store: StoreSettings = Field(default_factory=StoreSettings)
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


Flags = Mapping[str, Mapping[str, object]]


def load_settings(config: Path | None = None, flags: Flags | None = None) -> Settings:
    """Flags beat the environment, which beats the file. Raises ConfigInvalid that names every wrong entry."""
    if config is not None and not config.is_file():
        raise ConfigInvalid(f"config file {str(config)!r} does not exist")
    unknown = list(_unknown_variables(os.environ))
    if unknown:
        raise ConfigInvalid("; ".join(unknown))

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=config)

    try:
        sections: dict[str, Any] = {section: dict(values) for section, values in (flags or {}).items()}
        return FromFile(**sections)
    except ValidationError as error:
        raise ConfigInvalid("; ".join(_describe(error))) from error
    except ValueError as error:  # TOML syntax, or an environment value that does not parse
        raise ConfigInvalid(f"configuration does not parse: {error}") from error


def _unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """pydantic-settings ignores an unknown section in the environment; this names it."""
    for variable in sorted(environ):
        if not variable.upper().startswith(ENV_PREFIX):
            continue
        section, _, key = variable[len(ENV_PREFIX) :].lower().partition(ENV_DELIMITER)
        field = Settings.model_fields.get(section)
        if field is None:
            yield f"environment variable {variable}: unknown section {section!r}"
        elif not _has_key(field.annotation, key):
            yield f"environment variable {variable}: unknown key {key!r} in section {section!r}"


def _has_key(section: object, key: str) -> bool:
    return isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields


def _describe(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        is_shown = fault["type"] != "extra_forbidden" and not any(secret in name for secret in SECRET_NAMES)
        shown = f", got {fault['input']!r}" if is_shown else ""
        message = "unknown setting" if fault["type"] == "extra_forbidden" else fault["msg"]
        yield f"{name}: {message}{shown}"


def demo_store_path() -> Path | None:
    """The demo store of a checkout, which is part of its history and which nothing here changes."""
    demo = Path(__file__).resolve().parent.parent / "demo" / "store"
    return demo if (demo / "manifest.json").is_file() else None


def default_store_path() -> Path:
    """`store` in the checkout that holds a demo store, else `./store`."""
    demo = demo_store_path()
    return Path("store") if demo is None else demo.parent.parent / "store"
