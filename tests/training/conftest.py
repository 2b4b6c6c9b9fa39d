"""Work orders over the tiny model, and a supervisor's end of the line to a real training child."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from app.domain.attempts import BaseOnDisk, EncodedBranch, EncodedRow, TrainOrder
from app.domain.plans import Schedule
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName
from tests.tiny import VOCABULARY, make_tiny_model

ROOT = Path(__file__).parents[2]

OrderFactory = Callable[..., TrainOrder]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "base")


def make_rows(count: int) -> list[EncodedRow]:
    """Rows of different lengths with two labelled spans each; every third has a branch of its own."""
    rows = []
    for number in range(count):
        length = 12 + 5 * (number % 7)
        ids = tuple((7 * number + 3 * place) % (VOCABULARY - 10) + 5 for place in range(length))
        branch = EncodedBranch(at=length // 2, ids=(9, 11, 13, 15), trained=((2, 4),), verdict=2)
        rows.append(
            EncodedRow(
                line=number + 1,
                ids=ids,
                trained=((2, 5), (length - 4, length)),
                verdict=length - 3,
                branch=branch if number % 3 == 0 else None,
            )
        )
    return rows


def unpack(rows: list[EncodedRow]) -> list[EncodedRow]:
    """The same sequences without shared prefixes: each branch is a row that repeats its trajectory's prefix."""
    separate = []
    for row in rows:
        separate.append(row.model_copy(update={"branch": None}))
        if (own := row.branch) is not None:
            trained = tuple((start + own.at, end + own.at) for start, end in own.trained)
            verdict = None if own.verdict is None else own.verdict + own.at
            ids = row.ids[: own.at] + own.ids
            separate.append(EncodedRow(line=row.line, ids=ids, trained=trained, verdict=verdict))
    return separate


@pytest.fixture
def make_order(tiny_base: Path, tmp_path: Path) -> OrderFactory:
    """Orders that differ in what is given: `spec` entries, `updates`, `rows`, `every` (checkpoints), `name`."""

    def make(
        spec: dict[str, Any] | None = None,
        *,
        updates: int = 6,
        rows: list[EncodedRow] | None = None,
        every: int = 1_000,
        name: str = "attempt",
        base: Path = tiny_base,
        resume_from: Path | None = None,
        start_from: Path | None = None,
    ) -> TrainOrder:
        directory = tmp_path / name
        directory.mkdir()
        chosen = make_rows(10) if rows is None else rows
        path = directory / "rows.jsonl"
        path.write_text("".join(f"{row.model_dump_json()}\n" for row in chosen))
        trainer = {"train_steps": updates, "effective_batch_size": 4, "learning_rate": 5e-3}
        given = spec or {}
        asked = {"dataset": "tiny", **given, "trainer": trainer | given.get("trainer", {})}
        parsed = TrainSpec.model_validate(asked)
        parts = Counter(row.part for row in chosen)
        schedule = Schedule.for_spec(parsed, parts[SplitName.TRAIN], 42, "cpu", parts[SplitName.VALIDATION])
        return TrainOrder(
            job_id="job_test",
            epoch=1,
            base=BaseOnDisk(path=base, digest="0" * 64, name="tiny", revision="r1"),
            rows=path,
            directory=directory,
            resume_from=resume_from,
            start_from=start_from,
            spec=parsed,
            schedule=schedule.model_copy(update={"checkpoint_every": every, "max_tokens": 96}),
        )

    return make


@dataclass
class Child:
    """A training child as its supervisor sees it."""

    process: subprocess.Popen[str]
    directory: Path
    seen: list[dict[str, Any]] = field(default_factory=list)

    def events(self) -> Iterator[dict[str, Any]]:
        """The child's events as they arrive. Each line must be one."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event: dict[str, Any] = json.loads(line)
            self.seen.append(event)
            yield event

    def until(self, kind: str, update: int | None = None) -> dict[str, Any]:
        for event in self.events():
            if event["event"] == kind and (update is None or event["update"] == update):
                return event
        raise AssertionError(f"no {kind} event came: {self.seen}\n{self.errors()}")

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def command(self, *words: str) -> None:
        for word in words:
            self.write(json.dumps({"command": word}))

    def finish(self) -> tuple[dict[str, Any], int]:
        """(the last event, the exit status)."""
        for _ in self.events():
            pass
        return self.seen[-1], self.process.wait(60)

    def metrics(self) -> list[dict[str, Any]]:
        return [event for event in self.seen if event["event"] == "metrics"]

    def errors(self) -> str:
        return (self.directory / "stderr").read_text()


@pytest.fixture
def start() -> Iterator[Callable[[TrainOrder], Child]]:
    """Start `python -m worker.training` on an order, or on what is `given` in its place; whatever still runs at the end
    of the test is killed."""
    children: list[Child] = []

    def begin(order: TrainOrder, given: str | None = "the order") -> Child:
        with (order.directory / "stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker.training"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=ROOT,
                env={"PATH": "/usr/bin:/bin", "VERITUNE_THREADS": "1", "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # the child lowers the priority of its whole session
            )
        children.append(Child(process, order.directory))
        if given is not None:
            children[-1].write(order.model_dump_json() if given == "the order" else given)
        return children[-1]

    yield begin
    for child in children:
        child.process.kill()
        child.process.wait()
        for pipe in (child.process.stdin, child.process.stdout):
            if pipe is not None:
                pipe.close()
