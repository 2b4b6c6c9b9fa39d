"""Follows a job in the terminal until it ends."""

import time
from collections.abc import Callable
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from app.cli.client import get
from app.cli.errors import CommandError

POLL_SECONDS = 0.5
PRINT_SECONDS = 20.0
"""Where the output is no terminal, a line says this often how far a job is."""


def follow_job(
    client: httpx.Client,
    console: Console,
    job: dict[str, Any],
    done: str,
    total: str,
    figures: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """Show a job's progress until it has ended. Raises CommandError unless it succeeded."""
    columns = [
        TextColumn("  {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    ]
    printed_at = time.monotonic()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=job["progress"][total], figures="")
        while job["status"] in ("queued", "running"):
            time.sleep(POLL_SECONDS)
            job = get(client, f"/jobs/{job['id']}")
            progress = job["progress"]
            bar.update(task, description=job["status"], completed=progress[done], figures=figures(progress))
            if not console.is_terminal and time.monotonic() - printed_at > PRINT_SECONDS:
                printed_at = time.monotonic()
                console.print(f"  {progress[done]} of {progress[total]}  {figures(progress)}", highlight=False)
    if job["status"] in ("pausing", "paused"):
        raise CommandError(f"{job['name']} was paused; go on with POST /jobs/{job['id']}/resume")
    if job["status"] != "succeeded":
        error = job["error"] or {}
        raise CommandError(f"the job ended as {job['status']}: {error.get('message')} ({error.get('hint')})")
    return job
