"""A real training child: its events, its commands, and that a resumed run equals an uninterrupted one."""

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from app.domain.attempts import CHILD_EVENT, EncodedRow, TrainOrder
from app.domain.splits import SplitName
from tests.training.conftest import Child, OrderFactory, make_rows
from tests.waiting import until
from worker.training.__main__ import NICENESS
from worker.training.checkpoints import list_checkpoints, verify_checkpoint

Start = Callable[..., Child]

DROPOUT = {"adapter": {"type": "lora", "r": 4, "dropout": 0.1}}
LONG = 5_000


def adapter_bytes(order: TrainOrder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (order.directory / "adapter").iterdir()}


def _niceness_of_session(pid: int) -> int | None:
    """None where the system does not weigh sessions: no such file, or nothing in it (as within a control group)."""
    file = Path(f"/proc/{pid}/autogroup")
    text = file.read_text(encoding="ascii") if file.exists() else ""
    return int(text.split()[-1]) if text else None


def test_a_run_from_order_to_adapter(make_order: OrderFactory, start: Start) -> None:
    order = make_order(updates=9, every=4)
    child = start(order)
    child.until("metrics", update=1)
    assert os.getpriority(os.PRIO_PROCESS, child.process.pid) >= NICENESS
    assert _niceness_of_session(child.process.pid) in (NICENESS, None)
    last, status = child.finish()
    events = [CHILD_EVENT.validate_python(event) for event in child.seen]
    assert (status, last["event"], last["outcome"]) == (0, "finished", "succeeded"), child.errors()
    kinds = [event.event for event in events]
    assert kinds[: kinds.index("started")].count("log") >= 2
    metrics = child.metrics()
    assert [m["update"] for m in metrics] == list(range(1, 10))
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert metrics[2]["epoch"] == pytest.approx(1)
    assert all(m["tokens_per_second"] > 0 and not m["skipped"] for m in metrics)
    total = sum(m["tokens"] for m in metrics)
    assert last["metrics"]["tokens"] == total
    assert last["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    written = [event for event in child.seen if event["event"] == "checkpoint"]
    assert [event["update"] for event in written] == [4, 8]
    assert all(Path(event["path"]).is_dir() for event in written)
    assert verify_checkpoint(Path(written[-1]["path"])) == written[-1]["digest"]
    assert "install" not in child.errors()  # no advice that is not ours


def test_resumed_runs_equal_an_uninterrupted_one_bit_for_bit(make_order: OrderFactory, start: Start) -> None:
    whole, pausing, dying = (make_order(DROPOUT, updates=40, every=4, name=n) for n in ("whole", "a", "b"))
    reference, paused, killed = start(whole), start(pausing), start(dying)

    paused.until("metrics", update=3)
    paused.command("checkpoint", "pause")
    last, status = paused.finish()
    assert (status, last["event"], last["outcome"], last["adapter"]) == (0, "finished", "paused", None)
    asked = next(event for event in reversed(paused.seen) if event["event"] == "checkpoint")
    assert asked["update"] == paused.metrics()[-1]["update"] < 40

    killed.until("checkpoint", update=8)
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    newest, older = list_checkpoints(dying.directory / "checkpoints")[:2]
    (newest / "optimizer.safetensors").write_bytes(b"torn")

    after_pause = make_order(DROPOUT, updates=40, every=4, name="c", resume_from=Path(asked["path"]))
    after_kill = make_order(DROPOUT, updates=40, every=4, name="d", resume_from=newest)
    one, other = start(after_pause), start(after_kill)
    assert one.until("started")["resumed_from_update"] == asked["update"]
    assert other.until("started")["resumed_from_update"] == int(older.name.removeprefix("update-"))
    assert any(event["event"] == "log" and "torn" in event["message"] for event in other.seen)
    for child in (one, other, reference):
        assert child.finish()[0]["outcome"] == "succeeded", child.errors()
    assert adapter_bytes(after_pause) == adapter_bytes(whole)
    assert adapter_bytes(after_kill) == adapter_bytes(whole)
    losses = [m["loss"] for m in reference.metrics()]
    assert [m["loss"] for m in paused.metrics() + one.metrics()] == losses


def test_a_pause_in_the_middle_of_an_update_ends_at_once_and_resumes_bit_for_bit(
    make_order: OrderFactory, start: Start
) -> None:
    """An update has some 40 micro-batches. The pause arrives during the second update."""
    rows = make_rows(120)
    spec = DROPOUT | {"trainer": {"effective_batch_size": len(rows)}}
    whole, pausing = (make_order(spec, updates=2, rows=rows, name=name) for name in ("whole", "pausing"))
    reference, paused = start(whole), start(pausing)
    paused.until("metrics", update=1)
    paused.command("pause")
    assert paused.finish()[0]["outcome"] == "paused", paused.errors()
    assert [m["update"] for m in paused.metrics()] == [1]
    (written,) = (event for event in paused.seen if event["event"] == "checkpoint")

    order = make_order(spec, updates=2, rows=rows, name="resumed", resume_from=Path(written["path"]))
    resumed = start(order)
    for child in (resumed, reference):
        assert child.finish()[0]["outcome"] == "succeeded", child.errors()
    assert adapter_bytes(order) == adapter_bytes(whole)
    assert [m["loss"] for m in paused.metrics() + resumed.metrics()] == [m["loss"] for m in reference.metrics()]


def test_a_checkpoint_asked_for_in_the_middle_of_an_update_does_not_abandon_it(
    make_order: OrderFactory, start: Start
) -> None:
    rows = make_rows(120)
    child = start(make_order({"trainer": {"effective_batch_size": len(rows)}}, updates=3, rows=rows))
    child.until("metrics", update=1)
    child.command("checkpoint")
    assert child.finish()[0]["outcome"] == "succeeded", child.errors()
    assert len([event for event in child.seen if event["event"] == "checkpoint"]) == 1
    assert [m["update"] for m in child.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("part", [SplitName.VALIDATION, SplitName.TEST])
def test_a_stop_is_obeyed_during_the_final_evaluation(make_order: OrderFactory, start: Start, part: SplitName) -> None:
    held = [row.model_copy(update={"line": 100 + row.line, "part": part}) for row in make_rows(500)]
    order = make_order(updates=1, rows=[*make_rows(4), *held])
    child = start(order)
    child.until("started" if part is SplitName.VALIDATION else "metrics")
    child.command("stop")
    assert child.finish()[0]["outcome"] == "stopped", child.errors()
    assert not any(event["event"] == "evaluated" for event in child.seen)
    assert not (order.directory / "adapter").exists()


def test_an_updates_checkpoint_is_written_once(make_order: OrderFactory, start: Start) -> None:
    """The supervisor removes a stored one. If it were written twice, it could be missing when it is read."""
    child = start(make_order(updates=LONG, every=1))
    child.until("checkpoint")
    child.command("checkpoint", "pause")
    assert child.finish()[0]["outcome"] == "paused"
    written = [event["update"] for event in child.seen if event["event"] == "checkpoint"]
    assert written == sorted(set(written))


def test_a_stop_writes_no_checkpoint_and_an_unknown_command_is_a_warning(
    make_order: OrderFactory, start: Start
) -> None:
    order = make_order(updates=LONG)
    child = start(order)
    child.until("metrics")
    child.command("dance", "stop")
    last, status = child.finish()
    assert (status, last["outcome"], last["adapter"]) == (0, "stopped", None)
    assert any(e["event"] == "log" and e["level"] == "warning" and "dance" in e["message"] for e in child.seen)
    assert not (order.directory / "checkpoints").exists()
    assert not (order.directory / "adapter").exists()


def test_the_end_of_stdin_ends_the_child(make_order: OrderFactory, start: Start) -> None:
    child = start(make_order(updates=LONG))
    child.until("metrics")
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(10) == 3


def test_a_failure_is_one_event_with_a_message(make_order: OrderFactory, start: Start) -> None:
    rows = [EncodedRow(line=7, ids=(5, 4_000), trained=((1, 2),))]
    child = start(make_order(rows=rows))
    last, status = child.finish()
    assert (status, last["event"], last["code"]) == (1, "failed", "vocabulary_mismatch")
    assert "line 7" in last["message"]
    assert "Traceback" not in json.dumps(child.seen)
    assert "Traceback" in child.errors()


def test_a_full_disk_fails_the_job_with_a_message_and_keeps_the_checkpoint_before(
    make_order: OrderFactory, start: Start
) -> None:
    order = make_order(updates=LONG, every=40)
    child = start(order)
    first = child.until("checkpoint")
    # As little room as a full disk has, for this process alone.
    resource.prlimit(child.process.pid, resource.RLIMIT_FSIZE, (4_096, 4_096))
    last, status = child.finish()
    assert (status, last["event"], last["code"]) == (1, "failed", "disk"), last
    assert "space" in last["hint"]
    kept = list_checkpoints(order.directory / "checkpoints")
    assert kept[-1] == Path(first["path"])
    assert verify_checkpoint(kept[-1]) == first["digest"]
    assert not (order.directory / "adapter").exists()


def test_an_order_that_cannot_be_parsed_fails_with_a_message(make_order: OrderFactory, start: Start) -> None:
    child = start(make_order(), given="{}")
    last, status = child.finish()
    assert (status, last["event"], last["code"]) == (1, "failed", "unexpected")


def test_a_child_waits_for_its_order(make_order: OrderFactory, start: Start) -> None:
    order = make_order(updates=1)
    child = start(order, given=None)
    memory = psutil.Process(child.process.pid).memory_info
    until(lambda: memory().rss > 200 << 20)  # torch is there
    assert child.process.poll() is None
    child.write(order.model_dump_json())
    assert child.finish()[0]["outcome"] == "succeeded", child.errors()


def test_a_child_whose_order_never_comes_ends_with_its_stdin(make_order: OrderFactory, start: Start) -> None:
    child = start(make_order(), given=None)
    assert child.process.stdin is not None
    child.process.stdin.close()
    assert child.process.wait(20) == 3
