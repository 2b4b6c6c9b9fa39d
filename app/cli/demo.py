"""`veritune demo`: upload, train, publish, judge and compare, over HTTP like any client."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from app.cli.client import client_of, get, ok
from app.cli.demo_state import DEMO, demo_spec, leave_paused, store_prediction, upload
from app.cli.errors import CommandError
from app.settings import Settings

START_SECONDS = 600.0
CHUNK = 16
"""Claims in one request. Two requests run at a time, and the progress bar moves when one is answered."""

UNGROUNDED_CLAIMS = 15
CONFIDENCE_Z = 1.96


@dataclass(frozen=True, slots=True)
class Judged:
    """One model's answers to the held-out claims, in order. `ungrounded`: those without a corpus and a grammar."""

    name: str
    answers: list[dict[str, Any]]
    ungrounded: list[dict[str, Any]]
    seconds: float


def demo(settings: Settings, examples: Path, *, keep: bool) -> None:
    """Run the demo against the running service, or start one. Raises CommandError."""
    missing = [n for n in ("train.jsonl", "heldout.jsonl", "corpus.jsonl") if not (examples / n).is_file()]
    if missing:
        raise CommandError(
            f"{examples} lacks {', '.join(missing)}; run this in the project's directory, or pass --examples"
        )
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # raises SystemExit, so that `_service` stops what it started
    console = Console()
    with _service(settings, console, keep=keep) as client:
        train = examples / "train.jsonl"
        corpus = upload(client, "/corpora", DEMO, "corpus.jsonl", (examples / "corpus.jsonl").read_bytes())
        dataset = upload(client, "/datasets", DEMO, train.name, train.read_bytes())
        console.print(
            f"[bold]1[/] uploaded {corpus['pages']} pages and {dataset['rows']} trajectories "
            f"({', '.join(f'{n} {label}' for label, n in dataset['report']['labels'].items())})"
        )
        job = _train(client, console, train)
        adapter = get(client, f"/adapters/{job['adapter_id']}")
        console.print(f"[bold]3[/] published {adapter['id']} ({adapter['bytes'] / 1e6:.1f} MB)")
        ok(client.post(f"/adapters/{adapter['id']}/promote"))
        store_prediction(client, corpus["id"])
        held_out = (examples / "heldout.jsonl").read_text("utf-8").splitlines()
        claims = [json.loads(line) for line in held_out]
        judged = [
            _judge(client, console, name, claims, reference, corpus["id"])
            for name, reference in (("base", None), ("adapter", adapter["id"]))
        ]
        _show(console, claims, judged)
        _next_steps(console, client, keep=keep)


@contextmanager
def _service(settings: Settings, console: Console, *, keep: bool) -> Iterator[httpx.Client]:
    """A client of the running service. Starts the service if it does not run."""
    with client_of(settings) as client:
        if _status(client) is not None:
            yield client
            return
        log = settings.home_path / "up.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"[dim]starting veritune up; its log is {log}[/]")
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "app.cli", "up"], stdout=out, stderr=out, start_new_session=True
            )
        try:
            _wait_until_ready(client, process, log, console)
            yield client
        finally:
            if not keep:
                process.send_signal(signal.SIGTERM)
                process.wait(90)


def _wait_until_ready(client: httpx.Client, process: "subprocess.Popen[bytes]", log: Path, console: Console) -> None:
    until = time.monotonic() + START_SECONDS
    with console.status("starting") as shown:
        while _status(client) != 200:
            shown.update(f"starting (the first time downloads and converts the base model)  [dim]{_last_line(log)}[/]")
            if process.poll() is not None:
                raise CommandError(f"veritune up ended; the last lines of {log}:\n{_tail(log)}")
            if time.monotonic() > until:
                raise CommandError(f"the service was not ready after {START_SECONDS:.0f} s; see {log}")
            time.sleep(0.2)


def _tail(log: Path, lines: int = 5) -> str:
    return "\n".join(log.read_text("utf-8", errors="replace").splitlines()[-lines:])


def _last_line(log: Path) -> str:
    """The log's last line for the console, without what a progress bar overwrote."""
    return escape(_tail(log, 1).rpartition("\r")[2].strip()[:100])


def _status(client: httpx.Client) -> int | None:
    try:
        return client.get("/health/ready", timeout=3).status_code
    except httpx.TransportError:
        return None


def _train(client: httpx.Client, console: Console, train: Path) -> dict[str, Any]:
    job = ok(client.post("/jobs", json=demo_spec(client)))
    leave_paused(client, train)
    plan = job["plan"]
    console.print(
        f"[bold]2[/] training {plan['base_model']} in 4 bits on {plan['rows_trained']} trajectories, "
        f"{plan['total_updates']} updates of {plan['rows_per_update']} (about {plan['lengths']['median']} tokens each)"
    )
    columns = [
        TextColumn("  {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("queued", total=plan["total_updates"], figures="")
        while job["status"] in ("queued", "running"):
            time.sleep(0.5)
            job = get(client, f"/jobs/{job['id']}")
            progress = job["progress"]
            figures = ""
            if progress["loss"] is not None:
                figures = f"loss {progress['loss']:.3f} · {progress['tokens_per_second']:.0f} tokens/s"
            bar.update(task, description=job["status"], completed=progress["update"], figures=figures)
    if job["status"] != "succeeded":
        error = job["error"] or {}
        raise CommandError(f"the job ended as {job['status']}: {error.get('message')} ({error.get('hint')})")
    return job


def _judge(
    client: httpx.Client,
    console: Console,
    name: str,
    claims: list[dict[str, Any]],
    adapter: str | None,
    corpus: str,
) -> Judged:
    asks = [{"claim": row["claim"], "adapter": adapter, "corpus": corpus, "max_steps": 4} for row in claims]
    ungrounded = [
        {"claim": row["claim"], "adapter": adapter, "mode": "ungrounded"} for row in claims[:UNGROUNDED_CLAIMS]
    ]
    columns = [TextColumn("  {task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console) as bar:
        started = time.monotonic()
        answers = _predict(client, bar, f"judging {len(claims)} held-out claims with the {name}", asks)
        seconds = time.monotonic() - started
        written = _predict(client, bar, f"letting the {name} write {len(ungrounded)} trajectories alone", ungrounded)
    failed = next((answer for answer in [*answers, *written] if "verdict" not in answer), None)
    if failed is not None:
        raise CommandError(f"a claim could not be judged: {failed['detail']}")
    return Judged(name, answers, written, seconds)


def _predict(client: httpx.Client, bar: Progress, what: str, asks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers, in order."""
    task = bar.add_task(what, total=len(asks))

    def answer(chunk: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = ok(client.post("/predict/batch", json={"requests": chunk}))["data"]
        bar.advance(task, len(chunk))
        return found

    chunks = [asks[start : start + CHUNK] for start in range(0, len(asks), CHUNK)]
    with ThreadPoolExecutor(2) as pool:
        return [one for answers in pool.map(answer, chunks) for one in answers]


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion (Wilson 1927)."""
    if trials == 0:
        return 0.0, 1.0
    share, z2 = successes / trials, CONFIDENCE_Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = CONFIDENCE_Z * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return centre - spread, centre + spread


def valid_action_rate(answers: list[dict[str, Any]]) -> float:
    """Share of well-formed actions among the steps that a model wrote without a grammar."""
    steps = [step for answer in answers for step in answer["steps"] or [{"action": None}]]
    valid = [s for s in steps if s["action"] and s["action"]["name"] in ("Search", "Lookup", "Finish")]
    return len(valid) / len(steps) if steps else 0.0


def _show(console: Console, claims: list[dict[str, Any]], judged: list[Judged]) -> None:
    table = Table(title=f"{len(claims)} held-out claims, about pages never trained on")
    for heading in (
        "",
        "accuracy (95 % interval)",
        "page found",
        "agrees",
        "valid actions without grammar",
        "claims/s",
    ):
        table.add_column(heading, justify="right" if heading else "left")
    for model in judged:
        right = sum(a["verdict"] == row["label"] for a, row in zip(model.answers, claims, strict=True))
        low, high = wilson(right, len(claims))
        found = sum(bool(a["evidence"]) for a in model.answers)
        agreeing = sum(a["agrees"] for a in model.answers)
        table.add_row(
            model.name,
            f"{right / len(claims):.2f} ({low:.2f} to {high:.2f})",
            f"{found / len(claims):.2f}",
            f"{agreeing / len(claims):.2f}",
            f"{valid_action_rate(model.ungrounded):.2f}",
            f"{len(claims) / model.seconds:.1f}",
        )
    console.print(table)
    for model in judged:
        shown = next(
            (a for a, r in zip(model.answers, claims, strict=True) if a["verdict"] == r["label"]),
            model.answers[0],
        )
        gold = next(row["label"] for a, row in zip(model.answers, claims, strict=True) if a is shown)
        console.print(f"\n[bold]{model.name}[/] on: {shown['claim']}  [dim](gold: {gold})[/]")
        for line in shown["text"].splitlines():
            console.print(f"  {line}", markup=False, highlight=False)
        console.print(
            f"  → {shown['verdict']} with probability {shown['confidence']:.2f}; "
            f"{len(shown['evidence'])} sentences read; {shown['timings']['total']:.2f} s"
        )


def _next_steps(console: Console, client: httpx.Client, *, keep: bool) -> None:
    where = f"{client.base_url}/docs" if keep else "make up, then http://127.0.0.1:8000/docs"
    console.print(
        f"\n[bold]Where to go next[/]\n  try it out in the browser: {where}\n"
        "  your own data: POST /datasets with a CSV of claim, trajectories\n"
        "  a larger corpus: veritune corpora fetch wiki-leads"
    )
