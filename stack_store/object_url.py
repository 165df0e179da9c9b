"""Decides which object URLs a caller may name: plain ones under a root. Knows text; opens nothing.

A URL is plain if every reader takes it for the same place: no '..', no credentials, no query, no chain of file systems.
Whatever is not plain is refused, never repaired.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from stack_store.errors import ObjectRefused, ObjectStorageInvalid

FILE_SCHEME = "file"
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*")
MAX_SHOWN = 300
FORBIDDEN = {
    "::": "chains file systems by '::'",
    "?": "has a query",
    "#": "has a fragment",
    "%": "contains '%': write the name as it is, without escapes",
    "\\": "contains a backslash",
}


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A plain URL under `root`, which ends in a slash."""

    text: str
    root: str

    @property
    def scheme(self) -> str:
        return self.text.partition("://")[0]

    @property
    def relative(self) -> str:
        """What follows the root."""
        return self.text.removeprefix(self.root)

    def __str__(self) -> str:
        return repr(self.text)


def check_root(root: str) -> str:
    """The root with a slash at its end. Raises ObjectStorageInvalid unless it names one folder or bucket plainly."""
    bare = root.removesuffix("/")
    fault = _fault(bare)
    if fault is None and bare == f"{FILE_SCHEME}://":
        fault = "names no folder"
    if fault is not None:
        raise ObjectStorageInvalid(f"root {shown_url(root)!r} {fault}")
    return f"{bare}/"


def check_url(url: str, roots: Sequence[str]) -> ObjectUrl:
    """The URL, if it lies under one of the roots that check_root returned. Raises ObjectRefused, naming the fault."""
    fault = _fault(url)
    if fault is not None:
        raise ObjectRefused(f"url {shown_url(url)!r} {fault}")
    for root in roots:
        if url.startswith(root):
            return ObjectUrl(url, root)
    raise ObjectRefused(f"url {shown_url(url)!r} is not under a root of store.object_roots")


def shown_url(url: str) -> str:
    """The URL for messages, without what may be a secret: user, password, query and fragment."""
    head, separator, rest = url.partition("://")
    if not separator:
        head, rest = "", url
    place, mark, _ = re.split(r"([?#])", rest, maxsplit=1) if re.search(r"[?#]", rest) else (rest, "", "")
    before, at, after = place.rpartition("@")
    authority, slash, name = place.partition("/")
    if at and (":" in before or "/" not in before):
        place = f"***@{after}"
    elif re.search(r":(?!\d*$)", authority):  # what follows is no port
        place = f"***{slash}{name}"
    return f"{head}{separator}{place}{mark and mark + '***'}"[:MAX_SHOWN]


def _fault(url: str) -> str | None:
    if not url.isprintable():
        return "contains a character that can't be printed"
    for text, fault in FORBIDDEN.items():
        if text in url:
            return fault
    scheme, separator, rest = url.partition("://")
    if not separator or not SCHEME.fullmatch(scheme):
        return "must be SCHEME://PLACE/NAME with the scheme in lower case"
    authority, *parts = rest.split("/")
    return _fault_of_place(authority, is_file=scheme == FILE_SCHEME) or _fault_of_path(parts)


def _fault_of_place(authority: str, *, is_file: bool) -> str | None:
    if "@" in authority:
        return "contains credentials"
    if is_file:
        return "names a host: a file URL has three slashes" if authority else None
    return None if authority.strip(".") else "names no bucket or host"


def _fault_of_path(parts: Sequence[str]) -> str | None:
    if ".." in parts:
        return "contains '..'"
    return "has an empty part or a '.' in its path" if "" in parts or "." in parts else None
