"""Builds an evaluation's report from its answers. Pure arithmetic."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from app.domain.calibration import fit_calibration
from app.domain.claims import Verdict
from app.domain.evaluations import (
    Baselines,
    CalibrationReport,
    Comparison,
    EvaluationRun,
    Gate,
    GoldClaim,
    RunReport,
    Share,
)
from app.domain.predictions import Prediction
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
from app.domain.trajectories import ActionName

FOLDS = 5
GATE_P_VALUE = 0.05
OVERLAP_CUTS = 20
_WORD = re.compile(r"\w+")
VERDICTS = tuple(Verdict)


def build_run_report(
    run: EvaluationRun, gold: Sequence[GoldClaim], answers: Sequence[Prediction], seed: int, *, fit: bool = False
) -> RunReport:
    """The figures of one run. `answers`: in the order of `gold`. `fit`: also those of fitted probabilities."""
    pairs = list(zip(gold, answers, strict=True))
    correct = [answer.verdict is claim.label for claim, answer in pairs]
    confusion = {label: dict.fromkeys(VERDICTS, 0) for label in VERDICTS}
    for claim, answer in pairs:
        confusion[claim.label][answer.verdict] += 1
    precision, recall, f1 = _score_evidence(gold, answers)
    found = [_opened(answer, claim.page) for claim, answer in pairs if claim.page is not None]
    right_where_found = [
        answer.verdict is claim.label for claim, answer in pairs if claim.page and _opened(answer, claim.page)
    ]
    searches = [
        step.observation.page is not None
        for answer in answers
        for step in answer.steps
        if step.observation and step.action and step.action.name == ActionName.SEARCH
    ]
    fitted = _cross_fit_calibration(gold, answers) if fit and len(set(_clusters(gold))) > 1 else None
    decided = [answer for answer in answers if answer.verdict is not Verdict.NOT_ENOUGH_INFO]
    count = max(1, len(pairs))
    return RunReport(
        run=run,
        claims=len(pairs),
        correct=sum(correct),
        accuracy=_share(correct, gold, seed),
        by_probability=sum(_most_probable(a) is c.label for c, a in pairs) / count,
        recall={label: _ratio(confusion[label][label], sum(confusion[label].values())) for label in VERDICTS},
        macro_f1=_macro_f1(confusion),
        confusion=confusion,
        fever_score=sum(_earns_fever_score(claim, answer) for claim, answer in pairs) / count,
        evidence_precision=precision,
        evidence_recall=recall,
        evidence_f1=f1,
        page_found=_ratio(sum(found), len(found)),
        accuracy_on_found=_ratio(sum(right_where_found), len(right_where_found)),
        finished=sum(not answer.forced for answer in answers) / count,
        abstained=sum(answer.abstained for answer in answers) / count,
        valid_actions=_share_of_valid_actions(answers),
        search_hits=_ratio(sum(searches), len(searches)),
        quotes_verified=_ratio(sum(answer.quotes_verified for answer in decided), len(decided)),
        invented_observations=sum(
            step.observation is not None and step.observation.source == "model" for a in answers for step in a.steps
        ),
        steps=sum(len(answer.steps) for answer in answers) / count,
        completion_tokens=sum(answer.usage.completion_tokens for answer in answers) / count,
        seconds=sum(answer.timings.total for answer in answers) / count,
        calibration=_report_calibration([answer.probabilities for answer in answers], answers, gold),
        calibrated=_report_calibration(fitted, answers, gold) if fitted else None,
    )


def compare(
    first: RunReport,
    second: RunReport,
    gold: Sequence[GoldClaim],
    answers: tuple[Sequence[Prediction], Sequence[Prediction]],
    seed: int,
) -> Comparison:
    """Compare two runs over the same claims."""
    right = [[a.verdict is c.label for c, a in zip(gold, run, strict=True)] for run in answers]
    differences = [float(b) - float(a) for a, b in zip(*right, strict=True)]
    only_first, only_second = differences.count(-1.0), differences.count(1.0)
    low, high = clustered_interval(differences, _clusters(gold), seed)
    return Comparison(
        first=first.run.key,
        second=second.run.key,
        difference=Share(value=sum(differences) / max(1, len(differences)), low=low, high=high),
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar(only_first, only_second),
    )


def decide_gate(comparison: Comparison) -> Gate:
    """Promote only what is significantly better: everything else is kept, and inconclusive."""
    better = comparison.p_value < GATE_P_VALUE and comparison.difference.low > 0
    return Gate(comparison=comparison, outcome="promoted" if better else "inconclusive")


def build_baselines(gold: Sequence[GoldClaim], seed: int) -> Baselines:
    majority = max(Counter(claim.label for claim in gold).values(), default=0) / max(1, len(gold))
    overlap = judge_by_overlap(gold) if any(claim.read for claim in gold) else None
    return Baselines(majority=majority, overlap=None if overlap is None else _share(overlap, gold, seed))


# Baselines.


def judge_by_overlap(gold: Sequence[GoldClaim]) -> list[bool]:
    """Whether each claim is judged right by the threshold rule that was fitted to the claims of other pages."""
    shares = [_overlap(claim) for claim in gold]
    right = [False] * len(gold)
    for held_out, others in _folds(gold):
        bounds, labels = _fit_thresholds([shares[i] for i in others], [gold[i].label for i in others])
        for index in held_out:
            right[index] = labels[sum(shares[index] >= bound for bound in bounds)] is gold[index].label
    return right


def _folds(gold: Sequence[GoldClaim]) -> Iterator[tuple[list[int], list[int]]]:
    """(indices of a fold, indices of the claims of other pages), fold by fold. With one page, both are all claims."""
    clusters = _clusters(gold)
    numbers = {page: number % FOLDS for number, page in enumerate(dict.fromkeys(clusters))}
    for fold in range(FOLDS):
        held_out = [index for index, page in enumerate(clusters) if numbers[page] == fold]
        others = [index for index, page in enumerate(clusters) if numbers[page] != fold]
        if held_out:
            yield held_out, others or held_out


def _fit_thresholds(
    shares: Sequence[float], labels: Sequence[Verdict]
) -> tuple[tuple[float, float], tuple[Verdict, ...]]:
    """The two bounds, and the label of each of the three ranges, that judge most of these claims right."""
    cuts = sorted({sorted(shares)[round(number * (len(shares) - 1) / OVERLAP_CUTS)] for number in range(OVERLAP_CUTS)})
    best: tuple[int, tuple[float, float], tuple[Verdict, ...]] | None = None
    for low in cuts:
        for high in (cut for cut in cuts if cut >= low):
            ranges = [Counter[Verdict]() for _ in range(3)]
            for share, label in zip(shares, labels, strict=True):
                ranges[(share >= low) + (share >= high)][label] += 1
            right = sum(max(counted.values(), default=0) for counted in ranges)
            if best is None or right > best[0]:
                chosen = tuple(max(VERDICTS, key=lambda verdict, c=counted: c[verdict]) for counted in ranges)  # type: ignore[misc]
                best = right, (low, high), chosen
    assert best is not None
    return best[1], best[2]


def _overlap(claim: GoldClaim) -> float:
    """The share of the claim's words that were read."""
    words, read = _words(claim.claim), _words(claim.read)
    return len(words & read) / max(1, len(words))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold()))


# Parts of a run's report.


def _report_calibration(
    rows: Sequence[Mapping[Verdict, float]], answers: Sequence[Prediction], gold: Sequence[GoldClaim]
) -> CalibrationReport:
    """`rows`: the probabilities of each answer, raw or fitted. The verdicts are the answers'."""
    confidences = [row[answer.verdict] for row, answer in zip(rows, answers, strict=True)]
    correct = [answer.verdict is claim.label for answer, claim in zip(answers, gold, strict=True)]
    return CalibrationReport(
        ece=expected_calibration_error(confidences, correct),
        brier=brier(
            [[row[verdict] for verdict in VERDICTS] for row in rows], [VERDICTS.index(claim.label) for claim in gold]
        ),
        auroc=auroc(confidences, correct),
        accuracy_at_half_coverage=accuracy_at_coverage(confidences, correct, 0.5),
        reliability=tuple(
            (
                sum(confidences[i] for i in members) / len(members),
                sum(correct[i] for i in members) / len(members),
                len(members),
            )
            for members in equal_mass_bins(confidences)
        ),
        coverage=tuple(risk_coverage(confidences, correct)),
    )


def _cross_fit_calibration(gold: Sequence[GoldClaim], answers: Sequence[Prediction]) -> list[Mapping[Verdict, float]]:
    """The probabilities of each answer by a calibration that was fitted to the claims of other pages."""
    rows: list[Mapping[Verdict, float]] = [answer.probabilities for answer in answers]
    for held_out, others in _folds(gold):
        fitted = fit_calibration([answers[i].probabilities for i in others], [gold[i].label for i in others])
        for index in held_out:
            rows[index] = fitted.apply(answers[index].probabilities)
    return rows


def _share_of_valid_actions(answers: Sequence[Prediction]) -> float:
    names = set(ActionName)
    valid = [
        step.action is not None and step.action.name in names and bool(step.action.argument)
        for answer in answers
        for step in answer.steps
    ]
    return sum(valid) / max(1, len(valid))


def _score_evidence(
    gold: Sequence[GoldClaim], answers: Sequence[Prediction]
) -> tuple[float | None, float | None, float | None]:
    """Precision, recall and F1 of cited sentences, over the claims that have evidence."""
    hits = cited = wanted = 0
    for claim, answer in zip(gold, answers, strict=True):
        if claim.evidence:
            own = {(sentence.page, sentence.sentence_id) for sentence in answer.evidence}
            hits += len(own & set(claim.evidence))
            cited += len(own)
            wanted += len(set(claim.evidence))
    precision, recall = _ratio(hits, cited), _ratio(hits, wanted)
    if precision is None or recall is None:
        return precision, recall, None
    return precision, recall, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _earns_fever_score(claim: GoldClaim, answer: Prediction) -> bool:
    read = {(sentence.page, sentence.sentence_id) for sentence in answer.read}
    return answer.verdict is claim.label and (
        claim.label is Verdict.NOT_ENOUGH_INFO or (bool(claim.evidence) and set(claim.evidence) <= read)
    )


def _macro_f1(confusion: dict[Verdict, dict[Verdict, int]]) -> float:
    """The mean of the F1 of the labels that occur."""
    scores = []
    for label in VERDICTS:
        right, labelled = confusion[label][label], sum(confusion[label].values())
        judged = sum(row[label] for row in confusion.values())
        if labelled:
            scores.append(2 * right / (labelled + judged))
    return sum(scores) / max(1, len(scores))


def _opened(answer: Prediction, page: str | None) -> bool:
    return any(sentence.page == page for sentence in answer.read)


def _most_probable(answer: Prediction) -> Verdict:
    return max(VERDICTS, key=lambda verdict: answer.probabilities[verdict])


def _share(values: Sequence[bool], gold: Sequence[GoldClaim], seed: int) -> Share:
    low, high = clustered_interval([float(value) for value in values], _clusters(gold), seed)
    return Share(value=sum(values) / max(1, len(values)), low=low, high=high)


def _clusters(gold: Sequence[GoldClaim]) -> list[str]:
    return [claim.page or claim.claim for claim in gold]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
