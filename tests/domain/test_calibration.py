"""Calibration: fitted parameters, and probabilities that are right as often as they say."""

import math
import random

import pytest

from app.domain.calibration import Calibration, fit_calibration
from app.domain.claims import Verdict
from app.domain.statistics import expected_calibration_error

VERDICTS = list(Verdict)


def drawn(count: int, temperature: float, bias: float, seed: int) -> tuple[list[dict[Verdict, float]], list[Verdict]]:
    """Raw probabilities that are too sure and lean to REFUTES, with labels drawn from the true ones."""
    generator = random.Random(seed)
    rows, labels = [], []
    for _ in range(count):
        true = [math.exp(generator.gauss(0, 1.5)) for _ in VERDICTS]
        labels.append(generator.choices(VERDICTS, true)[0])
        raw = [p**temperature for p in true]
        raw[1] *= math.exp(temperature * bias)
        rows.append({verdict: p / sum(raw) for verdict, p in zip(VERDICTS, raw, strict=True)})
    return rows, labels


def test_the_temperature_and_the_bias_are_found_again() -> None:
    rows, labels = drawn(4_000, temperature=3.0, bias=0.8, seed=0)
    fitted = fit_calibration(rows, labels)
    assert fitted.temperature == pytest.approx(3.0, rel=0.1)
    supports, refutes, neither = (fitted.biases[verdict] for verdict in VERDICTS)
    lean = refutes - (supports + neither) / 2
    assert lean == pytest.approx(-0.8, abs=0.12)
    assert sum(fitted.biases.values()) == pytest.approx(0.0, abs=1e-9)
    assert fitted.claims == 4_000


def test_rows_that_the_fit_never_saw_are_calibrated() -> None:
    fitted = fit_calibration(*drawn(400, temperature=3.0, bias=0.8, seed=1))
    rows, labels = drawn(4_000, temperature=3.0, bias=0.8, seed=2)

    def error(probabilities: list[dict[Verdict, float]]) -> float:
        chosen = [max(VERDICTS, key=lambda v, row=row: row[v]) for row in probabilities]  # type: ignore[misc]
        confidences = [row[verdict] for row, verdict in zip(probabilities, chosen, strict=True)]
        return expected_calibration_error(confidences, [v is label for v, label in zip(chosen, labels, strict=True)])

    assert error(rows) > 0.15
    assert error([fitted.apply(row) for row in rows]) < 0.04


def test_a_handful_of_claims_gives_nothing_extreme() -> None:
    rows = [{Verdict.SUPPORTS: 1.0, Verdict.REFUTES: 0.0, Verdict.NOT_ENOUGH_INFO: 0.0}] * 3
    fitted = fit_calibration(rows, [Verdict.SUPPORTS] * 3)
    assert 0.2 < fitted.temperature < 5
    assert max(map(abs, fitted.biases.values())) < 2
    assert sum(fitted.apply(rows[0]).values()) == pytest.approx(1.0)


def test_neutral_parameters_change_nothing() -> None:
    neutral = Calibration(temperature=1.0, biases=dict.fromkeys(VERDICTS, 0.0), claims=0)
    row = {Verdict.SUPPORTS: 0.2, Verdict.REFUTES: 0.5, Verdict.NOT_ENOUGH_INFO: 0.3}
    assert neutral.apply(row) == pytest.approx(row)
