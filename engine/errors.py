"""Names what can go wrong between a request and its tokens. Knows no HTTP status; the server maps these.

EngineError
├── BaseUnsupported     the base cannot be loaded or wrapped; names the missing or foreign part
├── PromptTooLong       prompt and requested tokens do not fit the context
├── EngineStopped       submitted to, or interrupted by, an engine that is shutting down
└── EngineFailed        a step raised; every request that shared the engine is told
"""


class EngineError(Exception):
    """Root of everything the engine raises on purpose."""


class BaseUnsupported(EngineError):
    """The base model cannot be loaded or wrapped."""


class PromptTooLong(EngineError):
    """Prompt and requested tokens do not fit the context."""


class EngineStopped(EngineError):
    """The engine is shutting down."""


class EngineFailed(EngineError):
    """A step raised; the requests in the engine cannot go on."""
