"""A job's metrics as an event file of TensorBoard."""

from collections.abc import Iterable
from pathlib import Path

from app.domain.jobs import Metric

NAME = "events.out.tfevents"
"""TensorBoard recognises event files by this name."""

_FILE_VERSION = "brain.Event:2"
_TAGS = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_second": "train/tokens_per_second",
    "epoch": "train/epoch",
    "validation_loss": "validation/loss",
    "validation_accuracy": "validation/accuracy",
    "validation_verdict_accuracy": "validation/verdict_accuracy",
}


def write_event_file(metrics: Iterable[Metric], began: float, path: Path) -> Path:
    """Write `metrics` to `path`. `began`: Unix time. An update's is `began` plus the seconds of all so far.

    A value that an update lacks (a loss that is not finite, no validation) is left out.
    """
    # Imported here: the image of a CPU worker, which trains nothing, has no TensorBoard.
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    clock = began
    with path.open("wb") as file:
        records = RecordWriter(file)
        records.write(Event(wall_time=clock, file_version=_FILE_VERSION).SerializeToString())
        for metric in metrics:
            clock += metric.seconds
            measured = ((tag, getattr(metric, name)) for name, tag in _TAGS.items())
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in measured if value is not None]
            event = Event(wall_time=clock, step=metric.update, summary=Summary(value=values))
            records.write(event.SerializeToString())
    return path
