"""Puts changes into a recipe's content as TOML has it. Knows what no variant may change, not what settings mean."""

from collections.abc import Mapping
from typing import Any

Content = Mapping[str, Any]  # as TOML has it

# The experiment itself says these, for all of its variants.
FIXED_SETTINGS = {"seed": "seeds", "domains": "domains"}
# These make a domain the domain it is.
FIXED_OF_DOMAIN = ("name", "files", "sources")


def merged(content: Content, *changes: Content) -> dict[str, Any]:
    """The content with the changes put in, in their order: tables are merged, anything else is replaced."""
    result = dict(content)
    for change in changes:
        for key, value in change.items():
            before = result.get(key)
            result[key] = merged(before, value) if isinstance(before, Mapping) and isinstance(value, Mapping) else value
    return result


def with_changes(recipe: Content, changes: Content) -> dict[str, Any]:
    """A recipe's content with the changes put in; their table `domain` goes into every domain.

    Raises ValueError that names what a variant may not change.
    """
    _require_free(changes)
    sections = {key: value for key, value in changes.items() if key != "domain"}
    of_domains = changes.get("domain", {})
    return {**merged(recipe, sections), "domains": [merged(domain, of_domains) for domain in recipe["domains"]]}


def _require_free(changes: Content) -> None:
    for setting, place in FIXED_SETTINGS.items():
        if setting in changes:
            raise ValueError(f"{setting}: the experiment's own {place!r} says it for all variants")
    of_domains = changes.get("domain", {})
    if not isinstance(of_domains, Mapping):
        raise ValueError(f"domain: must be a table of settings for every domain, got {of_domains!r}")
    for setting in FIXED_OF_DOMAIN:
        if setting in of_domains:
            raise ValueError(f"domain.{setting}: cannot be the same for every domain, got {of_domains[setting]!r}")
