"""Builds an evaluation's report as one HTML page that needs nothing else: no script, no font, no network."""

from collections.abc import Iterable, Sequence
from html import escape

from app.domain.claims import Verdict
from app.domain.evaluations import CalibrationReport, Comparison, EvaluationReport, GoldClaim, RunReport, Share
from app.domain.predictions import Prediction

ERRORS_SHOWN = 20
BAR_WIDTH, BAR_HEIGHT = 420, 30
SQUARE = 220
MARGIN = 34
LABELS = tuple(Verdict)
SHORT = {Verdict.SUPPORTS: "SUPPORTS", Verdict.REFUTES: "REFUTES", Verdict.NOT_ENOUGH_INFO: "NOT ENOUGH"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6878; --line: #d8dee7; --paper: #ffffff; --panel: #f5f7fa;
  --blue: #2f6fb7; --grey: #9aa5b4; --good: #2e8b57; --bad: #c0504d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa5b4; --line: #39424f; --paper: #14181e;
  --panel: #1c222b; --blue: #6ea8e6; --grey: #6b7686; --good: #5cc28a; --bad: #e08582; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 18px; margin: 40px 0 10px; }
h3 { font-size: 15px; margin: 0 0 8px; }
p { margin: 4px 0; }
.soft { color: var(--soft); }
code { font-size: 13px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0; }
.tile { flex: 1 1 160px; background: var(--panel); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 28px; line-height: 1.2; }
.panels { display: flex; flex-wrap: wrap; gap: 16px; }
.panel { max-width: 100%; overflow-x: auto; background: var(--panel); border-radius: 10px; padding: 14px 16px; }
table { border-collapse: collapse; }
td, th { padding: 5px 10px; text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 600; color: var(--soft); font-size: 13px; }
td:first-child, th:first-child { text-align: left; }
.wide { overflow-x: auto; }
.wide table { width: 100%; }
.wide tr + tr { border-top: 1px solid var(--line); }
.matrix { border-spacing: 3px; border-collapse: separate; }
.matrix td { min-width: 64px; text-align: center; border-radius: 6px; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .value { fill: var(--ink); }
details { background: var(--panel); border-radius: 8px; padding: 8px 14px; margin: 6px 0; }
summary { cursor: pointer; }
pre { white-space: pre-wrap; font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; margin: 8px 0; }
.tag { font-size: 12px; border-radius: 5px; padding: 1px 7px; color: #fff; }
.tag.good { background: var(--good); }
.tag.bad { background: var(--bad); }
"""


def render_page(report: EvaluationReport, gold: Sequence[GoldClaim], answers: dict[str, Sequence[Prediction]]) -> str:
    """The page. `answers`: run key → its answers, in the order of `gold`."""
    plain = [run for run in report.runs if run.run.control is None]
    best = max(plain, key=lambda run: run.accuracy.value)
    parts = [
        _head(report),
        _tiles(report, best),
        "<h2>Accuracy, with 95 % intervals clustered by page</h2>",
        f'<div class="panel">{_bars(report)}</div>',
        "<h2>Confusion: rows are labels, columns verdicts</h2>",
        _panels(_confusion(run) for run in report.runs),
        "<h2>Can the probabilities be trusted?</h2>",
        _panels(_calibration(run.calibration, run.run.name) for run in plain),
        _panels(_calibration(run.calibrated, f"{run.run.name}, fitted") for run in plain if run.calibrated),
        "<h2>All figures</h2>",
        _figures(report),
        "<h2>Runs compared, over the same claims</h2>" if report.comparisons else "",
        _comparisons(report),
        _gate(report),
        f"<h2>Wrong verdicts of {escape(best.run.name)}</h2>",
        _errors(gold, answers[best.run.key]),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(report.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{''.join(parts)}\n</body></html>\n"
    )


def _head(report: EvaluationReport) -> str:
    counts = ", ".join(f"{count} {label}" for label, count in report.labels.items())
    return (
        f"<h1>{escape(report.name)}</h1><p class=soft>{report.claims} claims ({counts}) of dataset "
        f"<code>{escape(report.dataset)}</code>, judged with the pages of <code>{escape(report.corpus)}</code>, "
        f"snapshot <code>{report.snapshot[:12]}</code></p>"
    )


def _tiles(report: EvaluationReport, best: RunReport) -> str:
    overlap = report.baselines.overlap
    tiles = [
        (f"{best.accuracy.value:.2f}", f"accuracy of {best.run.name}", _interval(best.accuracy)),
        (f"{best.macro_f1:.2f}", "macro-F1", "mean over the three labels"),
        (_rounded(best.page_found), "right page read", "of claims whose page is known"),
        (f"{best.calibration.ece:.2f}", "calibration error (ECE)", "0 is best"),
        (f"{report.baselines.majority:.2f}", "always one label", "the most frequent one"),
    ]
    if overlap is not None:
        tiles.append((f"{overlap.value:.2f}", "counting shared words", _interval(overlap)))
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{value}</b>{escape(what)}<br><span class="soft">{escape(more)}</span></div>'
        for value, what, more in tiles
    ) + "</div>"  # fmt: skip


def _bars(report: EvaluationReport) -> str:
    """Horizontal bars from 0 to 1, with their intervals as whiskers. Controls and baselines are grey."""
    rows: list[tuple[str, Share, str]] = [
        (run.run.name, run.accuracy, "--blue" if run.run.control is None else "--grey") for run in report.runs
    ]
    majority = report.baselines.majority
    rows.append(("always one label", Share(value=majority, low=majority, high=majority), "--grey"))
    if report.baselines.overlap is not None:
        rows.append(("counting shared words", report.baselines.overlap, "--grey"))
    left, drawn = 270, []
    for number, (name, share, colour) in enumerate(rows):
        y = number * BAR_HEIGHT
        low, high = (left + BAR_WIDTH * bound for bound in (share.low, share.high))
        middle = y + BAR_HEIGHT / 2
        drawn.append(
            f'<text x="{left - 10}" y="{middle + 4}" text-anchor="end" class="value">{escape(_clip(name))}</text>'
            f'<rect x="{left}" y="{y + 6}" width="{BAR_WIDTH * share.value:.1f}" height="{BAR_HEIGHT - 12}" rx="3" '
            f'style="fill:var({colour})"/>'
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 4}v8M{high:.1f} {middle - 4}v8" '
            'style="stroke:var(--ink);stroke-width:1.5;fill:none"/>'
            f'<text x="{left + BAR_WIDTH + 12}" y="{middle + 4}" class="value">{share.value:.3f}</text>'
        )
    height = len(rows) * BAR_HEIGHT
    ticks = "".join(
        f'<path d="M{left + BAR_WIDTH * tick} 0V{height}" style="stroke:var(--line)"/>'
        f'<text x="{left + BAR_WIDTH * tick}" y="{height + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in (0, 0.25, 0.5, 0.75, 1)
    )
    size = f"0 -4 {left + BAR_WIDTH + 70} {height + 26}"
    return (
        f'<svg viewBox="{size}" width="100%" role="img" aria-label="Accuracy of each run">{ticks}{"".join(drawn)}</svg>'
    )


def _confusion(run: RunReport) -> str:
    heads = "".join(f"<th>{SHORT[label]}</th>" for label in LABELS)
    rows = []
    for label in LABELS:
        total = max(1, sum(run.confusion[label].values()))
        cells = "".join(
            _cell(run.confusion[label][verdict], run.confusion[label][verdict] / total, right=label is verdict)
            for verdict in LABELS
        )
        rows.append(f"<tr><th>{SHORT[label]}</th>{cells}</tr>")
    return f'<h3>{escape(run.run.name)}</h3><table class="matrix"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def _cell(count: int, share: float, *, right: bool) -> str:
    colour = "--good" if right else "--bad"
    return (
        f'<td style="background:color-mix(in srgb, var({colour}) {round(70 * share)}%, var(--paper))" '
        f'title="{share:.0%} of this label">{count}</td>'
    )


def _calibration(found: CalibrationReport, name: str) -> str:
    reliability = [(confidence, accuracy) for confidence, accuracy, _ in found.reliability]
    return (
        f"<h3>{escape(name)}</h3><p class=soft>ECE {found.ece:.3f} · Brier {found.brier:.3f} · "
        f"AUROC {_number(found.auroc)} · accuracy at half coverage {_number(found.accuracy_at_half_coverage)}</p>"
        + _plot("confidence → accuracy, ten bins", reliability, dots=True, diagonal=True)
        + _plot("share of claims → accuracy", found.coverage, dots=False, diagonal=False)
    )


def _plot(title: str, points: Sequence[tuple[float, float]], *, dots: bool, diagonal: bool) -> str:
    """A square plot of points with both coordinates from 0 to 1."""

    def at(x: float, y: float) -> str:
        return f"{MARGIN + SQUARE * x:.1f} {SQUARE - SQUARE * y:.1f}"

    grid = "".join(
        f'<path d="M{at(0, tick)}L{at(1, tick)}M{at(tick, 0)}L{at(tick, 1)}" style="stroke:var(--line)"/>'
        f'<text x="{MARGIN - 6}" y="{SQUARE - SQUARE * tick + 4}" text-anchor="end">{tick:g}</text>'
        f'<text x="{MARGIN + SQUARE * tick}" y="{SQUARE + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in (0, 0.5, 1)
    )
    ideal = f'<path d="M{at(0, 0)}L{at(1, 1)}" style="stroke:var(--grey);stroke-dasharray:4 4"/>' if diagonal else ""
    line = "L".join(at(x, y) for x, y in points)
    marks = "".join(
        f'<circle cx="{MARGIN + SQUARE * x:.1f}" cy="{SQUARE - SQUARE * y:.1f}" r="4" style="fill:var(--blue)"/>'
        for x, y in points
    )
    drawn = f'<path d="M{line}" style="stroke:var(--blue);stroke-width:2;fill:none"/>' if points else ""
    return (
        f'<svg viewBox="-4 -10 {SQUARE + MARGIN + 20} {SQUARE + 54}" width="{SQUARE + MARGIN + 24}" role="img" '
        f'aria-label="{escape(title)}">{grid}{ideal}{drawn}{marks if dots else ""}'
        f'<text x="{MARGIN + SQUARE / 2}" y="{SQUARE + 36}" text-anchor="middle">{escape(title)}</text></svg>'
    )


def _figures(report: EvaluationReport) -> str:
    columns: list[tuple[str, list[str]]] = [
        ("accuracy", [f"{run.accuracy.value:.3f}" for run in report.runs]),
        ("by probability", [f"{run.by_probability:.3f}" for run in report.runs]),
        ("macro-F1", [f"{run.macro_f1:.3f}" for run in report.runs]),
        *((f"recall {SHORT[label]}", [_number(run.recall[label]) for run in report.runs]) for label in LABELS),
        ("FEVER score", [f"{run.fever_score:.3f}" for run in report.runs]),
        ("evidence precision", [_number(run.evidence_precision) for run in report.runs]),
        ("evidence recall", [_number(run.evidence_recall) for run in report.runs]),
        ("page found", [_number(run.page_found) for run in report.runs]),
        ("accuracy where it was found", [_number(run.accuracy_on_found) for run in report.runs]),
        ("finished by itself", [f"{run.finished:.3f}" for run in report.runs]),
        ("searches that hit", [_number(run.search_hits) for run in report.runs]),
        ("valid actions", [f"{run.valid_actions:.3f}" for run in report.runs]),
        ("S and R with verified quotations", [_number(run.quotes_verified) for run in report.runs]),
        ("invented Observations", [str(run.invented_observations) for run in report.runs]),
        ("steps a claim", [f"{run.steps:.1f}" for run in report.runs]),
        ("tokens written a claim", [f"{run.completion_tokens:.0f}" for run in report.runs]),
        ("seconds a claim, several at a time", [f"{run.seconds:.1f}" for run in report.runs]),
    ]
    heads = "".join(f"<th>{escape(run.run.name)}</th>" for run in report.runs)
    rows = "".join(
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{value}</td>' for value in values)}</tr>"
        for name, values in columns
    )
    return f'<div class="panel wide"><table><tr><th></th>{heads}</tr>{rows}</table></div>'


def _gate(report: EvaluationReport) -> str:
    """What became of the adapter that was to be promoted."""
    if report.gate is None:
        return ""
    names = {run.run.key: run.run.name for run in report.runs}
    adapter, beaten = names[report.gate.comparison.second], names[report.gate.comparison.first]
    said = "is better than" if report.gate.outcome == "promoted" else "is not shown to be better than"
    return f"<p>Gate: {escape(adapter)} {said} {escape(beaten)}: {report.gate.outcome}.</p>"


def _comparisons(report: EvaluationReport) -> str:
    if not report.comparisons:
        return ""
    names = {run.run.key: run.run.name for run in report.runs}

    def row(one: Comparison) -> str:
        return (
            f"<tr><td>{escape(names[one.second])} against {escape(names[one.first])}</td>"
            f"<td>{one.difference.value:+.3f}</td><td>{one.difference.low:+.3f} to {one.difference.high:+.3f}</td>"
            f"<td>{one.only_second}</td><td>{one.only_first}</td><td>{one.p_value:.2g}</td></tr>"
        )

    columns = ("", "difference", "95 % interval", "won", "lost", "McNemar p")
    heads = "".join(f"<th>{column}</th>" for column in columns)
    return f'<div class="panel wide"><table><tr>{heads}</tr>{"".join(map(row, report.comparisons))}</table></div>'


def _errors(gold: Sequence[GoldClaim], answers: Sequence[Prediction]) -> str:
    """The most confident wrong verdicts, with their trajectories."""
    wrong = [(claim, answer) for claim, answer in zip(gold, answers, strict=True) if answer.verdict is not claim.label]
    wrong.sort(key=lambda pair: -pair[1].confidence)
    shown = "".join(
        f"<details><summary>{escape(answer.claim)} <span class='tag bad'>{answer.verdict}</span> "
        f"<span class=soft>{answer.confidence:.2f}</span> <span class='tag good'>{claim.label}</span></summary>"
        f"<pre>{escape(answer.text)}</pre></details>"
        for claim, answer in wrong[:ERRORS_SHOWN]
    )
    order = "the most confident first; each has its verdict, its probability and the label"
    note = f"<p class=soft>{len(wrong)} of {len(gold)}, {order}.</p>"
    return note + shown if wrong else "<p>None.</p>"


def _panels(panels: Iterable[str]) -> str:
    return '<div class="panels">' + "".join(f'<div class="panel">{panel}</div>' for panel in panels) + "</div>"


def _interval(share: Share) -> str:
    return f"{share.low:.2f} to {share.high:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _clip(name: str, most: int = 40) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"
