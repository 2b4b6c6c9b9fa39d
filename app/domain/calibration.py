"""Calibrates a verdict's probabilities by bias-corrected temperature scaling: a temperature, a bias for each verdict.

Guo et al. 2017 (arXiv:1706.04599) for the temperature, Alexandari et al. 2020 (arXiv:1901.06852) for the biases.
"""

import math
from collections.abc import Mapping, Sequence

from app.domain.claims import Verdict
from app.domain.frozen import Frozen

VERDICTS = tuple(Verdict)
SMALLEST = 1e-6
"""Probabilities below this count as this."""

PRIOR = 1.0
"""Weight of the penalty on the parameters, in claims: a few claims must not give extreme probabilities."""

STEPS = 200
LEAST_CLAIMS = 30


class Calibration(Frozen):
    """p ∝ exp(log p_raw / temperature + bias of the verdict). `claims`: how many it was fitted on."""

    temperature: float
    biases: dict[Verdict, float]
    claims: int

    def apply(self, raw: Mapping[Verdict, float]) -> dict[Verdict, float]:
        scale = 1 / self.temperature
        logits = [scale * _log(raw[verdict]) + self.biases[verdict] for verdict in VERDICTS]
        return dict(zip(VERDICTS, _softmax(logits), strict=True))


def fit_calibration(rows: Sequence[Mapping[Verdict, float]], labels: Sequence[Verdict]) -> Calibration:
    """Minimise the negative log-likelihood of the labels, by gradient descent with backtracking.

    `rows`: raw probabilities. The problem is convex in 1 / temperature and the biases.
    """
    logs = [[_log(row[verdict]) for verdict in VERDICTS] for row in rows]
    truths = [VERDICTS.index(label) for label in labels]
    point, step = [1.0, 0.0, 0.0, 0.0], 1.0
    value, gradient = _objective(point, logs, truths)
    for _ in range(STEPS):
        square = sum(slope * slope for slope in gradient)
        if square < 1e-12:
            break
        while True:
            candidate = [p - step * slope for p, slope in zip(point, gradient, strict=True)]
            candidate[0] = max(candidate[0], 1e-3)
            found, following = _objective(candidate, logs, truths)
            if found <= value - 1e-4 * step * square or step < 1e-9:
                break
            step /= 2
        if found >= value:
            break
        point, value, gradient, step = candidate, found, following, step * 2
    mean = sum(point[1:]) / len(VERDICTS)  # a constant added to all biases changes nothing
    biases = {verdict: bias - mean for verdict, bias in zip(VERDICTS, point[1:], strict=True)}
    return Calibration(temperature=1 / point[0], biases=biases, claims=len(rows))


def _objective(
    point: Sequence[float], logs: Sequence[Sequence[float]], truths: Sequence[int]
) -> tuple[float, list[float]]:
    """(the mean penalised negative log-likelihood, its gradient). `point`: 1 / temperature, then the biases."""
    count = max(1, len(logs))
    deviations = [point[0] - 1.0, *point[1:]]
    value = PRIOR * sum(one * one for one in deviations) / (2 * count)
    gradient = [PRIOR * one / count for one in deviations]
    for row, truth in zip(logs, truths, strict=True):
        shares = _softmax([point[0] * logit + bias for logit, bias in zip(row, point[1:], strict=True)])
        value -= math.log(max(shares[truth], 1e-300)) / count
        for number, share in enumerate(shares):
            error = (share - (number == truth)) / count
            gradient[0] += error * row[number]
            gradient[1 + number] += error
    return value, gradient


def _log(probability: float) -> float:
    return math.log(max(probability, SMALLEST))


def _softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    weights = [math.exp(logit - most) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]
