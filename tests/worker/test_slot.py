"""A worker's poll also removes expired files."""

import os
import time
from pathlib import Path

from app.composition import Services, compose
from app.domain.attempts import CheckpointWritten
from app.domain.jobs import JobError
from worker.slot import Slot
from worker.supervisor import Supervisor


def test_it_removes_checkpoints_and_adapters_files_whose_time_is_over(
    services: Services, upload: Path, tmp_path: Path
) -> None:
    dataset = services.datasets.create(upload, "rows.jsonl", None, "rows", {})[0].id
    job = services.jobs.submit({"dataset": dataset})
    taken = services.attempts.lease(("train",), "worker")
    assert taken is not None
    directory = tmp_path / "update-000001"
    directory.mkdir()
    (directory / "state.json").write_text("{}")
    services.attempts.checkpoint(taken.lease, CheckpointWritten(update=1, path=directory, digest="0" * 64))
    services.attempts.fail(taken.lease, JobError(code="x", message="x"))

    left = services.settings.cache_path / "adapters" / ".partial-x"
    left.mkdir(parents=True, exist_ok=True)
    os.utime(left, (0, 0))

    hasty = compose(services.settings.model_copy(update={"checkpoint_ttl_hours": 0.0}))
    slot = Slot(hasty, Supervisor(hasty, "worker-1", ("cpu",)), "host/cpu", ("cpu",))
    slot.start()
    try:
        end = time.monotonic() + 20
        while services.jobs.checkpoints(job.id) or left.exists():
            assert time.monotonic() < end, "it was not removed"
            time.sleep(0.05)
    finally:
        slot.leave()
        hasty.close()
