"""Prints every setting of the server as Markdown: `python -m server.settings_table > docs/settings.md`.

Knows how fields of settings are declared, not what they configure.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from server.config import ENV_DELIMITER, ENV_PREFIX, Settings

DEFAULT_SAID = re.compile(r"(?:^|; )default: (.*)$")
UNITS = ((2**30, "GiB"), (2**20, "MiB"))

HEAD = """\
# Settings

Made from `server/config.py` by `python -m server.settings_table > docs/settings.md`.

A setting is `key` under `[section]` in a TOML file (`brainstacks serve --config FILE`), then the environment variable,
then a flag of `brainstacks serve`: the later one wins. A mistyped section, key or variable, or a value that does not
fit, is an error at the start that names it. In the environment, lists are separated by commas, tables are JSON, and an
empty variable counts as none.
"""


def settings_page() -> str:
    """The whole page."""
    parts = [HEAD]
    for section, field in Settings.model_fields.items():
        assert isinstance(field.annotation, type)
        parts.append(f"## {section}\n\n{field.annotation.__doc__}\n")
        parts.append("\n".join(_rows(section, field.annotation.model_fields)) + "\n")
    return "\n".join(parts)


def _rows(section: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    yield "| setting | environment variable | type | default | |"
    yield "|---|---|---|---|---|"
    for key, field in fields.items():
        variable = f"{ENV_PREFIX}{section}{ENV_DELIMITER}{key}".upper()
        text = (field.description or "").replace("|", "\\|")
        said = DEFAULT_SAID.sub("", text)
        yield f"| `{section}.{key}` | `{variable}` | {_type(field)} | {_default(field)} | {said} |"


def _type(field: FieldInfo) -> str:
    """`integer, 1 to 64`, or the values to choose from."""
    kinds = [kind for kind in get_args(field.annotation) or (field.annotation,) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if get_origin(field.annotation) is not None and NoneType not in get_args(field.annotation):
        return {list: "list of texts", dict: "table"}[get_origin(field.annotation)]  # type: ignore[index]
    name = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path"}[kinds[0]]
    return name + _bounds(field.metadata)


def _bounds(metadata: list[Any]) -> str:
    least = next((f"{bound.ge}" for bound in metadata if isinstance(bound, Ge)), None)
    most = next((f"{bound.le}" for bound in metadata if isinstance(bound, Le)), None)
    above = next((f"{bound.gt}" for bound in metadata if isinstance(bound, Gt)), None)
    if least is not None:
        return f", {least} to {most}" if most is not None else f", at least {least}"
    return f", above {above}" if above is not None else ""


def _default(field: FieldInfo) -> str:
    """What the description says of it, where a value would not tell."""
    if (said := DEFAULT_SAID.search(field.description or "")) is not None:
        return said[1]
    if field.default in (None, [], {}):
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, int):
        return f"`{field.default}`" + next(
            (
                f" ({field.default // unit} {name})"
                for unit, name in UNITS
                if not field.default % unit and field.default
            ),
            "",
        )
    return f"`{field.default:g}`" if isinstance(field.default, float) else f"`{field.default}`"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
