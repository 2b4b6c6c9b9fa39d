"""The report as a page: it needs nothing else, and shows users' text as text."""

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from app.domain.claims import Verdict
from app.domain.evaluation_report import build_baselines, build_run_report, compare, decide_gate
from app.domain.evaluations import EvaluationReport, EvaluationRun, GoldClaim
from app.domain.predictions import Prediction, PredictionUsage, Timings
from worker.evaluation_page import ERRORS_SHOWN, render_page

SCRIPT = "<script>alert('x')</script> & \"quoted\""
VOID = {"meta", "br"}


def predicted(claim: str, verdict: Verdict, confidence: float) -> Prediction:
    others = (1 - confidence) / 2
    return Prediction(
        id="pred_1",
        name=None,
        claim=claim,
        verdict=verdict,
        confidence=confidence,
        probabilities={one: confidence if one is verdict else others for one in Verdict},
        probability_method="verdict_branch",
        agrees=True,
        grounded=True,
        forced=False,
        abstained=False,
        steps=(),
        evidence=(),
        quotes_verified=False,
        text=f"Thought 1: {SCRIPT}",
        adapter=None,
        base_model="tiny",
        corpus="corp_1",
        usage=PredictionUsage(),
        timings=Timings(total=1.0, generation=1.0, search=0.0),
    )


def page_of(gold: Sequence[GoldClaim], runs: dict[str, list[Prediction]]) -> str:
    named = {key: EvaluationRun(adapter=None, base_model=key, name=SCRIPT) for key in runs}
    reports = [build_run_report(named[key], gold, answers, 0) for key, answers in runs.items()]
    comparisons = [
        compare(first, second, gold, (runs[first.run.key], runs[second.run.key]), 0)
        for first, second in pairwise(reports)
    ]
    report = EvaluationReport(
        job="job_1",
        name=SCRIPT,
        dataset="ds_1",
        corpus="corp_1",
        snapshot="0" * 64,
        claims=len(gold),
        labels={label: sum(one.label is label for one in gold) for label in Verdict},
        baselines=build_baselines(gold, 0),
        runs=tuple(reports),
        comparisons=tuple(comparisons),
        gate=decide_gate(comparisons[0]) if comparisons else None,
    )
    return render_page(report, gold, dict(runs))


class Balanced(HTMLParser):
    """Raises if a tag is closed that is not the innermost open one."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("wrong", [0, 1, 40])
def test_the_page_is_whole_and_shows_text_as_text(wrong: int) -> None:
    labels = list(Verdict)
    gold = [
        GoldClaim(claim=f"{SCRIPT} {number}", label=labels[number % 3], page=f"page {number // 2}", read=SCRIPT)
        for number in range(60)
    ]
    answers = [
        predicted(one.claim, labels[(number + (number < wrong)) % 3], 0.4 + number / 200)
        for number, one in enumerate(gold)
    ]
    page = page_of(gold, {"one": answers, "two": list(answers)})
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.seen
    assert re.findall(r"""(?:src|href|url)\s*[=(]|https?:|@import""", page) == []
    assert "is not shown to be better than" in page
    assert page.count("<details>") == min(wrong, ERRORS_SHOWN)
    assert page.count("<svg") == page.count("</svg>") == 5


def test_a_single_claim_has_a_page_too() -> None:
    gold = [GoldClaim(claim="one", label=Verdict.REFUTES, page=None)]
    page = page_of(gold, {"one": [predicted("one", Verdict.SUPPORTS, 1.0)]})
    assert "nan" not in page
