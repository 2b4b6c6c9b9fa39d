"""The training recipe: a straight line from a work order to an adapter.

It knows the order, the channel and the tensors between them; jobs, rows in a database and blobs are the
supervisor's.
"""

import math
import os
import resource
import time
from importlib.metadata import version

import torch

from app.domain.attempts import Checkpointed, EncodedRow, Evaluated, Finished, Log, Metrics, Started, TrainOrder
from app.domain.splits import PARTS, Part
from worker.precision import Fp16UnsafeError, Precision, precision_here
from worker.training.batches import read_rows
from worker.training.channel import Channel
from worker.training.checkpoints import newest_sound, read_checkpoint, write_checkpoint
from worker.training.errors import TrainingError
from worker.training.evaluation import Evaluation, HeldOut
from worker.training.lr_schedule import learning_rate
from worker.training.model import TrainableModel, load_trainable_model
from worker.training.publishing import write_files, write_published
from worker.training.state import RunState
from worker.training.updates import add_gradients, gradient_norm, probe, step

SKIPS_IN_A_ROW = 5
"""This many updates in a row without a finite loss and gradient end the job."""

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def train(order: TrainOrder, channel: Channel) -> None:
    """Run `order` to its end, telling `channel`. Raises TrainingError; out-of-memory errors pass through."""
    spec, schedule = order.spec, order.schedule
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = _precision(device, order)
    if threads := os.environ.get("VERITUNE_THREADS"):
        torch.set_num_threads(int(threads))

    torch.manual_seed(spec.seed)
    trainable = load_trainable_model(
        order.base.path,
        spec,
        schedule.updates,
        precision,
        device,
        lambda text: channel.tell(Log(message=text)),
        order.start_from,
    )
    every_row = read_rows(order.rows, trainable.vocab_size)
    rows, validation, test = _parts(order, every_row)
    torch.manual_seed(spec.seed)
    state = RunState(order, trainable, every_row, precision, device)
    _resume(order, state, channel)
    progress, masters = state.progress, state.masters
    channel.tell(
        Started(
            precision=precision.name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            trainable_parameters=masters.count,
            total_parameters=sum(p.numel() for p in trainable.method.module.parameters()),
            resumed_from_update=progress.update,
        )
    )

    probe(trainable, state, rows, order, channel)
    for update in range(progress.update + 1, schedule.updates + 1):
        while command := channel.next_command():
            if command.command != "stop":
                _checkpoint(order, trainable, state, channel)
            if command.command != "checkpoint":
                _write_row_losses(order, state)
                outcome = "paused" if command.command == "pause" else "stopped"
                channel.tell(Finished(outcome=outcome, packages=_packages(), metrics=_totals(state)))
                return
        _validate(order, trainable, state, validation, channel)  # where a command had cut it short
        if 0 < spec.trainer.early_stop <= progress.without_improvement:
            break

        began = time.perf_counter()
        rate = learning_rate(progress.applied, schedule, spec.trainer)
        loss, tokens, labelled = add_gradients(trainable, state, rows, update, order, channel)
        norm = gradient_norm(state)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            progress.skipped_in_a_row += 1
        else:
            step(state, rate, norm, spec.trainer.gradient_clipping.clipglobalnorm)
            progress.applied += 1
            if state.ranks is not None:
                state.ranks.after(progress.applied)
            progress.skipped_in_a_row = 0
        state.scaler.update()
        masters.reset()
        if skipped:
            channel.tell(_skipped(update, loss, state))

        seconds = time.perf_counter() - began
        progress.update = update
        progress.tokens += tokens
        progress.labelled_tokens += labelled
        progress.seconds += seconds
        progress.loss = progress.loss if skipped else loss
        found = _validate(order, trainable, state, validation, channel)
        channel.tell(
            Metrics(
                update=update,
                total_updates=schedule.updates,
                epoch=update / schedule.updates_per_epoch,
                loss=loss if math.isfinite(loss) else None,
                learning_rate=rate,
                grad_norm=norm if math.isfinite(norm) else None,
                tokens=tokens,
                labelled_tokens=labelled,
                tokens_per_second=tokens / seconds,
                skipped=skipped,
                seconds=seconds,
                validation_loss=progress.validation_loss if found else None,
                validation_accuracy=found.accuracy if found else None,
            )
        )
        if progress.skipped_in_a_row >= SKIPS_IN_A_ROW:
            _write_row_losses(order, state)
            raise TrainingError(
                "not_finite",
                f"{SKIPS_IN_A_ROW} updates in a row had a loss or gradients that are not finite",
                "lower trainer.learning_rate, or check the dataset for rows of another kind than the rest",
            )
        if update % schedule.checkpoint_every == 0 or (found and progress.best_update == update):
            _checkpoint(order, trainable, state, channel)

    _validate(order, trainable, state, validation, channel, patient=True)
    if progress.update < schedule.updates:
        channel.tell(Log(message=f"stopped early: {spec.trainer.early_stop} evaluations without a lower loss"))
    state.take_best()
    totals = _totals(state) | _judged(state) | _test(trainable, state, test, channel)
    _write_row_losses(order, state)
    if state.ranks is not None:
        channel.tell(Log(message="ranks that are left", data=dict(state.ranks.kept())))
    adapter = write_published(trainable.method, masters, order.base, order.directory)
    channel.tell(Finished(outcome="succeeded", adapter=adapter, packages=_packages(), metrics=totals))


def _skipped(update: int, loss: float, state: RunState) -> Log:
    """That an update left the weights as they were, and what the loss is multiplied by from here on."""
    what = "gradients are" if math.isfinite(loss) else "loss is"
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    scaled = "" if scale is None else f"; the loss is scaled by {scale:g} from here on"
    message = f"update {update} is skipped: its {what} not finite{scaled}"
    return Log(level="warning", message=message, data={"update": update, "loss_scale": scale})


def _parts(order: TrainOrder, rows: list[EncodedRow]) -> tuple[list[EncodedRow], HeldOut, HeldOut]:
    """(rows to train on, to validate with, to test on)."""
    asked = order.spec.trainer.eval_batch_size
    cap = None if asked == "auto" else asked
    train, *held = ([row for row in rows if row.part is part] for part in PARTS)
    validation, test = (HeldOut(part, cap, order.schedule.max_tokens) for part in held)
    return train, validation, test


def _precision(device: torch.device, order: TrainOrder) -> Precision:
    try:
        return precision_here(device, order.base.fp16)
    except Fp16UnsafeError as error:
        way_out = "use a GPU of compute capability 8.0 or higher, or another base model"
        raise TrainingError("fp16_unsafe", str(error), way_out) from None


def _resume(order: TrainOrder, state: RunState, channel: Channel) -> None:
    if order.resume_from is None:
        return
    found, torn = newest_sound(order.resume_from)
    for reason in torn:
        channel.tell(Log(level="warning", message=f"a checkpoint was skipped, because it is torn: {reason}"))
    if found is None:
        channel.tell(Log(level="warning", message="no sound checkpoint is left; starting from the beginning"))
        return
    state.restore(read_checkpoint(found))
    channel.tell(Log(message=f"resumed from update {state.progress.update}"))


def _validate(
    order: TrainOrder,
    trainable: TrainableModel,
    state: RunState,
    rows: HeldOut,
    channel: Channel,
    *,
    patient: bool = False,
) -> Evaluation | None:
    """What the validation rows say, if it is time to ask them. A command cuts it short, unless `patient`."""
    progress = state.progress
    if progress.evaluated == progress.update or not order.schedule.evaluates_after(progress.update):
        return None
    found = rows.evaluate(trainable, state.device, (lambda: False) if patient else channel.waiting)
    if found is not None:
        best = state.judge(found)
        channel.tell(_evaluated(Part.VALIDATION, state, found, best=best))
    return found


def _test(trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel) -> dict[str, float]:
    """What the test rows say of the weights to be published. They are looked at this once."""
    found = rows.evaluate(trainable, state.device) if rows.rows else None
    if found is None:
        return {}
    state.rows.note(found.lines, found.sums, state.progress.published)
    told = _evaluated(Part.TEST, state, found)
    channel.tell(told)
    return {"test_accuracy": found.accuracy} | ({} if told.loss is None else {"test_loss": told.loss})


def _evaluated(part: Part, state: RunState, found: Evaluation, *, best: bool = False) -> Evaluated:
    return Evaluated(
        part=part,
        update=state.progress.update if part is Part.VALIDATION else state.progress.published,
        rows=len(found.lines),
        loss=found.loss if math.isfinite(found.loss) else None,
        accuracy=found.accuracy,
        best=best,
        seconds=found.seconds,
    )


def _write_row_losses(order: TrainOrder, state: RunState) -> None:
    state.rows.write(order.directory / "artifacts" / "rows.jsonl")


def _checkpoint(order: TrainOrder, trainable: TrainableModel, state: RunState, channel: Channel) -> None:
    """Write one, unless this update's is written already: its directory may be on its way into the store."""
    if state.checkpointed == state.progress.update:
        return
    progress = state.progress
    state.checkpointed = progress.update
    path, digest = write_checkpoint(
        order.directory / "checkpoints",
        state.saved(),
        lambda directory: write_files(trainable.method, state.masters, order.base, directory),
    )
    loss = progress.validation_loss if progress.evaluated == progress.update else None
    metrics = _totals(state) | ({} if loss is None else {"validation_loss": loss})
    channel.tell(
        Checkpointed(
            update=progress.update,
            path=path,
            digest=digest,
            validation_loss=loss,
            packages=_packages(),
            metrics=metrics,
        )
    )


def _judged(state: RunState) -> dict[str, float]:
    """What the validation rows say of the weights that are published."""
    progress = state.progress
    found = {
        "best_update": progress.best_update,
        "validation_loss": progress.best_loss,
        "validation_accuracy": progress.best_accuracy,
    }
    return {name: value for name, value in found.items() if value is not None}


def _packages() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _totals(state: RunState) -> dict[str, float]:
    """Figures of the whole job, over all its attempts, but for the memory: bytes at this attempt's peak."""
    progress = state.progress
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if state.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(state.device)
    totals: dict[str, float] = {
        "updates": progress.update,
        "skipped_updates": progress.update - progress.applied,
        "tokens": progress.tokens,
        "labelled_tokens": progress.labelled_tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(1e-9, progress.seconds),
        "peak_memory_bytes": peak,
    }
    return totals if progress.loss is None else totals | {"loss": progress.loss}
