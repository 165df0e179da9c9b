"""Model names and extensions become choices."""

import pytest

from server.errors import InvalidRequest, ModelNotFound
from server.mixes import MixChoice, choose_mix, model_names, show_mix
from server.schemas import MixRequest


def choose(
    model: str | None = None, extension: MixRequest | None = None, served_name: str = "org/base:q4"
) -> MixChoice:
    return choose_mix(model=model, extension=extension, served_name=served_name, domains=["chat", "math"])


@pytest.mark.parametrize(
    ("model", "choice"),
    [
        (None, MixChoice("auto")),
        ("org/base:q4", MixChoice("auto")),
        ("org/base:q4:base", MixChoice("base")),
        ("org/base:q4:math", MixChoice("explicit", {"math": 1.0})),
    ],
)
def test_model_names_may_hold_slashes_and_colons(model: str | None, choice: MixChoice) -> None:
    assert choose(model) == choice


@pytest.mark.parametrize("model", ["org/base", "org/base:q4:", "org/base:q4:law", "math", "org/base:q4:math:base", ""])
def test_other_names_are_unknown(model: str) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        choose(model)


def test_extension_decides_when_the_name_does_not() -> None:
    assert choose(extension=MixRequest(mix={"math": 0.5})) == MixChoice("explicit", {"math": 0.5})
    assert choose(extension=MixRequest(mode="all")) == MixChoice("all")
    assert choose(extension=MixRequest()) == MixChoice("auto")


def test_name_and_extension_together_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="fixes the mix"):
        choose("org/base:q4:math", MixRequest(mode="base"))
    assert choose("org/base:q4:math", MixRequest()).kind == "explicit"


def test_every_listed_model_can_be_asked_for() -> None:
    for name in model_names("org/base:q4", ["chat", "math"]):
        choose(name)


def test_mix_is_shown_in_one_order() -> None:
    assert show_mix({"math": 0.931, "chat": 0.2}) == "chat=0.20,math=0.93"
    assert show_mix({}) == "base"
