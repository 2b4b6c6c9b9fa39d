"""`python -m worker.training`: one attempt at one training job, whose order is the first line of stdin.

Exit status 0: finished, paused or stopped; 1: failed, as the last event says; 3: the supervisor is gone.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

from app.domain.attempts import TrainingFailed, TrainOrder
from worker.training.channel import Channel
from worker.training.errors import TrainingError

NICENESS = 10
"""A person waits for an answer, but not for an update: on cores that both share, the engine goes first."""

FILE_ERROR = "I/O error: "
"""How safetensors says it."""


def main() -> int:
    _give_way()
    channel = Channel.open()
    try:
        # Imported here: torch takes seconds. The channel listens meanwhile, and the order may come later still.
        from worker.training.recipe import train

        train(TrainOrder.model_validate_json(channel.receive_order()), channel)
    except Exception as error:
        traceback.print_exc()
        channel.send(_failed(error))
        return 1
    return 0


def _give_way() -> None:
    os.nice(NICENESS)
    # This process has a session of its own, and Linux may weigh sessions before it looks at niceness within them.
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(NICENESS), encoding="ascii")


def _failed(error: Exception) -> TrainingFailed:
    if isinstance(error, TrainingError):
        return TrainingFailed(code=error.code, message=error.message, hint=error.hint)
    from worker.training.memory import is_out_of_memory

    if is_out_of_memory(error):
        return TrainingFailed(
            code="out_of_memory",
            message="the device's memory does not suffice for this job",
            hint="set trainer.batch_size to 1, trainer.enable_gradient_checkpointing to true, "
            "or a smaller global_max_sequence_length",
        )
    if reason := _of_a_file(error):
        return TrainingFailed(
            code="disk",
            message=f"a file could not be read or written: {reason}",
            hint="check the free space and the permissions of the work directory",
        )
    return TrainingFailed(
        code="unexpected",
        message=f"training stopped at {type(error).__name__}: {error}",
        hint="this is a fault of the trainer; its log has the place",
    )


def _of_a_file(error: Exception) -> str | None:
    """What the system said, if `error` is about a file. Safetensors has no type of its own for that."""
    from safetensors import SafetensorError

    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = isinstance(error, SafetensorError) and FILE_ERROR in str(error)
    return str(error).rpartition(FILE_ERROR)[2] if found else None


if __name__ == "__main__":
    sys.exit(main())
