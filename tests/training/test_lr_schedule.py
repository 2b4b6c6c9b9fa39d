"""The learning rate of each update."""

import pytest

from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from worker.training.lr_schedule import learning_rate


def rates(decay: str, updates: int = 10, warmup: int = 4) -> list[float]:
    spec = TrainSpec.model_validate(
        {"dataset": "d", "trainer": {"learning_rate": 0.1, "learning_rate_scheduler": {"decay": decay}}}
    )
    schedule = Schedule(
        rows=10,
        updates=updates,
        updates_per_epoch=updates,
        rows_per_update=1,
        max_rows=None,
        max_tokens=1,
        warmup_updates=warmup,
        checkpoint_every=1,
    )
    return [learning_rate(applied, schedule, spec.trainer) for applied in range(updates)]


def test_the_warm_up_rises_to_the_full_rate() -> None:
    assert rates("constant")[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_rate_then_falls_and_no_update_is_wasted_on_zero(decay: str) -> None:
    falling = rates(decay)[4:]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(0.1)
    assert 0 < falling[-1] < 0.02


def test_a_linear_decay_is_a_line() -> None:
    assert rates("linear", updates=4, warmup=0) == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_a_constant_rate_stays() -> None:
    assert set(rates("constant", warmup=0)) == {0.1}
