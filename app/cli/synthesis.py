"""Runs a job that makes a dataset, and shows in the terminal what it made."""

import json
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from app.cli.client import ok
from app.cli.errors import CommandError
from app.cli.follow import follow_job
from app.domain.synthesis import REASONS


def run(client: httpx.Client, route: str, spec: dict[str, Any], path: Path) -> None:
    """Run the job, write its report to `path`, and print what was made and what was left out."""
    console = Console()
    job = ok(client.post(route, json=spec))
    try:
        done = follow_job(client, console, job, "rows_read", "rows_total", lambda now: f"{now['rows_made']} made")
    except CommandError:
        _write_report(client, job, path)
        raise
    report = _write_report(client, done, path)
    contrasts = f" with {report['contrasts']} contrasts" if report["contrasts"] else ""
    console.print(f"{report['rows_made']} of {report['rows_read']} rows made{contrasts}: dataset {report['dataset']}")
    console.print(_describe_counts(report))
    actions = report["actions"]
    console.print(
        f"{actions['searches_found']} of {actions['searches']} Searches opened a page, "
        f"{actions['lookups_found']} of {actions['lookups']} Lookups found a sentence"
    )
    if report["refused"]:
        console.print(_build_refusals(report))
    console.print(f"the whole report is in {path}", soft_wrap=True)


def _write_report(client: httpx.Client, job: dict[str, Any], path: Path) -> dict[str, Any]:
    """The report, which a job that made no row has, too. Empty if the job ended before it."""
    response = client.get(f"/jobs/{job['id']}/artifacts/report.json")
    if not response.is_success:
        return {}
    path.write_bytes(response.content)
    report: dict[str, Any] = json.loads(response.content)
    return report


def _describe_counts(report: dict[str, Any]) -> str:
    labels = ", ".join(f"{count} {label}" for label, count in report["labels"].items())
    steps = ", ".join(f"{count} of {number}" for number, count in report["steps"].items())
    splits = ", ".join(f"{count} {part}" for part, count in report["splits"].items())
    return f"labels: {labels}; steps: {steps}" + (f"; splits: {splits}" if splits else "")


def _build_refusals(report: dict[str, Any]) -> Table:
    table = Table(title=f"{sum(report['refused'].values())} rows left out")
    table.add_column("rows", justify="right")
    table.add_column("why")
    for code, count in report["refused"].items():
        table.add_row(str(count), REASONS.get(code, code))
    return table
