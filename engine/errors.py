"""Names what can go wrong between a request and its tokens. Knows no HTTP status; the server maps these.

EngineError
├── BaseUnsupported     the base cannot be loaded or wrapped; names the missing or foreign part
├── PromptTooLong       prompt and requested tokens do not fit the context
├── GrammarUnsupported  a grammar cannot be compiled; says why
├── GrammarTooComplex   an answer cannot be followed through its grammar within the limits of a step
├── GrammarBusy         too many grammars are being compiled already
├── EngineStopped       submitted to, or interrupted by, an engine that is shutting down
└── EngineFailed        a step raised; every request that shared the engine is told
"""


class EngineError(Exception):
    """Root of everything the engine raises on purpose."""


class BaseUnsupported(EngineError):
    """The base model cannot be loaded or wrapped."""


class PromptTooLong(EngineError):
    """Prompt and requested tokens do not fit the context."""


class GrammarUnsupported(EngineError):
    """A grammar cannot be compiled; the message says why."""


class GrammarTooComplex(EngineError):
    """An answer cannot be followed through its grammar within the limits of a step."""


class GrammarBusy(EngineError):
    """Too many grammars are being compiled already."""


class EngineStopped(EngineError):
    """The engine is shutting down."""


class EngineFailed(EngineError):
    """A step raised; the requests in the engine cannot go on."""
