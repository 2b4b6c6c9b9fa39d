"""Statistics of verdicts, against libraries' and by hand."""

import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, roc_auc_score

from app.domain.statistics import (
    accuracy_at_coverage,
    auroc,
    brier,
    clustered_interval,
    equal_mass_bins,
    expected_calibration_error,
    mcnemar,
    risk_coverage,
)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 9), (9, 3), (40, 60), (5, 5), (300, 400)])
def test_mcnemar_is_an_exact_binomial_test(first: int, second: int) -> None:
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert mcnemar(first, second) == pytest.approx(wanted)


def test_the_area_under_the_curve_counts_ties_half() -> None:
    generator = random.Random(0)
    scores = [round(generator.random(), 1) for _ in range(200)]
    positive = [generator.random() < score for score in scores]
    assert auroc(scores, positive) == pytest.approx(roc_auc_score(positive, scores))
    assert auroc([0.1, 0.9], [True, True]) is None


def test_the_brier_score_sums_over_classes() -> None:
    generator = random.Random(1)
    rows = [[a / (a + b + c), b / (a + b + c), c / (a + b + c)] for a, b, c in np.random.default_rng(0).random((50, 3))]
    truths = [generator.randrange(3) for _ in rows]
    wanted = sum(brier_score_loss([t == k for t in truths], [row[k] for row in rows]) for k in range(3))
    assert brier(rows, truths) == pytest.approx(wanted)


def test_calibration_is_the_distance_of_confidence_and_accuracy() -> None:
    confidences = [0.6] * 50 + [0.9] * 50
    correct = [index % 5 < 3 for index in range(50)] + [index % 10 < 9 for index in range(50)]
    assert expected_calibration_error(confidences, correct) == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error([1.0] * 20, [False] * 20) == 1.0
    assert expected_calibration_error([], []) == 0


def test_bins_have_almost_equal_mass_and_every_value() -> None:
    bins = equal_mass_bins([0.5] * 7 + [0.9] * 16)
    assert sorted(index for members in bins for index in members) == list(range(23))
    assert {len(members) for members in bins} <= {2, 3}
    assert equal_mass_bins([0.3, 0.2]) == [[1], [0]]


def test_coverage_goes_from_the_most_confident_to_all() -> None:
    assert risk_coverage([0.9, 0.8, 0.8, 0.1], [True, True, False, False]) == [(0.25, 1.0), (0.75, 2 / 3), (1.0, 0.5)]
    assert accuracy_at_coverage([0.9, 0.8, 0.7, 0.1], [True, True, False, False], 0.5) == 1.0
    assert accuracy_at_coverage([], [], 0.5) is None


def test_an_interval_is_wider_where_claims_share_a_page() -> None:
    generator = random.Random(2)
    pages = [number // 10 for number in range(400)]
    of_page = [generator.random() < 0.5 for _ in range(40)]
    values = [float(of_page[page]) for page in pages]
    low, high = clustered_interval(values, pages, 0)
    alone = clustered_interval(values, list(range(400)), 0)
    assert low < sum(values) / len(values) < high
    assert high - low > 2 * (alone[1] - alone[0])
    assert clustered_interval(values, pages, 0) == (low, high)
    assert clustered_interval([1.0] * 5, ["a"] * 5, 0) == (1.0, 1.0)
    assert all(math.isnan(bound) for bound in clustered_interval([], [], 0))
