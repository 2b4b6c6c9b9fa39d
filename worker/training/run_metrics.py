"""Metrics, warnings and package versions of a run, for its events and its adapter's manifest."""

import math
from importlib.metadata import version

import torch

from app.domain.attempts import EvaluationFinished, LogMessage
from app.domain.splits import SplitName
from worker.training import loss_trend
from worker.training.evaluation import Evaluation
from worker.training.memory import peak_resident_bytes
from worker.training.state import RunState

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def best_metrics(state: RunState) -> dict[str, float]:
    """Validation metrics of the published weights. Empty without an evaluation."""
    progress = state.progress
    metrics = {
        "best_update": progress.best_update,
        "validation_loss": progress.best_loss,
        "validation_accuracy": progress.best_accuracy,
    }
    return {name: value for name, value in metrics.items() if value is not None}


def package_versions() -> dict[str, str]:
    """Versions of the packages that the result depends on."""
    return {name: version(name) for name in PACKAGES}


def run_warnings(state: RunState) -> tuple[str, ...]:
    """Reasons to doubt the present weights."""
    progress = state.progress
    message = loss_trend.warning(progress.first_losses, progress.last_losses, progress.applied)
    return () if message is None else (message,)


def run_totals(state: RunState) -> dict[str, float]:
    """Totals of the job over all its attempts. `peak_memory_bytes` is of this attempt alone."""
    progress = state.progress
    peak = peak_resident_bytes()
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


def evaluation_event(
    split: SplitName, state: RunState, evaluation: Evaluation, *, best: bool = False
) -> EvaluationFinished:
    """Report an evaluation. Validation has the present weights, the test the published ones."""
    return EvaluationFinished(
        part=split,
        update=state.progress.update if split is SplitName.VALIDATION else state.progress.published_update,
        rows=len(evaluation.lines),
        loss=evaluation.loss if math.isfinite(evaluation.loss) else None,
        accuracy=evaluation.accuracy,
        verdict_accuracy=evaluation.verdict_accuracy,
        best=best,
        seconds=evaluation.seconds,
    )


def skip_warning(update: int, loss: float, state: RunState) -> LogMessage:
    """Report that update number `update` did not change the weights, with the loss scale from now on."""
    cause = "gradients are" if math.isfinite(loss) else "loss is"
    scale = state.scaler.get_scale() if state.scaler.is_enabled() else None
    scaling = "" if scale is None else f"; the loss scale is now {scale:g}"
    message = f"update {update} is skipped: its {cause} not finite{scaling}"
    return LogMessage(level="warning", message=message, data={"update": update, "loss_scale": scale})
