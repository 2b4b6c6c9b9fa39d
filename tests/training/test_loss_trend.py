"""A run whose loss ends above where it began is warned about; noise alone is not."""

import random
from pathlib import Path

import pytest

from tests.training.conftest import OrderFactory
from tests.training.test_recipe import metrics, run
from worker.training.loss_trend import add_loss, warning


def warned(losses: list[float]) -> str | None:
    first: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    for loss in losses:
        first, last = add_loss(first, last, loss, len(losses))
    return warning(first, last, len(losses))


def test_a_loss_that_rises_is_named_with_both_figures() -> None:
    assert warned([2.79] * 50 + [46.8] * 50) == (
        "the loss rose: 2.79 over the first updates, 46.80 over the last ones; the adapter is probably worse than its "
        "base. Lower trainer.learning_rate"
    )


def test_a_run_that_diverges_within_its_first_updates_is_warned_about_even_if_it_recovers_in_part() -> None:
    assert warned([2.79, 30.0, 46.0, 40.0, 30.0, *[8.0] * 25])


@pytest.mark.parametrize("losses", [[2.8, 9.0], [2.8, 5.0, 9.0], [2.8, 2.9, 3.5, 9.0]])
def test_a_short_run_is_judged_too(losses: list[float]) -> None:
    assert warned(losses)


@pytest.mark.parametrize("losses", [[], [2.8], [2.8, 2.8], [2.8, 1.0, 1.2]])
def test_a_run_that_is_too_short_or_falls_is_not(losses: list[float]) -> None:
    assert warned(losses) is None


@pytest.mark.parametrize("seed", range(20))
def test_noise_of_a_fifth_around_a_falling_loss_does_not_warn(seed: int) -> None:
    draw = random.Random(seed)
    assert warned([(2.8 - 0.8 * n / 100) * draw.uniform(0.8, 1.2) for n in range(100)]) is None


@pytest.mark.parametrize(("rate", "diverges"), [(1.0, True), (1e-3, False)])
def test_a_run_at_a_learning_rate_of_one_is_warned_about_and_a_sane_one_is_not(
    make_order: OrderFactory, rate: float, diverges: bool
) -> None:
    spec = {"adapter": None, "quantization": None, "trainer": {"learning_rate": rate}}
    order = make_order(spec, updates=12, every=6)
    events = run(order)
    losses = [event["loss"] for event in metrics(events)]
    assert (losses[-1] > losses[0]) == diverges, losses
    (warning,) = events[-1]["warnings"] or [""]
    assert ("the loss rose" in warning) == diverges
    checkpoints = [event for event in events if event["event"] == "checkpoint"]
    assert bool(checkpoints[-1]["warnings"]) == diverges

    resumed = make_order(spec, updates=12, every=6, name="resumed", resume_from=Path(checkpoints[0]["path"]))
    assert run(resumed)[-1]["warnings"] == events[-1]["warnings"]
