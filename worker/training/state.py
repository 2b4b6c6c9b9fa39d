"""The mutable state of a run: master weights, optimizer, loss scale, random generators and progress."""

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch

from app.domain.attempts import EncodedRow, TrainOrder
from app.domain.specs import Trainer
from worker.precision import INITIAL_SCALE, Precision
from worker.training.adalora import adalora_allocator
from worker.training.checkpoints import Progress, TrainingState
from worker.training.errors import TrainingError
from worker.training.evaluation import Evaluation
from worker.training.loss_trend import add_loss
from worker.training.master_weights import MasterWeights
from worker.training.memory import Heap
from worker.training.model import TrainableModel
from worker.training.row_losses import RowLosses


class RunState:
    """Everything that an update changes, and a checkpoint holds."""

    def __init__(
        self,
        order: TrainOrder,
        trainable: TrainableModel,
        rows: Sequence[EncodedRow],
        precision: Precision,
        device: torch.device,
    ) -> None:
        self.identity = hash_order(order)
        self.device = device
        self._total_updates = order.schedule.updates
        self.progress = Progress()
        self.checkpointed_update: int | None = None
        """The update of the checkpoint that was last written or read."""
        self.row_losses = RowLosses(rows, order.spec.trainer.verdict_weight)
        self.masters = MasterWeights(trainable.method.parameters(), precision.compute)
        self.rank_allocator = adalora_allocator(trainable.method.module, self.masters)
        self.best_weights: dict[str, torch.Tensor] = {}
        """Master weights of the best update so far, in the CPU's memory. Empty before the first evaluation."""
        self.optimizer = _optimizer(order.spec.trainer, self.masters)
        self.heap = Heap(order.resident_limit)
        self.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_SCALE, enabled=precision.scaled)

    def record_update(self, update: int, loss: float | None, tokens: int, labelled: int, seconds: float) -> None:
        """Add update number `update` to the progress. `loss`: None if the update was skipped."""
        progress = self.progress
        progress.update = update
        progress.tokens += tokens
        progress.labelled_tokens += labelled
        progress.seconds += seconds
        if loss is not None:
            progress.loss = loss
            progress.first_losses, progress.last_losses = add_loss(
                progress.first_losses, progress.last_losses, loss, self._total_updates
            )

    def record_validation(self, evaluation: Evaluation) -> bool:
        """Record the validation loss of the present weights. Returns whether it is the lowest so far."""
        progress = self.progress
        progress.evaluated, progress.without_improvement = progress.update, progress.without_improvement + 1
        finite = math.isfinite(evaluation.loss)
        progress.validation_loss, progress.validation_accuracy = (
            (evaluation.loss if finite else None),
            evaluation.accuracy,
        )
        if not finite or (progress.best_loss is not None and evaluation.loss >= progress.best_loss):
            return False
        progress.best_update, progress.without_improvement = progress.update, 0
        progress.best_loss, progress.best_accuracy = evaluation.loss, evaluation.accuracy
        self.best_weights = {name: weights.cpu() for name, weights in self.masters.by_name().items()}
        self.row_losses.record(evaluation.lines, evaluation.loss_sums, progress.update)
        return True

    def load_best_weights(self) -> None:
        """Load the weights of the best update, unless the present ones are published."""
        if self.progress.published_update != self.progress.update:
            self.masters.load(self.best_weights)

    def snapshot(self) -> TrainingState:
        """Copy the state for a checkpoint."""
        moments = self.optimizer.state[self.masters.flat]
        return TrainingState(
            identity=self.identity,
            progress=self.progress,
            weights=self.masters.by_name(),
            optimizer={key: moment.detach().clone() for key, moment in moments.items()},
            ranks={} if self.rank_allocator is None else self.rank_allocator.state(),
            generators=self.get_generators(),
            scaler=self.scaler.state_dict(),
            best={} if self.progress.best_update == self.progress.update else self.best_weights,
            rows=self.row_losses.state_dict(),
        )

    def restore(self, saved: TrainingState) -> None:
        """Restore the state of a checkpoint. Raises TrainingError if another order or another version wrote it."""
        if saved.identity != self.identity:
            raise TrainingError(
                "checkpoint_mismatch",
                "the checkpoint belongs to another spec, base model or set of rows",
                "submit the job again; it starts from the beginning",
            )
        if any(moment.ndim and moment.shape != self.masters.flat.shape for moment in saved.optimizer.values()):
            raise TrainingError(
                "checkpoint_mismatch",
                "the checkpoint was written by another version, whose optimizer state has another shape",
                "submit the job again; it starts from the beginning",
            )
        self.progress = saved.progress.model_copy()
        self.checkpointed_update = saved.progress.update
        self.masters.load(dict(saved.weights))
        self.best_weights = dict(saved.best or (saved.weights if saved.progress.best_update is not None else {}))
        self.row_losses.load_state_dict(saved.rows)
        moments = {key: tensor.to(self.device) if tensor.ndim else tensor for key, tensor in saved.optimizer.items()}
        if moments:
            self.optimizer.state[self.masters.flat] = moments
        if self.rank_allocator is not None:
            self.rank_allocator.restore(dict(saved.ranks))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(saved.scaler))
        self.set_generators(saved.generators)

    def get_generators(self) -> dict[str, torch.Tensor]:
        """Copy the states of torch's random generators."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states

    def set_generators(self, generators: Mapping[str, torch.Tensor]) -> None:
        """Restore the states that `get_generators` returned."""
        torch.set_rng_state(generators["cpu"])
        if self.device.type == "cuda" and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.device)


def hash_order(order: TrainOrder) -> str:
    """Digest of spec, schedule, base and rows. An order resumes only from checkpoints with the same digest."""
    digest = hashlib.sha256()
    for part in (order.spec.model_dump_json(), order.schedule.model_dump_json(), order.base.digest):
        digest.update(part.encode() + b"\0")
    digest.update(order.rows.read_bytes())
    return digest.hexdigest()


def _optimizer(trainer: Trainer, masters: MasterWeights) -> torch.optim.AdamW:
    spec = trainer.optimizer
    return torch.optim.AdamW(
        [masters.flat],
        lr=trainer.learning_rate,
        betas=spec.betas,
        eps=spec.eps,
        weight_decay=spec.weight_decay,
    )
