"""Writes settings as TOML text. Knows TOML's values but dates, not what the settings mean."""

import json
from collections.abc import Mapping
from typing import Any


def as_toml(content: Mapping[str, Any]) -> str:
    """A text that reads back as the content, whose keys are bare: letters, digits, `_` and `-`.

    Outer tables become sections, inner ones stand on the line of their key. Raises TypeError for a value that is not
    a string, number, bool, list or table.
    """
    plain = {key: value for key, value in content.items() if not isinstance(value, Mapping)}
    sections = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    parts = [_lines(plain), *(f"[{name}]\n{_lines(section)}" for name, section in sections.items())]
    return "\n".join(filter(None, parts))


def _lines(table: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {_value(value)}\n" for key, value in table.items())


def _value(value: Any) -> str:
    if isinstance(value, str):
        # A JSON string is a TOML string but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"TOML text of a {type(value).__name__} is not written here: {value!r}")
