"""What the soak excuses."""

from tests.soak import Spells


def test_spell_excuses_whom_it_touched() -> None:
    spells = Spells()
    before = spells.watch("law")
    assert not before()
    spells.begin("law")
    during, other = spells.watch("law"), spells.watch("math")
    spells.end("law")
    after = spells.watch("law")
    assert [watch() for watch in (before, during, other, after)] == [True, True, False, False]
