"""Claims on the budget never exceed it, and only what is idle is evicted, least recently used first."""

from stack_store.residents import Residents, Want
from tests.fakes import ManualClock


def _residents(budget_bytes: int) -> tuple[Residents[str], list[str]]:
    gone: list[str] = []
    residents: Residents[str] = Residents(
        budget_bytes=budget_bytes, unload=gone.append, evicted=lambda key, num_bytes: None, clock=ManualClock()
    )
    return residents, gone


def _make_idle(residents: Residents[str], *wants: Want) -> None:
    for want in wants:
        residents.hold([want])
        residents.finish(want.key, want.key.upper())
        residents.unhold([want])


def test_the_least_recently_used_goes_first() -> None:
    residents, gone = _residents(30)
    a, b, c = Want("a", 10), Want("b", 10), Want("c", 10)
    _make_idle(residents, a, b, c)
    residents.hold([a])
    residents.unhold([a])
    assert residents.hold([Want("d", 15)]) == ["d"]
    assert gone == ["B", "C"]
    assert residents.claimed_bytes == 25


def test_what_is_held_or_loading_is_never_evicted() -> None:
    residents, gone = _residents(30)
    _make_idle(residents, Want("a", 10))
    residents.hold([Want("a", 10)])
    residents.hold([Want("b", 10)])
    assert not residents.has_room([Want("c", 11)])
    assert residents.has_room([Want("c", 10)])
    residents.unhold([Want("b", 10)])
    assert not residents.has_room([Want("c", 11)]), "b still loads"
    residents.finish("b", "B")
    assert residents.has_room([Want("c", 11)])
    assert gone == []
    residents.check_integrity()


def test_what_a_lease_wants_makes_no_room_for_the_rest_of_it() -> None:
    residents, gone = _residents(30)
    _make_idle(residents, Want("a", 20), Want("b", 10))
    assert not residents.has_room([Want("a", 20), Want("c", 20)])
    assert residents.has_room([Want("a", 20), Want("c", 10)])
    residents.hold([Want("a", 20), Want("c", 10)])
    assert gone == ["B"]
