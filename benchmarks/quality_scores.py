"""Scores of judged claims, from the answers that an evaluation job leaves (`answers.jsonl`)."""

import json
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from app.domain.statistics import accuracy_at_coverage, auroc, clustered_interval, expected_calibration_error
from benchmarks.fever import FeverClaim

SEED = 42
QUOTED_WORDS = 5
NEI = "NOT ENOUGH INFO"

Answer = dict[str, Any]


def read_answers(text: bytes) -> dict[str, list[Answer]]:
    """Name of the run → its answers in the order of the claims."""
    found: dict[str, list[Answer]] = {}
    for line in text.splitlines():
        row = json.loads(line)
        found.setdefault(row["run"]["name"], []).append(row["answer"])
    return found


def score(claims: Sequence[FeverClaim], answers: Sequence[Answer]) -> dict[str, float | None]:
    """Accuracy with its page-clustered interval, and what led to it."""
    right = [answer["verdict"] == claim.label for claim, answer in zip(claims, answers, strict=True)]
    low, high = clustered_interval([float(one) for one in right], [claim.page for claim in claims], SEED)
    confidences = [answer["confidence"] for answer in answers]
    decided = [(c, a) for c, a in zip(claims, answers, strict=True) if a["verdict"] != NEI]
    quoted = [(claim, answer) for claim, answer in decided if _is_quoted(answer)]
    return {
        "accuracy": fmean(right),
        "accuracy_low": low,
        "accuracy_high": high,
        "by_probability": fmean(_most_probable(a) == c.label for c, a in zip(claims, answers, strict=True)),
        "page_opened": fmean(_opened(a, c.page) for c, a in zip(claims, answers, strict=True)),
        "finished": fmean(not answer["forced"] for answer in answers),
        "nei_share": fmean(answer["verdict"] == NEI for answer in answers),
        "quoted": len(quoted) / max(1, len(decided)),
        "quoted_gold": _share(_quotes_gold(c, a) for c, a in quoted if c.evidence),
        "invented_observations": float(sum(_count_invented(answer) for answer in answers)),
        "ece": expected_calibration_error(confidences, right),
        "auroc": auroc(confidences, right),
        "accuracy_at_half_coverage": accuracy_at_coverage(confidences, right, 0.5),
        "seconds": fmean(answer["timings"]["total"] for answer in answers),
    }


def accuracy_where(
    claims: Sequence[FeverClaim], answers: Sequence[Answer], keep: Callable[[int], bool]
) -> tuple[float | None, int]:
    """(accuracy on the claims whose index is kept, their number)."""
    chosen = [i for i in range(len(claims)) if keep(i)]
    return _share(answers[i]["verdict"] == claims[i].label for i in chosen), len(chosen)


def _share(found: Any) -> float | None:
    values = list(found)
    return fmean(values) if values else None


def _most_probable(answer: Answer) -> str:
    probabilities: dict[str, float] = answer["probabilities"]
    return max(probabilities, key=probabilities.__getitem__)


def _opened(answer: Answer, page: str) -> bool:
    return any(step["observation"] and step["observation"]["page"] == page for step in answer["steps"])


def _is_quoted(answer: Answer) -> bool:
    """Whether the last Thought quotes five words or more, all of them observed."""
    spans = [sentence["text"][slice(*sentence["span"])] for sentence in answer["evidence"] if sentence["span"]]
    return bool(answer["quotes_verified"]) and any(len(text.split()) >= QUOTED_WORDS for text in spans)


def _quotes_gold(claim: FeverClaim, answer: Answer) -> bool:
    quoted = {(one["page"], one["sentence_id"]) for one in answer["evidence"] if one["span"]}
    return any((claim.page, sentence) in quoted for sentence in claim.evidence)


def _count_invented(answer: Answer) -> int:
    return sum(bool(step["observation"]) and step["observation"]["source"] == "model" for step in answer["steps"])
