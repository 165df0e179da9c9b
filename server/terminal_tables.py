"""Tables of what a server says about its domains and routes, for a terminal. Knows the shape of its answers."""

from typing import Any

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

Json = dict[str, Any]


def route_table(answer: Json) -> Table:
    """Scores and weights of a text, the highest first."""
    table = Table("domain", "score", "weight", title="no domain knows this text" if answer["gap"] else None)
    stale = set(answer.get("stale", ()))
    for domain, score in sorted(answer["scores"].items(), key=lambda item: -item[1]):
        weight = answer["mix"].get(domain)
        name = f"{domain} (stale)" if domain in stale else domain
        table.add_row(escape(name), f"{score:.3f}", "" if weight is None else f"{weight:.3f}")
    return table


def domains_table(answer: Json) -> Table:
    """Every registered domain, where it is, and what the router and the last checks of its files say of it."""
    table = Table("domain", "rounds", "on disk", "in memory", "state", "router", "files", box=SIMPLE)
    for domain in answer["domains"]:
        table.add_row(
            escape(domain["name"]),
            str(len(domain["stacks"])),
            decimal(domain["bytes"]),
            "" if domain["resident_bytes"] is None else decimal(domain["resident_bytes"]),
            _state(domain),
            domain["router"] or "",
            _files(domain),
        )
    return table


def _state(entry: Json) -> str:
    """`resident, pinned, 2 leases`."""
    pinned = ["pinned"] if entry["pinned"] else []
    leases = [f"{entry['leases']} leases"] if entry["leases"] else []
    return ", ".join([entry["state"], *pinned, *leases])


def _files(domain: Json) -> str:
    """`ok`, the number of damaged ones, or why none can be read."""
    if damaged := domain.get("damaged_files"):
        return f"{len(damaged)} damaged"
    return escape(domain.get("error", "ok"))


def router_lines(answer: Json) -> list[str]:
    """What has to be known of the router beside the table: nothing, if it fits the store."""
    router = answer["router"]
    if router is None:
        return ["the store has no router: unless a request says otherwise, the base answers alone"]
    said = {
        "stale": "the router was trained on other stacks of",
        "missing": "the router knows domains that are not registered:",
        "unknown": "the router does not know",
    }
    return [f"{text} {', '.join(router[key])}" for key, text in said.items() if router[key]]


def cache_tables(answer: Json) -> list[Table]:
    """A table a tier."""
    tiers = {"device": answer} | ({"host": answer["host"]} if answer["host"] is not None else {})
    return [_tier_table(name, tier) for name, tier in tiers.items()]


def _tier_table(name: str, tier: Json) -> Table:
    resident, budget = decimal(tier["resident_bytes"]), decimal(tier["budget_bytes"])
    leased, pinned = decimal(tier["leased_bytes"]), decimal(tier["pinned_bytes"])
    title = f"{name}: {resident} of {budget}, leased {leased}, pinned {pinned}, {tier['waiting']} waiting"
    table = Table("domain", "version", "bytes", "state", title=title, box=SIMPLE)
    for entry in sorted(tier["entries"], key=lambda entry: -float(entry["last_used"])):
        domain, _, version = entry["key"].partition("@")
        table.add_row(escape(domain), version, decimal(entry["bytes"]), _state(entry))
    return table
