"""How many threads compute, and who has the last word."""

from server.threads import apply_thread_plan, thread_plan


def test_two_cores_get_two_threads_that_spin_briefly() -> None:
    assert thread_plan(2).variables == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "20000"}


def test_many_cores_are_not_all_taken() -> None:
    assert thread_plan(64).variables["OMP_NUM_THREADS"] == "8"


def test_environment_of_the_operator_stays() -> None:
    environ = {"OMP_NUM_THREADS": "1"}
    held = apply_thread_plan(thread_plan(2), environ, is_override=False)
    assert held == environ == {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "20000"}


def test_setting_beats_the_environment() -> None:
    environ = {"OMP_NUM_THREADS": "1"}
    held = apply_thread_plan(thread_plan(2, override=3), environ, is_override=True)
    assert held["OMP_NUM_THREADS"] == environ["OMP_NUM_THREADS"] == "3"
