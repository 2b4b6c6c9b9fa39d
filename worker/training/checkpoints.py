"""Writes and reads checkpoints: named tensors as safetensors, the rest as JSON, no pickle.

A checkpoint is a directory such as `update-000030`. It gets its name by an atomic rename after its files are flushed.
Its manifest lists the digest of every file. The digest of the manifest is the checkpoint's.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from app.atomic_dirs import publish
from app.domain.frozen import Frozen

MANIFEST = "manifest.json"


class TornCheckpointError(Exception):
    """The directory is not a complete checkpoint, or its files were changed."""


class Progress(BaseModel):
    """Progress of a job over all its attempts, as transformers' `TrainerState`.

    `applied`: number of updates that changed the weights. The others were skipped. `max_tokens`: of a micro-batch, if
    it is not the plan's. `evaluated`: the update after which the validation rows were last evaluated;
    `validation_…`: the result. `best_…`: the evaluation with the lowest loss. `without_improvement`: number of
    evaluations since the best one. `first_losses`, `last_losses`: of updates that changed the weights, for
    `loss_trend`.
    """

    model_config = ConfigDict(extra="forbid")

    update: int = 0
    applied: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    max_tokens: int | None = None
    evaluated: int = 0
    validation_loss: float | None = None
    validation_accuracy: float | None = None
    best_update: int | None = None
    best_loss: float | None = None
    best_accuracy: float | None = None
    without_improvement: int = 0
    first_losses: tuple[float, ...] = ()
    last_losses: tuple[float, ...] = ()

    @property
    def published_update(self) -> int:
        """The update whose weights are published if training ends here."""
        return self.best_update or self.update


class _StateFile(Frozen):
    """Content of `state.json`."""

    identity: str
    progress: Progress
    scaler: dict[str, float]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The whole state of a run.

    `identity`: digest of the order's spec, schedule, base and rows; only the same order can resume from this state.
    `weights`: float32 master weights. `optimizer`: AdamW's moments. `ranks`: AdaLoRA's rank allocation. `generators`:
    states of the random generators. `scaler`: the loss scale. `best`: master weights of the best update, empty if
    there is no such update or if it is this one. `rows`: the last loss of each row.
    """

    identity: str
    progress: Progress
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    ranks: Mapping[str, torch.Tensor]
    generators: Mapping[str, torch.Tensor]
    scaler: Mapping[str, float]
    best: Mapping[str, torch.Tensor] = field(default_factory=dict)
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)


def write_checkpoint(
    parent: Path, state: TrainingState, write_adapter: Callable[[Path], None] = lambda _: None
) -> tuple[Path, str]:
    """Write a checkpoint under `parent`. Returns (its directory, its digest). Earlier checkpoints stay.

    `write_adapter` writes the same weights into the directory in the format of a published adapter.
    """
    final = parent / f"update-{state.progress.update:06}"
    partial = parent / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(state.weights), partial / "weights.safetensors")
    save_file(dict(state.optimizer), partial / "optimizer.safetensors")
    save_file(dict(state.ranks), partial / "ranks.safetensors")
    save_file(dict(state.generators), partial / "generators.safetensors")
    save_file(dict(state.best), partial / "best.safetensors")
    save_file(dict(state.rows), partial / "rows.safetensors")
    write_adapter(partial)
    state_file = _StateFile(identity=state.identity, progress=state.progress, scaler=dict(state.scaler))
    (partial / "state.json").write_text(state_file.model_dump_json(indent=2), encoding="utf-8")
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    manifest = json.dumps({"files": files, "update": state.progress.update}, indent=2, sort_keys=True)
    (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    publish(partial, final)
    return final, hashlib.sha256(manifest.encode()).hexdigest()


def list_checkpoints(parent: Path) -> list[Path]:
    """List the checkpoint directories under `parent`, the newest first. Some may be incomplete."""
    return sorted((p for p in parent.glob("update-*") if p.name[7:].isdigit()), reverse=True)


def verify_checkpoint(directory: Path) -> str:
    """Return the digest of a complete checkpoint. Raises TornCheckpointError with the reason if it is not complete."""
    try:
        manifest = (directory / MANIFEST).read_bytes()
        files: dict[str, str] = json.loads(manifest)["files"]
        changed = [name for name, digest in files.items() if _sha256(directory / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpointError(f"{directory.name}: its files could not be read ({type(error).__name__})") from error
    if changed:
        raise TornCheckpointError(f"{directory.name}: these files were changed or truncated: {', '.join(changed)}")
    return hashlib.sha256(manifest).hexdigest()


def find_complete_checkpoint(directory: Path) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint among `directory` and the older ones beside it.

    Returns (its directory or None, for each newer checkpoint the reason why it is torn).
    """
    torn: list[str] = []
    older = [path for path in list_checkpoints(directory.parent) if path.name < directory.name]
    for candidate in (directory, *older):
        try:
            verify_checkpoint(candidate)
            return candidate, torn
        except TornCheckpointError as error:
            torn.append(str(error))
    return None, torn


def read_checkpoint(directory: Path) -> TrainingState:
    """Verify and read the checkpoint in `directory`. Raises TornCheckpointError."""
    verify_checkpoint(directory)
    try:
        state = _StateFile.model_validate_json((directory / "state.json").read_bytes())
    except ValidationError as error:
        raise TornCheckpointError(f"{directory.name}: another version of Veritune wrote it") from error
    return TrainingState(
        identity=state.identity,
        progress=state.progress,
        weights=load_file(directory / "weights.safetensors"),
        optimizer=load_file(directory / "optimizer.safetensors"),
        ranks=load_file(directory / "ranks.safetensors"),
        generators=load_file(directory / "generators.safetensors"),
        scaler=state.scaler,
        best=load_file(directory / "best.safetensors"),
        rows=load_file(directory / "rows.safetensors"),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
