"""A run's mutable state in one place: masters, optimizer, loss scale, generators, progress."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from app.domain.attempts import EncodedRow, TrainOrder
from app.domain.specs import Trainer
from worker.precision import INITIAL_SCALE, Precision
from worker.training.adalora import adalora_allocator
from worker.training.checkpoints import Progress, Saved
from worker.training.errors import TrainingError
from worker.training.evaluation import Evaluation
from worker.training.master_weights import MasterWeights
from worker.training.model import TrainableModel
from worker.training.row_losses import RowLosses


class RunState:
    """Everything that an update changes."""

    def __init__(
        self,
        order: TrainOrder,
        trainable: TrainableModel,
        rows: Sequence[EncodedRow],
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.identity = identity(order)
        self.device = device
        self.progress = Progress()
        self.checkpointed: int | None = None
        """The update whose checkpoint was written or read last."""
        self.rows = RowLosses(rows)
        self.masters = MasterWeights(trainable.method.parameters(), precision.compute)
        self.ranks = adalora_allocator(trainable.method.module, self.masters)
        self.best: dict[str, torch.Tensor] = {}
        """The masters of the best update so far, beside the device's memory; empty before the first evaluation."""
        self.optimizer = _optimizer(order.spec.trainer, self.masters)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=precision.scaled)

    def judge(self, found: Evaluation) -> bool:
        """Take in what the validation rows say of the present weights. Whether they are the best so far."""
        progress = self.progress
        progress.evaluated, progress.without_improvement = progress.update, progress.without_improvement + 1
        finite = math.isfinite(found.loss)
        progress.validation_loss, progress.validation_accuracy = (found.loss if finite else None), found.accuracy
        if not finite or (progress.best_loss is not None and found.loss >= progress.best_loss):
            return False
        progress.best_update, progress.without_improvement = progress.update, 0
        progress.best_loss, progress.best_accuracy = found.loss, found.accuracy
        self.best = {name: weights.cpu() for name, weights in self.masters.by_name().items()}
        self.rows.note(found.lines, found.sums, progress.update)
        return True

    def take_best(self) -> None:
        """Go back to the best weights, where there are better ones than the present."""
        if self.progress.published != self.progress.update:
            self.masters.load(self.best)

    def saved(self) -> Saved:
        best = {} if self.progress.best_update == self.progress.update else self.best
        moments = self.optimizer.state[self.masters.flat]
        return Saved(
            identity=self.identity,
            progress=self.progress,
            weights=self.masters.by_name(),
            optimizer={key: moment.detach().clone() for key, moment in moments.items()},
            ranks={} if self.ranks is None else self.ranks.state(),
            generators=self.generators(),
            scaler=self.scaler.state_dict(),
            best=best,
            rows=self.rows.saved(),
        )

    def restore(self, saved: Saved) -> None:
        """Take over `saved`. Raises TrainingError when it belongs to other work or another version."""
        if saved.identity != self.identity:
            raise TrainingError(
                "checkpoint_mismatch",
                "the checkpoint belongs to another spec, base model or set of rows",
                "submit the job again; it starts from the beginning",
            )
        if any(moment.ndim and moment.shape != self.masters.flat.shape for moment in saved.optimizer.values()):
            raise TrainingError(
                "checkpoint_mismatch",
                "the checkpoint was written by another version, which laid the optimizer's state out otherwise",
                "submit the job again; it starts from the beginning",
            )
        self.progress = saved.progress.model_copy()
        self.checkpointed = saved.progress.update
        self.masters.load(dict(saved.weights))
        self.best = dict(saved.best or (saved.weights if saved.progress.best_update is not None else {}))
        self.rows.restore(saved.rows)
        moments = {key: tensor.to(self.device) if tensor.ndim else tensor for key, tensor in saved.optimizer.items()}
        if moments:
            self.optimizer.state[self.masters.flat] = moments
        if self.ranks is not None:
            self.ranks.restore(dict(saved.ranks))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(saved.scaler))
        self.use(saved.generators)

    def generators(self) -> dict[str, torch.Tensor]:
        """The states of the random generators."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def use(self, generators: Mapping[str, torch.Tensor]) -> None:
        """Go on with what `generators` gave."""
        torch.set_rng_state(generators["cpu"])
        if self.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.device)


def identity(order: TrainOrder) -> str:
    """What a checkpoint must have in common with the order that resumes it: spec, schedule, base and rows."""
    digest = hashlib.sha256()
    for part in (order.spec.model_dump_json(), order.schedule.model_dump_json(), order.base.digest):
        digest.update(part.encode() + b"\0")
    digest.update(order.rows.read_bytes())
    return digest.hexdigest()


def _optimizer(trainer: Trainer, masters: MasterWeights) -> torch.optim.AdamW:
    asked = trainer.optimizer
    return torch.optim.AdamW(
        [masters.flat],
        lr=trainer.learning_rate,
        betas=asked.betas,
        eps=asked.eps,
        weight_decay=asked.weight_decay,
    )
