"""Names what the HTTP side refuses, and owns the one table exception class -> status and code. Knows no route.

    ServerError
    ├── ConfigInvalid       a setting is unknown or has a bad value
    ├── ReferenceRefused    a store in the paper's format cannot be imported
    ├── RequestFailed       a server that a command asked was not there or refused
    └── ApiError            a request is answered with an error; `param` names the field at fault
        ├── InvalidRequest          a known field has a bad value
        ├── Unsupported             a known field asks for what this server cannot do
        ├── ContextTooLong          prompt and answer do not fit the context
        ├── ModelNotFound           a model name that this server does not serve
        ├── RouterNotFound          the store has no router
        ├── InvalidKey              no key, or a wrong one
        ├── AdminDisabled           no admin key is configured
        ├── ImportDisabled          no import root is configured
        ├── ObjectStorageDisabled   no root of object storage is configured
        ├── QueueFull               too many sequences wait already
        ├── RateLimitExceeded       a client asked more often, or for more tokens, than it may
        ├── ShuttingDown            the server is about to end
        ├── RequestTimedOut         the answer took longer than a request may
        └── ClientGone              the client hung up; nobody reads the answer

Every class of every package's errors.py has a row in ERROR_TABLE.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from engine import errors as engine_errors
from router import errors as router_errors
from stack_store import errors as store_errors


class ServerError(Exception):
    """Root of everything the server raises on purpose."""


class ConfigInvalid(ServerError):
    """A setting is unknown or has a bad value; the message names it."""


class ReferenceRefused(ServerError):
    """A store in the paper's format cannot be imported; the message names the thing and the value at fault."""


class RequestFailed(ServerError):
    """A server that a command asked was not there, or refused; the message says what it said."""


class ApiError(ServerError):
    """A request is answered with an error."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(ApiError):
    """A known field has a bad value."""


class Unsupported(ApiError):
    """A known field asks for what this server cannot do."""


class ContextTooLong(ApiError):
    """Prompt and answer do not fit the context; the message has the numbers."""


class ModelNotFound(ApiError):
    """A model name that this server does not serve."""


class RouterNotFound(ApiError):
    """The store has no router."""


class InvalidKey(ApiError):
    """No key, or a wrong one."""


class AdminDisabled(ApiError):
    """No admin key is configured."""


class ImportDisabled(ApiError):
    """No import root is configured."""


class ObjectStorageDisabled(ApiError):
    """No root of object storage is configured."""


class QueueFull(ApiError):
    """Too many sequences wait already."""


class RateLimitExceeded(ApiError):
    """A client asked more often, or for more tokens, than it may."""

    def __init__(self, message: str, *, limit: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.limit = limit  # "requests" or "tokens"
        self.retry_after_seconds = retry_after_seconds


class ShuttingDown(ApiError):
    """The server is about to end; another one may answer."""


class RequestTimedOut(ApiError):
    """The answer took longer than a request may."""


class ClientGone(ApiError):
    """The client hung up; nobody reads the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an exception class is answered."""

    status: int
    code: str
    retry_after_seconds: int | None = None
    should_retry: bool | None = None  # None leaves it to the client's own rule


INTERNAL = Answer(500, "internal_error")

ERROR_TABLE: Mapping[type[Exception], Answer] = MappingProxyType(
    {
        ServerError: INTERNAL,
        ConfigInvalid: INTERNAL,
        ReferenceRefused: INTERNAL,
        RequestFailed: INTERNAL,
        ApiError: INTERNAL,
        InvalidRequest: Answer(400, "invalid_value"),
        Unsupported: Answer(400, "unsupported_parameter"),
        ContextTooLong: Answer(400, "context_length_exceeded"),
        ModelNotFound: Answer(404, "model_not_found"),
        RouterNotFound: Answer(404, "router_not_found"),
        InvalidKey: Answer(401, "invalid_api_key"),
        AdminDisabled: Answer(403, "admin_disabled"),
        ImportDisabled: Answer(403, "import_disabled"),
        ObjectStorageDisabled: Answer(403, "object_storage_disabled"),
        QueueFull: Answer(429, "queue_full", retry_after_seconds=1),
        RateLimitExceeded: Answer(429, "rate_limit_exceeded", retry_after_seconds=60),  # or what the error itself says
        ShuttingDown: Answer(503, "shutting_down", retry_after_seconds=5),
        RequestTimedOut: Answer(504, "request_timed_out", should_retry=False),
        ClientGone: Answer(499, "client_closed_request"),
        engine_errors.EngineError: INTERNAL,
        engine_errors.BaseUnsupported: INTERNAL,
        engine_errors.PromptTooLong: Answer(400, "context_length_exceeded"),
        engine_errors.GrammarUnsupported: Answer(400, "invalid_value"),
        engine_errors.GrammarTooComplex: Answer(400, "grammar_too_complex"),
        engine_errors.GrammarBusy: Answer(429, "grammars_busy", retry_after_seconds=1),
        engine_errors.EngineStopped: Answer(503, "engine_stopped", retry_after_seconds=5),
        engine_errors.EngineFailed: Answer(500, "engine_failed"),
        router_errors.RouterError: INTERNAL,
        router_errors.EmptyText: Answer(400, "empty_text"),
        router_errors.ScoresNotFinite: Answer(500, "scores_not_finite"),
        router_errors.CheckpointInvalid: Answer(400, "router_invalid"),
        router_errors.CheckpointIncompatible: Answer(400, "router_incompatible"),
        store_errors.StoreError: INTERNAL,
        store_errors.StoreNotFound: INTERNAL,
        store_errors.StoreExists: INTERNAL,
        store_errors.ManifestInvalid: Answer(500, "manifest_invalid"),
        store_errors.GenerationConflict: Answer(412, "generation_conflict", should_retry=False),
        store_errors.StackInvalid: Answer(400, "stack_invalid"),
        store_errors.StackIncompatible: Answer(400, "stack_incompatible"),
        store_errors.DigestMismatch: Answer(400, "digest_mismatch"),
        store_errors.DomainNameInvalid: Answer(400, "domain_name_invalid"),
        store_errors.DomainNotFound: Answer(404, "domain_not_found"),
        store_errors.DomainInvalid: Answer(400, "domain_invalid"),
        store_errors.DomainTooLarge: Answer(400, "domain_too_large"),
        store_errors.ImportRefused: Answer(400, "import_refused"),
        store_errors.UploadTooLarge: Answer(413, "upload_too_large"),
        store_errors.UploadNotFound: Answer(404, "upload_not_found"),
        store_errors.ObjectStorageInvalid: INTERNAL,
        store_errors.ObjectRefused: Answer(400, "object_refused"),
        store_errors.ObjectNotFound: Answer(404, "object_not_found"),
        store_errors.ObjectDenied: Answer(502, "object_denied", should_retry=False),
        store_errors.ObjectUnavailable: Answer(502, "object_unavailable"),
        store_errors.DownloadStopped: Answer(503, "shutting_down", retry_after_seconds=5),
        store_errors.DiskFull: Answer(503, "disk_full", retry_after_seconds=30),
        store_errors.DiskFailed: Answer(503, "disk_failed", retry_after_seconds=30),
        store_errors.CacheError: INTERNAL,
        store_errors.MixTooLarge: Answer(400, "mix_too_large"),
        store_errors.LoadFailed: Answer(503, "load_failed", retry_after_seconds=5),
        store_errors.MemoryExhausted: Answer(503, "memory_exhausted", retry_after_seconds=5),
        store_errors.LeaseTimedOut: Answer(503, "lease_timed_out", retry_after_seconds=5),
        store_errors.CacheClosed: Answer(503, "shutting_down", retry_after_seconds=5),
    }
)


def answer_for(error: BaseException) -> Answer:
    """The row of the error's class, or of its nearest listed ancestor; anything else is an internal error."""
    for cls in type(error).__mro__:
        if (answer := ERROR_TABLE.get(cls)) is not None:
            return answer
    return INTERNAL


def is_internal(error: BaseException) -> bool:
    """Whether the fault is the server's own: then its message, which may name files, is for the log and no client."""
    return answer_for(error).status == 500
