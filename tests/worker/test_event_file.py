"""Event files, as TensorBoard itself reads them."""

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.domain.jobs import Metric
from worker.event_file import NAME, write_event_file

SECOND = Metric(
    update=2,
    epoch=0.5,
    loss=1.25,
    learning_rate=1e-3,
    grad_norm=0.5,
    tokens=10,
    labelled_tokens=4,
    tokens_per_second=100.0,
    skipped=False,
    seconds=2.0,
)
FIRST = SECOND.model_copy(update={"update": 1, "loss": None, "grad_norm": None, "skipped": True})
VALIDATED = {"validation_loss": 0.75, "validation_accuracy": 0.5, "validation_verdict_accuracy": 0.25}
THIRD = SECOND.model_copy(update={"update": 3, **VALIDATED})


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    write_event_file([FIRST, SECOND, THIRD], 1_000.0, tmp_path / NAME)
    found = EventAccumulator(str(tmp_path)).Reload()
    seen = {tag: [(e.step, e.wall_time, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
    assert seen["train/loss"] == [(2, 1_004.0, 1.25), (3, 1_006.0, 1.25)]
    assert seen["train/grad_norm"] == [(2, 1_004.0, 0.5), (3, 1_006.0, 0.5)]
    assert [value for _, _, value in seen["train/learning_rate"]] == pytest.approx([1e-3] * 3)
    assert seen["validation/loss"] == [(3, 1_006.0, 0.75)]
    assert seen["validation/accuracy"] == [(3, 1_006.0, 0.5)]
    assert seen["validation/verdict_accuracy"] == [(3, 1_006.0, 0.25)]
    assert {tag for tag in seen if not tag.startswith("validation/")} == {
        f"train/{name}" for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "epoch")
    }
