"""The requests of the admin API. Knows field names, not the store. A mistyped key is an error, never ignored."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError

from stack_store.manifest import DOMAIN_NAME

MAX_URL_LENGTH = 2048

Tier = Literal["device", "host"]
DomainName = Annotated[
    str, WithJsonSchema({"type": "string", "pattern": f"^{DOMAIN_NAME.pattern}$"})
]  # not checked here
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileSource(BaseModel):
    """One file: by path under the import root, by the digest of an upload, or by a URL and the digest it must have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    path: Annotated[str, Field(min_length=1)] | None = None
    url: Annotated[str, Field(min_length=1, max_length=MAX_URL_LENGTH)] | None = None
    sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if self.url is not None and self.sha256 is None:
            raise PydanticCustomError("invalid", "sha256 is required with url")
        if (self.path is None) == (self.sha256 is None):
            raise PydanticCustomError("invalid", "give either path or sha256, or url with sha256")
        return self


class RegisterDomainRequest(BaseModel):
    """PUT /admin/domains/{name}: the domain's rounds, in order."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stacks: Annotated[list[FileSource], Field(min_length=1)]
    dry_run: bool = False


class SetRouterRequest(FileSource):
    """PUT /admin/router."""
