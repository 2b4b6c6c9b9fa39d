"""Runs an evaluation, and shows its report in the terminal."""

import json
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.cli.client import ok
from app.cli.follow import follow_job

LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")


def follow_evaluation(client: httpx.Client, console: Console, job: dict[str, Any]) -> dict[str, Any]:
    """Show an evaluation's progress until it has ended. Raises CommandError unless it succeeded."""
    return follow_job(client, console, job, "done", "total", lambda progress: progress["run"] or "")


def get_artifact(client: httpx.Client, job: dict[str, Any], name: str) -> bytes:
    response = client.get(f"/jobs/{job['id']}/artifacts/{name}")
    if not response.is_success:
        ok(response)  # raises
    return response.content


def build_table(report: dict[str, Any], title: str = "claims") -> Table:
    """Accuracy and recall of each run. It fits a terminal of 80 columns."""
    table = Table(
        title=f"{report['claims']} {title}",
        caption="S, R, N: recall of SUPPORTS, REFUTES, NOT ENOUGH INFO. page: the claim's page was read.",
    )
    table.add_column("")
    for heading in ("accuracy", "95 % interval", "S", "R", "N", "page"):
        table.add_column(heading, justify="right", no_wrap=True)
    for report_of_run in report["runs"]:
        run, accuracy = report_of_run["run"], report_of_run["accuracy"]
        recalled = [_shown(report_of_run["recall"][label]) for label in LABELS]
        table.add_row(run["name"], *_with_interval(accuracy), *recalled, _shown(report_of_run["page_found"]))
    table.add_section()
    table.add_row("always one label", f"{report['baselines']['majority']:.2f}")
    if overlap := report["baselines"]["overlap"]:
        table.add_row("counting shared words", *_with_interval(overlap))
    return table


def _with_interval(share: dict[str, Any]) -> tuple[str, str]:
    return f"{share['value']:.2f}", f"{share['low']:.2f} to {share['high']:.2f}"


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def evaluate(client: httpx.Client, spec: dict[str, Any], page: Path) -> None:
    """Run an evaluation job, print its table, and write its page to `page`."""
    console = Console()
    job = ok(client.post("/evaluations", json=spec))
    runs = [run["name"] for run in job["plan"]["runs"]]
    console.print(f"[bold]{job['name']}[/]: {job['plan']['claims']} claims, each judged by: {'; '.join(runs)}")
    follow_evaluation(client, console, job)
    report = json.loads(get_artifact(client, job, "report.json"))
    console.print(build_table(report))
    if report.get("gate"):
        console.print(f"gate: {report['gate']['outcome']}")
    page.write_bytes(get_artifact(client, job, "report.html"))
    console.print(f"the whole report is in {page}", soft_wrap=True)
