"""Statistics of verdicts: intervals, a paired test, and how far probabilities can be trusted. Standard library only."""

import math
import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import pairwise

RESAMPLES = 1_000
BINS = 10


def clustered_interval(values: Sequence[float], clusters: Sequence[Hashable], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, by a bootstrap of whole clusters (Efron and Tibshirani 1993).

    Claims about one page are not independent: `clusters` has the page of each value. With a single cluster there is
    nothing to resample, and the interval is that of the values alone. (nan, nan) without values.
    """
    grouped: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        grouped[cluster].append(value)
    groups = list(grouped.values()) if len(grouped) > 1 else [[value] for value in values]
    if not groups:
        return math.nan, math.nan
    sums = [(sum(group), len(group)) for group in groups]
    generator = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        drawn = generator.choices(sums, k=len(sums))
        means.append(sum(total for total, _ in drawn) / sum(count for _, count in drawn))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]


def mcnemar(only_first: int, only_second: int) -> float:
    """The p-value of McNemar's exact test. The arguments count the pairs in which only one of the two was right."""
    trials = only_first + only_second
    if trials == 0:
        return 1.0
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, tail / (1 << (trials - 1)))


def expected_calibration_error(confidences: Sequence[float], correct: Sequence[bool]) -> float:
    """ECE over bins of equal mass: the mean distance of confidence and accuracy (Guo et al. 2017, arXiv:1706.04599)."""
    return sum(
        len(members) * abs(_mean(confidences, members) - _mean(correct, members))
        for members in equal_mass_bins(confidences)
    ) / max(1, len(confidences))


def equal_mass_bins(confidences: Sequence[float], bins: int = BINS) -> list[list[int]]:
    """Indices of the values by confidence, in `bins` groups of almost equal size. Empty groups are left out."""
    order = sorted(range(len(confidences)), key=lambda index: (confidences[index], index))
    bounds = [round(number * len(order) / bins) for number in range(bins + 1)]
    return [order[low:high] for low, high in pairwise(bounds) if low < high]


def brier(probabilities: Sequence[Sequence[float]], truths: Sequence[int]) -> float:
    """The mean squared distance of the probabilities from the truth, summed over classes (Brier 1950): 0 to 2."""
    return sum(
        sum((p - (number == truth)) ** 2 for number, p in enumerate(row))
        for row, truth in zip(probabilities, truths, strict=True)
    ) / max(1, len(truths))


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    """The area under the ROC curve: how often a positive has a higher score than a negative, ties counted half.

    None unless there are positives and negatives.
    """
    positives = sum(positive)
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    order = sorted(range(len(scores)), key=scores.__getitem__)
    rank_sum, start = 0.0, 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        mean_rank = (start + 1 + end) / 2
        rank_sum += mean_rank * sum(positive[index] for index in order[start:end])
        start = end
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def risk_coverage(confidences: Sequence[float], correct: Sequence[bool]) -> list[tuple[float, float]]:
    """(coverage, accuracy) of the most confident claims, for every coverage at which the confidence changes."""
    order = sorted(range(len(confidences)), key=lambda index: -confidences[index])
    curve, right = [], 0
    for number, index in enumerate(order, 1):
        right += correct[index]
        if number == len(order) or confidences[order[number]] != confidences[index]:
            curve.append((number / len(order), right / number))
    return curve


def accuracy_at_coverage(confidences: Sequence[float], correct: Sequence[bool], coverage: float) -> float | None:
    """Accuracy of the most confident share `coverage` of claims. None without claims."""
    order = sorted(range(len(confidences)), key=lambda index: (-confidences[index], index))
    chosen = order[: math.ceil(coverage * len(order))]
    return _mean(correct, chosen) if chosen else None


def _mean(values: Sequence[float], members: Sequence[int]) -> float:
    return sum(values[index] for index in members) / len(members)
