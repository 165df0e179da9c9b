"""What answers look like, for the OpenAPI document only: answers are made as plain JSON, and tests compare the two.

A field with a default may be absent; one that may be None is there. Longer than most files because the API has so many.
"""

from typing import Literal

from pydantic import BaseModel


class ErrorFields(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(BaseModel):
    """Every error, in the shape that OpenAI's clients unwrap."""

    error: ErrorFields


class MixReport(BaseModel):
    """How one prompt was answered."""

    scores: dict[str, float]
    mix: dict[str, float]
    cold: list[str]
    seconds: dict[str, float]
    dropped: dict[str, float] = {}
    stale: list[str] = []


class PromptTokensDetails(BaseModel):
    """How the prompt's tokens were had."""

    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A token that could have been."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was, and the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of every token of an answer."""

    content: list[TokenLogprob]
    refusal: None


class AnsweredFunction(BaseModel):
    """The function of a call, and its arguments as JSON."""

    name: str
    arguments: str


class AnsweredCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnsweredMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[AnsweredCall] = []


ChatFinish = Literal["stop", "length", "tool_calls"]


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnsweredMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    brainstacks: MixReport


class FunctionDelta(BaseModel):
    """The function's name comes first, then pieces of the arguments."""

    name: str = ""
    arguments: str


class CallDelta(BaseModel):
    """A piece of a call; its first has id and type."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class MessageDelta(BaseModel):
    """What is new."""

    role: Literal["assistant"] = "assistant"
    content: str | None = None
    tool_calls: list[CallDelta] = []


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None


class ChatCompletionChunk(BaseModel):
    """A piece of a streamed answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    brainstacks: MixReport | None = None


class CompletionLogprobs(BaseModel):
    """Of every token, with its place in the text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole continuation; `brainstacks` is a list where several prompts were given."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    brainstacks: MixReport | list[MixReport]


class CompletionChunkChoice(BaseModel):
    """A piece of one continuation."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(BaseModel):
    """A piece of a streamed continuation."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None
    brainstacks: MixReport | None = None


class Model(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Policy(BaseModel):
    """The constants that make a mix of scores."""

    floor_domain: str
    floor: float
    threshold: float
    gap_threshold: float


class RouteAnswer(BaseModel):
    """How a text is routed."""

    object: Literal["route"]
    scores: dict[str, float]
    mix: dict[str, float]
    gap: bool
    stale: list[str]
    policy: Policy | None


class Tokens(BaseModel):
    """A prompt's tokens."""

    tokens: list[int]
    count: int
    max_model_len: int


class PromptText(BaseModel):
    """The text of tokens."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The tokenizer's own special tokens and chat template."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None
    max_model_len: int


class Live(BaseModel):
    """The process answers."""

    status: Literal["ok"]


class Readiness(BaseModel):
    """Whether requests should be sent here."""

    status: Literal["ok", "engine silent", "shutting down"]
    heartbeat_age_seconds: float | None


class StackFile(BaseModel):
    """One round of a domain."""

    digest: str
    file: str
    bytes: int
    round: int


class FileCheck(BaseModel):
    """What a file was found to be; without a fault it is what was registered."""

    file: str
    digest: str
    fault: str | None


class Described(BaseModel):
    """A version of a domain."""

    name: str
    version: str
    stacks: list[StackFile]
    bytes: int


class Domain(Described):
    """A registered domain, and what is resident of it."""

    router: Literal["trained", "stale", "unknown"] | None
    state: Literal["absent", "loading", "resident", "damaged"]
    resident_bytes: int | None
    leases: int
    pinned: bool
    error: str = ""
    damaged_files: list[FileCheck] = []


class ShownDomain(Domain):
    """One domain, at a generation of the store."""

    generation: int


class Registered(Described):
    """What was registered, or would be by a dry run, which tells nothing of memory."""

    generation: int
    changed: bool
    dry_run: bool


class Removed(BaseModel):
    """A deleted domain; `draining` while requests hold it."""

    name: str
    generation: int
    status: Literal["draining", "deleted"]
    freed_bytes: int


class Verified(BaseModel):
    """A domain's files, read again."""

    name: str
    version: str
    files: list[FileCheck]


class StoreRouter(BaseModel):
    """The store's router, and how it fits the store."""

    digest: str
    file: str
    bytes: int
    stale: list[str]
    missing: list[str]
    unknown: list[str]


class DomainList(BaseModel):
    """The store."""

    generation: int
    base_fingerprint: str
    domains: list[Domain]
    router: StoreRouter | None


class InstalledRouter(BaseModel):
    """The router that is live now."""

    generation: int
    router: StoreRouter


class CacheEntry(BaseModel):
    """A resident domain, or one that loads."""

    key: str
    bytes: int
    state: Literal["resident", "loading"]
    leases: int
    pinned: bool
    last_used: float


class Tier(BaseModel):
    """A tier of memory."""

    budget_bytes: int
    resident_bytes: int
    leased_bytes: int
    pinned_bytes: int
    entries: list[CacheEntry]
    waiting: int


class Cache(Tier):
    """The device's tier, and the host's if there is one."""

    host: Tier | None


class Upload(BaseModel):
    """A file that came."""

    sha256: str
    bytes: int
