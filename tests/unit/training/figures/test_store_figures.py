"""Figures show exactly the numbers of a store's reports, whole and readable, and say what is not there."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.artist import Artist
from matplotlib.image import imread
from matplotlib.text import Text

from stack_store.errors import StoreNotFound
from stack_store.header import PROJECTIONS
from tests.unit.training.figures.synthetic_reports import write_store
from training.errors import ReportInvalid, TrainingError
from training.figures.canvas import DOTS_PER_INCH, drawing_style, save_sheet
from training.figures.coverage import missing_parts
from training.figures.store_figures import FigureResult, draw_figures, plan_figures
from training.figures.store_reports import read_store_reports

DOMAINS = ("chat", "code", "math")
LONG_NAMES = (
    "a-very-long-domain-name-with-many-parts-that-fills-all-64-letter",
    "x" * 64,
    "math",
)
FILES = [
    "validation_curves.png",
    "interference_isolated.png",
    "interference_ungated.png",
    "interference_routed.png",
    "subspace_cosines.png",
    "singular_values.png",
    "orthogonality_by_layer.png",
    "expert_utilisation.png",
    "discovered_combinations.png",
    "discovered_domains.png",
    "reliability.png",
    "gap_roc.png",
]
WIDTHS = {  # of three panels in a row, of four, of one, of two: inches
    "validation_curves.png": 9.0,
    "singular_values.png": 10.4,
    "orthogonality_by_layer.png": 7.0,
    "expert_utilisation.png": 8.4,
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("figures") / "store", DOMAINS)


@pytest.fixture(scope="module")
def drawn(store: Path) -> FigureResult:
    return draw_figures(store, store / "figures")


@pytest.fixture(scope="module")
def numbers(drawn: FigureResult) -> Any:
    return json.loads(drawn.written[-1].read_text())["figures"]


def drawn_numbers(store: Path) -> Any:
    """The numbers of every figure, each of which is drawn but not saved."""
    plans = list(plan_figures(read_store_reports(store)))
    with drawing_style():
        assert all(plan.draw().axes for plan in plans)
    return json.loads(json.dumps({plan.file: asdict(plan.numbers) for plan in plans}))


def report(store: Path, name: str) -> Any:
    return json.loads((store / "reports" / f"{name}.json").read_text())


def change(store: Path, name: str, edit: Callable[[Any], None]) -> None:
    content = report(store, name)
    edit(content)
    (store / "reports" / f"{name}.json").write_text(json.dumps(content))


def test_every_figure_of_a_whole_store_is_drawn(drawn: FigureResult, store: Path) -> None:
    assert [path.name for path in drawn.written] == [*FILES, "figures.json"]
    assert all(path.parent == store / "figures" for path in drawn.written)
    assert sorted(path.name for path in (store / "figures").iterdir()) == sorted([*FILES, "figures.json"])
    assert drawn.missing == ()


@pytest.mark.parametrize("file", FILES)
def test_a_picture_has_its_size_is_not_blank_and_cuts_nothing_off(file: str, drawn: FigureResult, store: Path) -> None:
    pixels = imread(store / "figures" / file)  # (height, width, 4) in [0, 1]
    assert pixels.shape[1] >= 5.0 * DOTS_PER_INCH
    if file in WIDTHS:
        assert pixels.shape[1] == pytest.approx(WIDTHS[file] * DOTS_PER_INCH, abs=1)
    assert (pixels.min(axis=2) < 0.5).mean() > 0.002
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 1).all()


def test_equal_numbers_give_equal_bytes(store: Path, drawn: FigureResult, tmp_path: Path) -> None:
    plan = next(plan_figures(read_store_reports(store)))
    with drawing_style():
        save_sheet(plan.draw(), tmp_path / plan.file)
    assert (tmp_path / plan.file).read_bytes() == drawn.written[0].read_bytes()


def test_validation_curves_put_the_rounds_one_after_the_other(numbers: Any, store: Path) -> None:
    panels = numbers["validation_curves.png"]["panels"]
    assert [panel["domain"] for panel in panels] == list(DOMAINS)
    for panel in panels:
        trained = report(store, panel["domain"])
        assert panel["base_loss"] == trained["base_loss"]
        steps_before = 0
        for curve, of_round in zip(panel["rounds"], trained["rounds"], strict=True):
            assert (curve["round"], curve["kept"]) == (of_round["round"], of_round["kept"])
            assert curve["steps"] == [steps_before + step for step, _ in of_round["validation"]]
            assert curve["losses"] == [loss for _, loss in of_round["validation"]]
            assert (curve["first_step"], curve["last_step"]) == (steps_before, steps_before + of_round["steps_run"])
            steps_before += of_round["steps_run"]


def test_interference_is_loss_and_loss_minus_base_where_both_were_trained(numbers: Any, store: Path) -> None:
    forgetting = report(store, "forgetting")
    changes = []
    for mode in ("isolated", "ungated", "routed"):
        matrix = numbers[f"interference_{mode}.png"]
        assert matrix["rows"] == ["base", *DOMAINS]
        assert matrix["losses"][0] == [forgetting["base"][name] for name in DOMAINS]
        assert matrix["changes"][0] == [0.0] * len(DOMAINS)
        for row, last in enumerate(DOMAINS):
            for column, name in enumerate(DOMAINS):
                loss = forgetting["after"][last][mode][name] if column <= row else None
                assert matrix["losses"][row + 1][column] == loss
                change = None if loss is None else loss - forgetting["base"][name]
                assert matrix["changes"][row + 1][column] == change
                changes += [] if change is None else [abs(change)]
    assert {numbers[f"interference_{mode}.png"]["colour_limit"] for mode in ("isolated", "routed")} == {max(changes)}


def test_cosines_are_means_over_projections_and_symmetric(numbers: Any, store: Path) -> None:
    cosines = report(store, "subspaces")["cosines"]
    maps = numbers["subspace_cosines.png"]
    for row, one in enumerate(DOMAINS):
        for column, other in enumerate(DOMAINS):
            if row == column:
                assert maps["all_projections"][row][column] is None
                continue
            of_pair = cosines[one].get(other) or cosines[other][one]
            assert maps["all_projections"][row][column] == pytest.approx(np.mean(list(of_pair.values())), rel=1e-12)
            for kind in PROJECTIONS:
                mean = np.mean([of_pair[f"{layer}.{kind}"] for layer in range(2)])
                assert maps["by_projection"][kind][row][column] == pytest.approx(mean, rel=1e-12)


def test_spectra_are_medians_over_layers_of_normalised_singular_values(numbers: Any, store: Path) -> None:
    values = report(store, "subspaces")["singular_values"]
    spectra = numbers["singular_values.png"]["by_projection"]
    assert list(spectra) == list(PROJECTIONS)
    for kind in PROJECTIONS:
        for name in DOMAINS:
            of_layers = np.array([values[name][f"{layer}.{kind}"] for layer in range(2)])
            expected = np.median(of_layers / of_layers[:, :1], axis=0)
            np.testing.assert_allclose(spectra[kind][name], expected, rtol=1e-12)


def test_layer_lines_are_means_over_the_projections_of_a_layer(numbers: Any, store: Path) -> None:
    subspaces = report(store, "subspaces")
    lines = numbers["orthogonality_by_layer.png"]
    assert list(lines["cosines"]) == list(DOMAINS[1:])  # the first has no earlier ones
    for layer in range(2):
        names = [f"{layer}.{kind}" for kind in PROJECTIONS]
        for index, domain in enumerate(DOMAINS):
            share = np.mean([subspaces["protected_share"][domain][name] for name in names])
            assert lines["protected_share"][domain][layer] == pytest.approx(share, rel=1e-12)
            if index:
                earlier = [subspaces["cosines"][domain][other][name] for other in DOMAINS[:index] for name in names]
                assert lines["cosines"][domain][layer] == pytest.approx(np.mean(earlier), rel=1e-12)


def test_expert_shares_are_means_over_the_projections_of_a_layer(numbers: Any, store: Path) -> None:
    maps = numbers["expert_utilisation.png"]
    distances = []
    for panel, domain in zip(maps["panels"], DOMAINS, strict=True):
        experts = report(store, domain)["experts"]
        expected = [
            [np.mean([experts[f"{layer}.{kind}"][expert] for kind in PROJECTIONS]) for layer in range(2)]
            for expert in range(4)
        ]
        np.testing.assert_allclose(panel["shares"], expected, rtol=1e-12)
        assert (panel["domain"], panel["uniform"]) == (domain, 0.25)
        assert (panel["lowest"], panel["highest"]) == (np.min(panel["shares"]), np.max(panel["shares"]))
        distances.append(np.abs(np.array(panel["shares"]) - 0.25).max())
    assert maps["colour_limit"] == max(distances)


def test_shares_of_combinations_are_those_of_the_report_and_add_up(numbers: Any, store: Path) -> None:
    labels = report(store, "discovery")["labels"]
    drawn_map, of_domains = (numbers[f"discovered_{kind}.png"] for kind in ("combinations", "domains"))
    assert drawn_map["rows"] == of_domains["rows"] == of_domains["columns"] == list(DOMAINS)
    for label, shares, contained in zip(DOMAINS, drawn_map["shares"], of_domains["shares"], strict=True):
        wins = labels[label]["wins"]
        assert shares == [wins.get(name, 0) / 50 for name in drawn_map["columns"]]
        assert sum(shares) == pytest.approx(1.0)
        assert contained == [labels[label]["shares"][name] for name in DOMAINS]
    totals = [sum(column) for column in zip(*drawn_map["shares"], strict=True)]
    assert totals == sorted(totals, reverse=True)


def test_combinations_beyond_the_most_frequent_are_one_column(tmp_path: Path) -> None:
    names = tuple(f"domain-{letter}" for letter in "abcdef")
    store = write_store(tmp_path / "store", names, num_layers=1, reports=["discovery"])
    drawn_map = drawn_numbers(store)["discovered_combinations.png"]
    assert len(drawn_map["columns"]) == 13
    assert drawn_map["columns"][-1] == "all others"
    assert all(sum(row) == pytest.approx(1.0) for row in drawn_map["shares"])


def test_reliability_shows_the_bins_of_every_router(numbers: Any, store: Path) -> None:
    of_report, drawn_curves = report(store, "router"), numbers["reliability.png"]
    assert drawn_curves["measured_against"] == of_report["targets"] == "discovered"
    assert [panel["learnt"] for panel in drawn_curves["panels"]] == ["discovered", "labels"]
    for panel in drawn_curves["panels"]:
        calibration = of_report["routers"][panel["learnt"]]["calibration"]
        assert panel["expected_error"] == calibration["expected_error"]
        for place, of_bin in enumerate(calibration["bins"]):
            assert panel["mean_scores"][place] == of_bin["mean_score"]
            assert panel["positive_shares"][place] == of_bin["positive_share"]
            assert panel["shares"][place] == pytest.approx(of_bin["num_scores"] / 200)


def test_gap_curves_have_their_chosen_point_on_them(numbers: Any, store: Path) -> None:
    gap, drawn_curves = report(store, "router")["gap"], numbers["gap_roc.png"]
    assert drawn_curves["threshold"] == gap["threshold"]
    for curve, side in zip(drawn_curves["curves"], ("calibration", "check"), strict=True):
        assert (curve["caught"], curve["area"]) == (gap[side]["curve"]["caught"], gap[side]["curve"]["area"])
        points = list(zip(curve["false_alarms"], curve["caught"], strict=True))
        assert (curve["chosen_false_alarms"], curve["chosen_caught"]) in points


def test_a_gap_that_is_not_calibrated_is_named_and_not_drawn(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", DOMAINS)
    change(store, "router", lambda content: content["gap"].update(calibration=None, check=None))
    assert missing_parts(read_store_reports(store)) == tuple(
        f"gap.{side} in reports/router.json" for side in ("calibration", "check")
    )
    assert list(drawn_numbers(store)) == [file for file in FILES if file != "gap_roc.png"]


def test_a_domain_without_outcomes_is_named_and_left_out(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", DOMAINS)
    change(store, "discovery", lambda content: content["labels"].pop("code"))
    assert missing_parts(read_store_reports(store)) == ("labels.code in reports/discovery.json",)
    assert drawn_numbers(store)["discovered_domains.png"]["rows"] == ["chat", "math"]


def test_a_store_of_one_domain_and_one_layer_is_drawn(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=1, num_experts=1, num_directions=1)
    numbers = drawn_numbers(store)
    assert list(numbers) == [file for file in FILES if file != "subspace_cosines.png"]
    assert numbers["orthogonality_by_layer.png"]["cosines"] == {}
    assert list(numbers["orthogonality_by_layer.png"]["protected_share"]) == ["chat"]
    assert missing_parts(read_store_reports(store)) == ("a second domain to compare in reports/subspaces.json",)


def test_missing_reports_are_named_and_the_other_figures_drawn(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", DOMAINS, reports=["domains"])
    (store / "reports" / "code.json").unlink()
    result = draw_figures(store, tmp_path / "figures")
    assert [path.name for path in result.written] == ["validation_curves.png", "expert_utilisation.png", "figures.json"]
    missing = ("code", "forgetting", "subspaces", "discovery", "router")
    assert result.missing == tuple(f"reports/{name}.json" for name in missing)
    panels = json.loads(result.written[-1].read_text())["figures"]["validation_curves.png"]["panels"]
    assert [panel["domain"] for panel in panels] == ["chat", "math"]


def test_missing_parts_are_named_and_drawn_as_gaps(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", DOMAINS)
    change(store, "chat", lambda content: content["experts"].pop("1.q_proj"))
    change(store, "code", lambda content: content["experts"].clear())

    def thin_out(forgetting: Any) -> None:
        forgetting["after"].pop("code")
        forgetting["after"]["math"]["isolated"].pop("chat")
        for modes in forgetting["after"].values():
            modes.pop("routed")
        forgetting["base"]["gone"] = 1.0

    change(store, "forgetting", thin_out)
    change(store, "subspaces", lambda content: content["cosines"]["math"].pop("code"))
    change(store, "subspaces", lambda content: content["singular_values"].pop("math"))
    change(store, "subspaces", lambda content: content["protected_share"].clear())
    assert missing_parts(read_store_reports(store)) == (
        "1 of the 14 projections of experts in reports/chat.json",
        "experts in reports/code.json",
        "after.*.routed in reports/forgetting.json",
        "after.code in reports/forgetting.json",
        "after.math.isolated.chat in reports/forgetting.json",
        "a place in the store for domain 'gone' in reports/forgetting.json",
        "singular_values.math in reports/subspaces.json",
        "protected_share in reports/subspaces.json",
        "cosines.math.code in reports/subspaces.json",
    )
    numbers = drawn_numbers(store)
    assert list(numbers) == [file for file in FILES if file != "interference_routed.png"]
    assert numbers["interference_isolated.png"]["rows"] == ["base", "chat", "math"]
    assert numbers["interference_isolated.png"]["losses"][2][0] is None
    assert numbers["subspace_cosines.png"]["all_projections"][1][2] is None
    assert numbers["orthogonality_by_layer.png"]["protected_share"] == {}


def test_a_direction_that_a_layer_does_not_have_counts_as_zero_there(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=3, reports=["subspaces"])
    spectra = {"0.q_proj": [4.0, 2.0, 1.0], "1.q_proj": [10.0, 1.0], "2.q_proj": []}
    change(store, "subspaces", lambda content: content["singular_values"]["chat"].update(spectra))
    spectra_drawn = drawn_numbers(store)["singular_values.png"]["by_projection"]
    assert spectra_drawn["q_proj"]["chat"] == [1.0, 0.3, 0.125]  # of the two layers that have any


def test_a_round_that_ended_with_a_loss_that_was_not_finite_is_drawn_without_it(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=1, reports=["domains"])

    def diverge(content: Any) -> None:
        content["rounds"][2] |= {"stop": "not finite", "validation": [[50, 1.5], [100, math.nan]], "steps_run": 100}

    change(store, "chat", diverge)
    rounds = drawn_numbers(store)["validation_curves.png"]["panels"][0]["rounds"]
    start = report(store, "chat")["rounds"][2]["start_loss"]
    assert (rounds[2]["steps"], rounds[2]["losses"]) == ([800, 850], [start, 1.5])
    assert rounds[2]["last_step"] == 900


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        *parents, last = path
        for key in parents:
            content = content[key]
        content[last] = value

    return edit


@pytest.mark.parametrize(
    ("name", "edit", "named"),
    [
        ("math", put("base_loss", value=math.nan), "base_loss is nan"),
        ("math", put("rounds", 1, "validation", 2, 1, value=math.inf), "rounds.1.validation.2.1 is inf"),
        ("math", put("rounds", 0, "start_loss", value=math.nan), "rounds.0.start_loss is nan"),
        ("math", put("experts", "1.up_proj", 3, value=math.nan), "experts.1.up_proj.3 is nan"),
        ("math", put("experts", "1.up_proj", value=[0.5, 0.5]), "[2, 4] experts"),
        ("math", put("experts", "2.up_proj", value=[0.25] * 4), "experts.2.up_proj: the store's base has 2 layers"),
        ("math", put("experts", "up_proj", value=[0.25] * 4), "'up_proj' is not layer.projection"),
        ("math", put("domain", value="code"), "the report of domain 'code'"),
        ("forgetting", put("base", "math", value=math.nan), "base.math is nan"),
        ("forgetting", put("after", "math", "routed", "chat", value=-math.inf), "after.math.routed.chat is -inf"),
        ("forgetting", put("after", "math", "mixed", value={}), "no mode 'mixed'"),
        ("forgetting", put("after", "math", "routed", "law", value=1.0), "base has no loss of 'law'"),
        ("subspaces", put("cosines", "math", "chat", "0.q_proj", value=math.nan), "cosines.math.chat.0.q_proj is nan"),
        ("subspaces", put("cosines", "math", "chat", "0.x", value=0.1), "cosines.math.chat: '0.x'"),
        ("subspaces", put("singular_values", "chat", "1.o_proj", 5, value=math.nan), "singular_values.chat.1.o_proj.5"),
        (
            "subspaces",
            put("protected_share", "code", "0.o_proj", value=math.nan),
            "protected_share.code.0.o_proj is nan",
        ),
        ("discovery", put("labels", "math", "shares", "chat", value=math.nan), "labels.math.shares.chat is nan"),
        ("discovery", put("labels", "math", "shares", value={"chat": 1.0}), "labels.math.shares has ['chat']"),
        ("discovery", put("labels", "math", "wins", "law", value=0), "labels.math.wins: 'law' is no combination"),
        ("discovery", put("labels", "math", "prompts", value=51), "counts 50 prompts"),
        (
            "router",
            put("routers", "labels", "calibration", "bins", 0, "mean_score", value=math.nan),
            "routers.labels.calibration.bins.0.0 is nan",
        ),
        (
            "router",
            put("routers", "discovered", "calibration", "bins", 14, "mean_score", value=None),
            "routers.discovered.calibration.bins.14 has 1 means",
        ),
        ("router", put("routers", "labels", "calibration", "bins", value=[]), "labels.calibration.bins has no score"),
        ("router", put("gap", "check", "curve", "caught", 0, value=math.nan), "gap.check.curve.caught.0 is nan"),
        ("router", put("gap", "calibration", "curve", "caught", value=[0.0]), "gap.calibration.curve has"),
    ],
)
def test_a_report_that_cannot_be_drawn_is_refused_by_name(
    name: str, edit: Callable[[Any], None], named: str, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", DOMAINS)
    change(store, name, edit)
    with pytest.raises(ReportInvalid) as caught:
        draw_figures(store, tmp_path / "figures")
    assert named in str(caught.value)
    assert f"{name}.json" in str(caught.value)
    assert not (tmp_path / "figures").exists()


def test_a_store_with_nothing_to_draw_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFound, match="nowhere"):
        draw_figures(tmp_path / "nowhere", tmp_path / "figures")
    bare = write_store(tmp_path / "bare", DOMAINS, reports=[])
    with pytest.raises(TrainingError, match=r"reports/chat\.json"):
        draw_figures(bare, tmp_path / "figures")
    empty = write_store(tmp_path / "empty", ())
    with pytest.raises(TrainingError, match="has no domain"):
        draw_figures(empty, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_an_output_that_is_no_folder_is_refused_by_name(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", ("chat",), num_layers=1, reports=["domains"])
    (tmp_path / "taken").touch()
    with pytest.raises(TrainingError, match="taken"):
        draw_figures(store, tmp_path / "taken")


def test_no_words_touch_each_other_or_leave_the_sheet(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", LONG_NAMES, num_layers=1)
    for plan in plan_figures(read_store_reports(store)):
        with drawing_style():
            figure = plan.draw()
            figure.draw_without_rendering()
        words = [text for text in figure.findobj(_has_words) if isinstance(text, Text)]
        assert words
        for text in words:
            corners = text.get_window_extent().corners()
            assert all(figure.bbox.contains(x, y) for x, y in corners), (plan.file, text)
        upright = [text for text in words if text.get_rotation() % 90 == 0]  # a slanted one is not its box
        for one, other in combinations(upright, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent()), (plan.file, one, other)


def _has_words(artist: Artist) -> bool:
    return isinstance(artist, Text) and artist.get_visible() and any(map(str.isalpha, artist.get_text()))
