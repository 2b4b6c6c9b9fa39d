"""Figures of a run: what its events and its adapter's manifest say of it."""

from importlib.metadata import version

import torch

from worker.training import loss_trend
from worker.training.memory import peak_resident_bytes
from worker.training.state import RunState

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")


def best_metrics(state: RunState) -> dict[str, float]:
    """What the validation rows say of the weights that are published."""
    progress = state.progress
    found = {
        "best_update": progress.best_update,
        "validation_loss": progress.best_loss,
        "validation_accuracy": progress.best_accuracy,
    }
    return {name: value for name, value in found.items() if value is not None}


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def run_warnings(state: RunState) -> tuple[str, ...]:
    """What speaks against the weights as they are."""
    progress = state.progress
    found = loss_trend.warning(progress.first_losses, progress.last_losses, progress.applied)
    return () if found is None else (found,)


def run_totals(state: RunState) -> dict[str, float]:
    """Figures of the whole job, over all its attempts, but for the memory: bytes at this attempt's peak."""
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
