"""Resumable state on disk: atomic, hashed, free of pickle. It knows no recipe, only named tensors and JSON.

A checkpoint is a directory `update-000030` that appears by rename once its files are on the disk. Its
manifest lists every file's digest; the manifest's own digest names the checkpoint.
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
    """The directory is not a complete checkpoint, or not the one that was written."""


class Progress(BaseModel):
    """How far a job is, over all its attempts. `applied` updates changed the weights; others were skipped.
    `max_tokens`: of a micro-batch, where the device had no room for what was planned.

    `evaluated`: the update behind which the validation rows were looked at last, with what result; `best_…`: the one
    with the lowest loss; `without_improvement`: evaluations since then.

    `first_losses`, `last_losses`: of the updates that changed the weights, for `loss_trend`.
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
    def published(self) -> int:
        """The update whose weights are published, if the training ends here."""
        return self.best_update or self.update


class _State(Frozen):
    identity: str
    progress: Progress
    scaler: dict[str, float]


@dataclass(frozen=True, slots=True)
class Saved:
    """All of a run's state. `identity` names the work that it belongs to: another order's state does not fit.

    `best`: the weights of the best update, empty where there is none and where it is this one. `rows`: their losses.
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
    parent: Path, saved: Saved, write_adapter: Callable[[Path], None] = lambda _: None
) -> tuple[Path, str]:
    """(the new checkpoint's directory under `parent`, its digest). Who stores earlier ones removes them.

    `write_adapter` puts the same weights there as whoever only uses them reads them.
    """
    final = parent / f"update-{saved.progress.update:06}"
    partial = parent / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_file(dict(saved.weights), partial / "weights.safetensors")
    save_file(dict(saved.optimizer), partial / "optimizer.safetensors")
    save_file(dict(saved.ranks), partial / "ranks.safetensors")
    save_file(dict(saved.generators), partial / "generators.safetensors")
    save_file(dict(saved.best), partial / "best.safetensors")
    save_file(dict(saved.rows), partial / "rows.safetensors")
    write_adapter(partial)
    state = _State(identity=saved.identity, progress=saved.progress, scaler=dict(saved.scaler))
    (partial / "state.json").write_text(state.model_dump_json(indent=2), encoding="utf-8")
    files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
    manifest = json.dumps({"files": files, "update": saved.progress.update}, indent=2, sort_keys=True)
    (partial / MANIFEST).write_text(manifest, encoding="utf-8")
    publish(partial, final)
    return final, hashlib.sha256(manifest.encode()).hexdigest()


def checkpoints_in(parent: Path) -> list[Path]:
    """The checkpoint directories under `parent`, newest first, complete or not."""
    return sorted((p for p in parent.glob("update-*") if p.name[7:].isdigit()), reverse=True)


def verify(directory: Path) -> str:
    """The digest of a complete checkpoint. Raises TornCheckpointError, saying what is wrong."""
    try:
        manifest = (directory / MANIFEST).read_bytes()
        files: dict[str, str] = json.loads(manifest)["files"]
        wrong = [name for name, digest in files.items() if _sha256(directory / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornCheckpointError(f"{directory.name}: {type(error).__name__} while it was checked") from error
    if wrong:
        raise TornCheckpointError(f"{directory.name}: {', '.join(wrong)} was changed or cut off")
    return hashlib.sha256(manifest).hexdigest()


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """(`directory`, or the newest complete checkpoint beside and before it, or None; what was torn on the way)."""
    torn: list[str] = []
    older = [path for path in checkpoints_in(directory.parent) if path.name < directory.name]
    for candidate in (directory, *older):
        try:
            verify(candidate)
            return candidate, torn
        except TornCheckpointError as error:
            torn.append(str(error))
    return None, torn


def read_checkpoint(directory: Path) -> Saved:
    """The state in `directory`, verified. Raises TornCheckpointError."""
    verify(directory)
    try:
        state = _State.model_validate_json((directory / "state.json").read_bytes())
    except ValidationError as error:
        raise TornCheckpointError(f"{directory.name}: another version wrote it") from error
    return Saved(
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
