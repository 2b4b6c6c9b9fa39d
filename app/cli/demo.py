"""`veritune demo`: upload, train, publish, judge and compare, over HTTP like any client."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from app.cli.client import client_of, get, ok
from app.cli.demo_state import DEMO, demo_spec, leave_paused, store_prediction, upload
from app.cli.errors import CommandError
from app.cli.evaluation import LABELS, build_table, follow_evaluation, get_artifact
from app.cli.follow import follow_job
from app.settings import Settings

START_SECONDS = 600.0
HELD_OUT = "demo-heldout"


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
        evaluation = _evaluate(client, console, examples / "heldout.jsonl", corpus["id"], adapter["id"])
        _show(client, console, evaluation)
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
        console.print(f"[dim]starting veritune up; its log is {log}[/]", soft_wrap=True)
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

    def figures(progress: dict[str, Any]) -> str:
        if progress["loss"] is None:
            return ""
        return f"loss {progress['loss']:.3f} · {progress['tokens_per_second']:.0f} tokens/s"

    return follow_job(client, console, job, "update", "total_updates", figures)


def _evaluate(client: httpx.Client, console: Console, held_out: Path, corpus: str, adapter: str) -> dict[str, Any]:
    """Judge the held-out claims by an evaluation job, and return it."""
    dataset = upload(client, "/datasets", HELD_OUT, held_out.name, held_out.read_bytes())
    asked = {"dataset": dataset["id"], "corpus": corpus, "adapters": [adapter], "max_steps": 4}
    job = ok(client.post("/evaluations", json=asked))
    runs = [run["name"] for run in job["plan"]["runs"]]
    console.print(f"[bold]4[/] judging {dataset['rows']} held-out claims with each of: {'; '.join(runs)}")
    return follow_evaluation(client, console, job)


def _show(client: httpx.Client, console: Console, job: dict[str, Any]) -> None:
    report = json.loads(get_artifact(client, job, "report.json"))
    console.print(build_table(report, "held-out claims, about pages never trained on"))
    for test in report["comparisons"][:1]:
        difference = test["difference"]
        console.print(
            f"the adapter against its base: {difference['value']:+.2f} ({difference['low']:+.2f} to "
            f"{difference['high']:+.2f}), McNemar p = {test['p_value']:.1g}"
        )
    answers = [json.loads(line) for line in get_artifact(client, job, "answers.jsonl").splitlines()]
    adapter = next(run["run"] for run in report["runs"] if run["run"]["adapter"])
    for label in LABELS:
        # The first claim of each label, whatever became of it.
        _print_trace(console, next(a for a in answers if a["run"] == adapter and a["label"] == label))


def _print_trace(console: Console, judged: dict[str, Any]) -> None:
    answer = judged["answer"]
    console.print(f"\n[bold]{escape(answer['claim'])}[/]  [dim](label: {judged['label']})[/]", highlight=False)
    for line in answer["text"].splitlines():
        console.print(f"  {line}", markup=False, highlight=False)
    console.print(
        f"  → {answer['verdict']} with probability {answer['confidence']:.2f}; "
        f"cites {_cited(answer)}; {answer['timings']['total']:.2f} s"
    )


def _cited(answer: dict[str, Any]) -> str:
    """The sentences that decided, by page and number."""
    return ", ".join(f"{one['page']} {one['sentence_id']}" for one in answer["evidence"]) or "nothing"


def _next_steps(console: Console, client: httpx.Client, *, keep: bool) -> None:
    where = f"{client.base_url}/docs" if keep else "make up, then http://127.0.0.1:8000/docs"
    console.print(
        f"\n[bold]Where to go next[/]\n  try it out in the browser: {where}\n"
        "  your own data: POST /datasets with a CSV of claim, trajectories\n"
        "  a larger corpus: veritune corpora fetch wiki-leads"
    )
