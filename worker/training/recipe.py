"""The training recipe: a straight line from a work order to an adapter.

It knows the order, the channel and the tensors between them; jobs, rows in a database and blobs are the
supervisor's.
"""

import math
import os
import time
from typing import Literal

import torch

from app.domain.attempts import (
    CheckpointWritten,
    EncodedRow,
    EvaluationFinished,
    LogMessage,
    TrainingFinished,
    TrainingStarted,
    TrainOrder,
    UpdateMetrics,
)
from app.domain.splits import SPLIT_NAMES, SplitName
from worker.precision import Fp16UnsafeError, Precision, precision_here
from worker.training.batches import read_rows
from worker.training.channel import Channel
from worker.training.checkpoints import newest_sound, read_checkpoint, write_checkpoint
from worker.training.errors import TrainingError
from worker.training.evaluation import Evaluation, HeldOut
from worker.training.loss_trend import noted
from worker.training.lr_schedule import learning_rate
from worker.training.memory import return_free_memory
from worker.training.model import TrainableModel, load_trainable_model
from worker.training.publishing import write_files, write_published
from worker.training.run_metrics import best_metrics, package_versions, run_totals, run_warnings
from worker.training.state import RunState
from worker.training.updates import add_gradients, gradient_norm, probe, step

SKIPS_IN_A_ROW = 5
"""This many updates in a row without a finite loss and gradient end the job."""


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
        lambda text: channel.tell(LogMessage(message=text)),
        order.start_from,
    )
    return_free_memory()
    every_row = read_rows(order.rows, trainable.vocab_size)
    rows, validation, test = _parts(order, every_row)
    torch.manual_seed(spec.seed)
    state = RunState(order, trainable, every_row, precision, device)
    _resume(order, state, channel)
    progress, masters = state.progress, state.masters
    channel.tell(
        TrainingStarted(
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
        if _leaves_or_validates(order, trainable, state, validation, channel):
            return
        if 0 < spec.trainer.early_stop <= progress.without_improvement:
            break

        began = time.perf_counter()
        rate = learning_rate(progress.applied, schedule, spec.trainer)
        gradients = add_gradients(trainable, state, rows, update, order, channel)
        if gradients is None:
            _obey(order, trainable, state, channel)
            return
        loss, tokens, labelled = gradients
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
        if not skipped:
            progress.first_losses, progress.last_losses = noted(
                progress.first_losses, progress.last_losses, loss, schedule.updates
            )
        found = _validate(order, trainable, state, validation, channel)
        channel.tell(
            UpdateMetrics(
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

    if _leaves_or_validates(order, trainable, state, validation, channel):
        return
    if progress.update < schedule.updates:
        channel.tell(LogMessage(message=f"stopped early: {spec.trainer.early_stop} evaluations without a lower loss"))
    warnings = run_warnings(state)
    state.take_best()
    tested = _test(trainable, state, test, channel)
    _write_row_losses(order, state)
    if tested is None:
        channel.tell(TrainingFinished(outcome="stopped", packages=package_versions(), metrics=run_totals(state)))
        return
    totals = run_totals(state) | best_metrics(state) | tested
    if state.ranks is not None:
        channel.tell(LogMessage(message="ranks that are left", data=dict(state.ranks.kept())))
    adapter = write_published(trainable.method, masters, order.base, order.directory)
    channel.tell(
        TrainingFinished(
            outcome="succeeded", adapter=adapter, packages=package_versions(), metrics=totals, warnings=warnings
        )
    )


def _obey(order: TrainOrder, trainable: TrainableModel, state: RunState, channel: Channel) -> bool:
    """Do what the waiting commands ask for. Whether one of them ended the attempt."""
    while command := channel.next_command():
        if command.command != "stop":
            _checkpoint(order, trainable, state, channel)
        if command.command != "checkpoint":
            _write_row_losses(order, state)
            outcome: Literal["paused", "stopped"] = "paused" if command.command == "pause" else "stopped"
            channel.tell(TrainingFinished(outcome=outcome, packages=package_versions(), metrics=run_totals(state)))
            return True
    return False


def _leaves_or_validates(
    order: TrainOrder, trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel
) -> bool:
    """Obey waiting commands, then validate if a command had cut that short. Whether a command ended the attempt."""
    while not _obey(order, trainable, state, channel):
        if not _validation_is_due(order, state) or _validate(order, trainable, state, rows, channel):
            return False
    return True


def _skipped(update: int, loss: float, state: RunState) -> LogMessage:
    """That an update left the weights as they were, and what the loss is multiplied by from here on."""
    what = "gradients are" if math.isfinite(loss) else "loss is"
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    scaled = "" if scale is None else f"; the loss is scaled by {scale:g} from here on"
    message = f"update {update} is skipped: its {what} not finite{scaled}"
    return LogMessage(level="warning", message=message, data={"update": update, "loss_scale": scale})


def _parts(order: TrainOrder, rows: list[EncodedRow]) -> tuple[list[EncodedRow], HeldOut, HeldOut]:
    """(rows to train on, to validate with, to test on)."""
    asked = order.spec.trainer.eval_batch_size
    cap = None if asked == "auto" else asked
    train, *held = ([row for row in rows if row.part is part] for part in SPLIT_NAMES)
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
        channel.tell(LogMessage(level="warning", message=f"a checkpoint was skipped, because it is torn: {reason}"))
    if found is None:
        channel.tell(LogMessage(level="warning", message="no sound checkpoint is left; starting from the beginning"))
        return
    state.restore(read_checkpoint(found))
    channel.tell(LogMessage(message=f"resumed from update {state.progress.update}"))


def _validation_is_due(order: TrainOrder, state: RunState) -> bool:
    progress = state.progress
    return progress.evaluated != progress.update and order.schedule.evaluates_after(progress.update)


def _validate(
    order: TrainOrder, trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel
) -> Evaluation | None:
    """Loss and accuracy on the validation rows; None when it is not due, or when a command cut it short."""
    if not _validation_is_due(order, state):
        return None
    found = rows.evaluate(trainable, state.device, channel.has_command)
    if found is not None:
        best = state.judge(found)
        channel.tell(_evaluated(SplitName.VALIDATION, state, found, best=best))
    return found


def _test(trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel) -> dict[str, float] | None:
    """Loss and accuracy of the published weights on the test rows, evaluated once; None when a `stop` cut it short.

    A `pause` does not: the best weights have replaced the last ones, and the job ends behind this.
    """
    if not rows.rows:
        return {}
    found = rows.evaluate(trainable, state.device, channel.must_stop)
    if found is None:
        return None
    state.rows.note(found.lines, found.sums, state.progress.published)
    told = _evaluated(SplitName.TEST, state, found)
    channel.tell(told)
    return {"test_accuracy": found.accuracy} | ({} if told.loss is None else {"test_loss": told.loss})


def _evaluated(part: SplitName, state: RunState, found: Evaluation, *, best: bool = False) -> EvaluationFinished:
    return EvaluationFinished(
        part=part,
        update=state.progress.update if part is SplitName.VALIDATION else state.progress.published,
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
    metrics = run_totals(state) | ({} if loss is None else {"validation_loss": loss})
    channel.tell(
        CheckpointWritten(
            update=progress.update,
            path=path,
            digest=digest,
            validation_loss=loss,
            packages=package_versions(),
            metrics=metrics,
            warnings=run_warnings(state),
        )
    )
