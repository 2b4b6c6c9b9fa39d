"""The training loop: from a work order to a published adapter or model.

It knows neither jobs nor the database nor the blob store: those belong to the supervisor.
"""

import math
import os
import time
from typing import Literal

import torch

from app.domain.attempts import (
    CheckpointWritten,
    EncodedRow,
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
from worker.training.checkpoints import find_complete_checkpoint, read_checkpoint, write_checkpoint
from worker.training.errors import TrainingError
from worker.training.evaluation import Evaluation, HeldOut
from worker.training.lr_schedule import learning_rate
from worker.training.memory import return_free_memory
from worker.training.model import TrainableModel, load_trainable_model
from worker.training.publishing import write_published, write_weights
from worker.training.run_metrics import (
    best_metrics,
    evaluation_event,
    package_versions,
    run_totals,
    run_warnings,
    skip_warning,
)
from worker.training.state import RunState
from worker.training.updates import accumulate_gradients, find_micro_batch_size, gradient_norm, optimizer_step

MAX_SKIPS_IN_A_ROW = 5
"""Number of successive updates without a finite loss and finite gradients that ends the job."""


def train(order: TrainOrder, channel: Channel) -> None:
    """Run `order` to its end and report to `channel`. Raises TrainingError, or the device's out-of-memory error."""
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
        lambda text: channel.send(LogMessage(message=text)),
        order.start_from,
    )
    return_free_memory()
    all_rows = read_rows(order.rows, trainable.vocab_size)
    rows, validation, test = _split_rows(order, all_rows)
    torch.manual_seed(spec.seed)
    state = RunState(order, trainable, all_rows, precision, device)
    _resume(order, state, channel)
    progress, masters = state.progress, state.masters
    channel.send(
        TrainingStarted(
            precision=precision.name,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            trainable_parameters=masters.count,
            total_parameters=sum(p.numel() for p in trainable.method.module.parameters()),
            resumed_from_update=progress.update,
        )
    )

    find_micro_batch_size(trainable, state, rows, order, channel)
    for update in range(progress.update + 1, schedule.updates + 1):
        if _run_commands_and_validate(order, trainable, state, validation, channel):
            return
        if 0 < spec.trainer.early_stop <= progress.without_improvement:
            break

        began = time.perf_counter()
        rate = learning_rate(progress.applied, schedule, spec.trainer)
        gradients = accumulate_gradients(trainable, state, rows, update, order, channel)
        if gradients is None:
            _run_commands(order, trainable, state, channel)
            return
        loss, tokens, labelled = gradients
        norm = gradient_norm(state)
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        if skipped:
            progress.skipped_in_a_row += 1
        else:
            optimizer_step(state, rate, norm, spec.trainer.gradient_clipping.clipglobalnorm)
            progress.applied += 1
            if state.rank_allocator is not None:
                state.rank_allocator.allocate_ranks(progress.applied)
            progress.skipped_in_a_row = 0
        state.scaler.update()
        masters.reset()
        if skipped:
            channel.send(skip_warning(update, loss, state))

        seconds = time.perf_counter() - began
        state.record_update(update, None if skipped else loss, tokens, labelled, seconds)
        evaluation = _validate(order, trainable, state, validation, channel)
        channel.send(
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
                validation_loss=progress.validation_loss if evaluation else None,
                validation_accuracy=evaluation.accuracy if evaluation else None,
                validation_verdict_accuracy=evaluation.verdict_accuracy if evaluation else None,
            )
        )
        if progress.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW:
            _write_row_losses(order, state)
            raise TrainingError(
                "not_finite",
                f"{MAX_SKIPS_IN_A_ROW} successive updates had a loss or gradients that are not finite",
                "lower trainer.learning_rate, or check the dataset for rows that differ from the others",
            )
        if update % schedule.checkpoint_every == 0 or (evaluation and progress.best_update == update):
            _checkpoint(order, trainable, state, channel)

    if _run_commands_and_validate(order, trainable, state, validation, channel):
        return
    if progress.update < schedule.updates:
        channel.send(
            LogMessage(message=f"stopped early after {spec.trainer.early_stop} evaluations without a lower loss")
        )
    warnings = run_warnings(state)
    state.load_best_weights()
    test_metrics = _evaluate_test_rows(trainable, state, test, channel)
    _write_row_losses(order, state)
    if test_metrics is None:
        channel.send(TrainingFinished(outcome="stopped", packages=package_versions(), metrics=run_totals(state)))
        return
    totals = run_totals(state) | best_metrics(state) | test_metrics
    if state.rank_allocator is not None:
        channel.send(LogMessage(message="remaining ranks", data=dict(state.rank_allocator.remaining_ranks())))
    adapter = write_published(trainable.method, masters, order.base, order.directory)
    channel.send(
        TrainingFinished(
            outcome="succeeded", adapter=adapter, packages=package_versions(), metrics=totals, warnings=warnings
        )
    )


def _run_commands(order: TrainOrder, trainable: TrainableModel, state: RunState, channel: Channel) -> bool:
    """Run the queued commands. Returns whether one of them ended the attempt."""
    while command := channel.next_command():
        if command.command != "stop":
            _checkpoint(order, trainable, state, channel)
        if command.command != "checkpoint":
            _write_row_losses(order, state)
            outcome: Literal["paused", "stopped"] = "paused" if command.command == "pause" else "stopped"
            channel.send(TrainingFinished(outcome=outcome, packages=package_versions(), metrics=run_totals(state)))
            return True
    return False


def _run_commands_and_validate(
    order: TrainOrder, trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel
) -> bool:
    """Run the queued commands, then a validation that a command interrupted. Returns whether the attempt ended."""
    while not _run_commands(order, trainable, state, channel):
        if not _validation_is_due(order, state) or _validate(order, trainable, state, rows, channel):
            return False
    return True


def _split_rows(order: TrainOrder, rows: list[EncodedRow]) -> tuple[list[EncodedRow], HeldOut, HeldOut]:
    """Sort the rows by split: (train, validation, test)."""
    trainer, max_tokens = order.spec.trainer, order.schedule.max_tokens
    max_rows = None if trainer.eval_batch_size == "auto" else trainer.eval_batch_size
    train, *held_out = ([row for row in rows if row.part is split] for split in SPLIT_NAMES)
    validation, test = (HeldOut(own, max_rows, max_tokens, trainer.verdict_weight) for own in held_out)
    return train, validation, test


def _precision(device: torch.device, order: TrainOrder) -> Precision:
    try:
        return precision_here(device, order.base.fp16)
    except Fp16UnsafeError as error:
        hint = "use a GPU of compute capability 8.0 or higher, or another base model"
        raise TrainingError("fp16_unsafe", str(error), hint) from None


def _resume(order: TrainOrder, state: RunState, channel: Channel) -> None:
    """Restore the newest complete checkpoint, if the order has one to resume from."""
    if order.resume_from is None:
        return
    checkpoint, torn = find_complete_checkpoint(order.resume_from)
    for reason in torn:
        channel.send(LogMessage(level="warning", message=f"skipped a torn checkpoint: {reason}"))
    if checkpoint is None:
        channel.send(LogMessage(level="warning", message="no complete checkpoint is left; starting from the beginning"))
        return
    state.restore(read_checkpoint(checkpoint))
    channel.send(LogMessage(message=f"resumed from update {state.progress.update}"))


def _validation_is_due(order: TrainOrder, state: RunState) -> bool:
    """Whether the schedule evaluates after the last update, and the evaluation is not done yet."""
    progress = state.progress
    return progress.evaluated != progress.update and order.schedule.evaluates_after(progress.update)


def _validate(
    order: TrainOrder, trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel
) -> Evaluation | None:
    """Evaluate the validation rows if that is due. None if it is not, or if a command interrupted it."""
    if not _validation_is_due(order, state):
        return None
    evaluation = rows.evaluate(trainable, state.device, channel.has_command)
    if evaluation is not None:
        best = state.record_validation(evaluation)
        channel.send(evaluation_event(SplitName.VALIDATION, state, evaluation, best=best))
    return evaluation


def _evaluate_test_rows(
    trainable: TrainableModel, state: RunState, rows: HeldOut, channel: Channel
) -> dict[str, float] | None:
    """Loss and accuracy of the published weights on the test rows. None if a `stop` interrupted the evaluation.

    A `pause` does not interrupt it: the best weights have replaced the last ones, so the run cannot be resumed here.
    """
    if not rows.rows:
        return {}
    evaluation = rows.evaluate(trainable, state.device, channel.must_stop)
    if evaluation is None:
        return None
    state.row_losses.record(evaluation.lines, evaluation.loss_sums, state.progress.published_update)
    event = evaluation_event(SplitName.TEST, state, evaluation)
    channel.send(event)
    return {"test_accuracy": evaluation.accuracy} | ({} if event.loss is None else {"test_loss": event.loss})


def _write_row_losses(order: TrainOrder, state: RunState) -> None:
    state.row_losses.write(order.directory / "artifacts" / "rows.jsonl")


def _checkpoint(order: TrainOrder, trainable: TrainableModel, state: RunState, channel: Channel) -> None:
    """Write a checkpoint, unless this update has one: the supervisor may be uploading its directory."""
    if state.checkpointed_update == state.progress.update:
        return
    progress = state.progress
    state.checkpointed_update = progress.update
    path, digest = write_checkpoint(
        order.directory / "checkpoints",
        state.snapshot(),
        lambda directory: write_weights(trainable.method, state.masters, order.base, directory),
    )
    loss = progress.validation_loss if progress.evaluated == progress.update else None
    metrics = run_totals(state) | ({} if loss is None else {"validation_loss": loss})
    channel.send(
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
