"""The figures that `veritune demo` computes."""

from typing import Any

import pytest

from app.cli.demo import valid_action_rate, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 0, 0.0, 1.0), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775)],
)
def test_the_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


def test_the_share_of_valid_actions_counts_steps_without_any() -> None:
    search = {"action": {"name": "Search", "argument": "x"}}
    odd = {"action": {"name": "", "argument": "Look at [it"}}
    answers: list[dict[str, Any]] = [{"steps": [search, odd]}, {"steps": []}, {"steps": [{"action": None}]}]
    assert valid_action_rate(answers) == pytest.approx(1 / 4)
