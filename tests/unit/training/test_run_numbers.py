"""What a run's reports are turned into."""

import math

from stack_store.header import PROJECTIONS, Geometry
from training.recipe import StackSection
from training.reports import RoundReport
from training.run_numbers import joined_validation, near_uniform, num_parameters


def trained(round: int, steps_run: int, validation: list[tuple[int, float]]) -> RoundReport:
    return RoundReport(
        round=round,
        start_loss=validation[0][1],
        best_loss=min(loss for _, loss in validation if math.isfinite(loss)),
        kept=True,
        stop="steps",
        steps_run=steps_run,
        seconds=1.0,
        validation=tuple(validation),
        training=(),
    )


def test_rounds_join_where_the_later_one_begins() -> None:
    first = trained(1, 7, [(0, 3.0), (4, 1.0), (7, 2.0)])  # best before its end
    second = trained(2, 5, [(0, 1.1), (4, 0.9), (5, math.nan)])
    third = trained(3, 2, [(0, 0.9), (2, 0.8)])
    assert joined_validation([first, second, third]) == ((0, 3.0), (4, 1.0), (7, 1.1), (11, 0.9), (12, 0.9), (14, 0.8))
    assert joined_validation([first]) == ((0, 3.0), (4, 1.0), (7, 2.0))


def test_a_round_that_ended_before_an_evaluation_counts_all_its_steps() -> None:
    curve = joined_validation([trained(1, 6, [(0, 3.0), (4, 1.0)]), trained(2, 4, [(0, 1.0), (4, 0.5)])])
    assert curve == ((0, 3.0), (4, 1.0), (6, 1.0), (10, 0.5))


def test_parameters_are_what_a_stack_file_holds() -> None:
    shapes = {name: (16 * (1 + index), 8 * (7 - index)) for index, name in enumerate(PROJECTIONS)}
    shapes |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), (16, 8))  # they share an input
    geometry = Geometry(num_layers=3, shapes=shapes)
    of_experts = sum(3 * (4 * 2 * (i + o) + 4 * i) for i, o in shapes.values())
    alone = sum(3 * 5 * (i + o) for i, o in shapes.values())
    assert num_parameters(geometry, StackSection(num_experts=4, rank=2, top_k=2)) == of_experts
    assert num_parameters(geometry, StackSection(num_experts=1, rank=5, top_k=1)) == alone


def test_near_uniform_counts_the_experts_within_40_percent() -> None:
    assert near_uniform((0.15, 0.35, 0.2, 0.3)) == 1.0
    assert near_uniform((0.14, 0.36, 0.25, 0.25)) == 0.5
    assert near_uniform((0.5, 0.5, 0.0, 0.0)) == 0.0
    assert near_uniform((1.0,)) == 1.0
