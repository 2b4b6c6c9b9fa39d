"""Plans: the rows, tokens, updates and memory of a job, computed before it runs. Pure arithmetic, no tokenizer."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import JsonValue

from app.domain.frozen import Frozen
from app.domain.ledger import Policy
from app.domain.memory import MemoryEstimate, MicroBatchSize
from app.domain.specs import TrainSpec

TOKENS_PER_MICRO_BATCH = {"cpu": 768, "gpu": 4_096}
"""Tokens of one micro-batch with `batch_size: auto`.

More is not faster on a CPU. 4,096 tokens of a 7B model fit a 16 GB card with gradient checkpointing.
"""

DENSER_MICRO_BATCH = 1.25
"""How much greater a micro-batch's share of tokens with a loss may be than the share of all rows."""


class TokenLengths(Frozen):
    """Order statistics of sequence lengths, in tokens. All are zero for no sequences."""

    count: int = 0
    minimum: int = 0
    median: int = 0
    p95: int = 0
    maximum: int = 0
    total: int = 0

    @classmethod
    def measure(cls, lengths: Sequence[int]) -> Self:
        if not lengths:
            return cls()
        ranked = sorted(lengths)

        def at(share: float) -> int:
            return ranked[min(len(ranked) - 1, math.ceil(share * len(ranked)) - 1)]

        return cls(
            count=len(ranked),
            minimum=ranked[0],
            median=at(0.5),
            p95=at(0.95),
            maximum=ranked[-1],
            total=sum(ranked),
        )


class Schedule(Frozen):
    """The shape of a training run. `rows_per_update` is the effective batch size, in trajectories.

    A micro-batch has at most `max_rows` rows (None: no limit) and at most `max_tokens` tokens. A longer row is a
    micro-batch of its own. `evaluate_every`: updates between two evaluations, 0 if there are no validation rows. The
    last update is always evaluated.
    """

    rows: int
    updates: int
    updates_per_epoch: int
    rows_per_update: int
    max_rows: int | None
    max_tokens: int
    warmup_updates: int
    checkpoint_every: int
    evaluate_every: int = 0

    @classmethod
    def for_spec(
        cls, spec: TrainSpec, rows: int, longest: int, device: Literal["cpu", "gpu"], validation_rows: int = 0
    ) -> Self:
        """`rows`: number of training rows. `longest`: tokens of the longest row of any split."""
        trainer = spec.trainer
        effective = min(trainer.effective_rows, rows)
        per_epoch = math.ceil(rows / effective)
        updates = trainer.train_steps or max(1, round(trainer.epochs * per_epoch))
        scheduler = trainer.learning_rate_scheduler
        every = trainer.steps_per_checkpoint or max(10, math.ceil(updates / 10))
        return cls(
            rows=rows,
            updates=updates,
            updates_per_epoch=per_epoch,
            rows_per_update=effective,
            max_rows=None if trainer.batch_size == "auto" else trainer.batch_size,
            max_tokens=max(longest, TOKENS_PER_MICRO_BATCH[device]),
            warmup_updates=math.ceil(scheduler.warmup_fraction * updates),
            checkpoint_every=every,
            evaluate_every=(trainer.steps_per_checkpoint or per_epoch) if validation_rows else 0,
        )

    def evaluates_after(self, update: int) -> bool:
        """Whether the validation rows are evaluated after this update."""
        return self.evaluate_every > 0 and update > 0 and (update % self.evaluate_every == 0 or update == self.updates)

    def get_largest_micro_batch(self, longest: int, labelled_share: float = 1.0) -> MicroBatchSize:
        """The largest possible micro-batch, if the longest row has `longest` tokens.

        `labelled_share`: share of the rows' tokens with a loss.
        """
        rows = self.rows_per_update if self.max_rows is None else min(self.max_rows, self.rows_per_update)
        tokens = max(longest, min(self.max_tokens, rows * longest))
        labelled = math.ceil(tokens * min(1.0, labelled_share * DENSER_MICRO_BATCH))
        return MicroBatchSize(tokens, longest, labelled, self.updates)


class Remedy(Frozen):
    """A change of the config that makes the job fit its device. `bytes`: the peak of the plan with this change."""

    change: dict[str, JsonValue]
    bytes: int


class OverlengthRow(Frozen):
    """What the over-length policy does to one row. `tokens`: before; `kept_tokens`: after, 0 if it is dropped."""

    line: int
    tokens: int
    kept_tokens: int
    action: Literal["trimmed", "protected", "dropped", "refused"]
    labelled_tokens_lost: int = 0


class Plan(Frozen):
    """What a training job would need.

    `device`: the device of the plan, with `device_bytes` of memory, or `unknown`. `memory` and `fits`: None if the
    device or the model's sizes are unknown. `seconds`: training time at the speed of the last job over this base on
    that device. `gradient_checkpointing`: the value chosen for `auto`. `policy`: what happens to inference while the
    job trains, None if no device is known. `remedies`: if it does not fit, changes that each make it fit.
    `overlength`: the first rows only, unless all are requested; the counts are exact.

    `rows` = trained + validation + test + dropped. Lengths, tokens, branches and verdict rows count the training rows.
    """

    kind: Literal["train"] = "train"
    base_model: str
    dataset: str
    device: str
    rows: int
    rows_trained: int
    rows_validation: int = 0
    rows_test: int = 0
    rows_trimmed: int
    rows_protected: int
    rows_dropped: int
    protected_share: float
    max_sequence_length: int
    lengths: TokenLengths
    tokens_per_epoch: int
    labelled_tokens_per_epoch: int
    verdict_branches: int
    verdict_rows: int = 0
    total_updates: int
    updates_per_epoch: int
    rows_per_update: int
    tokens_per_micro_batch: int
    warmup_updates: int
    trainable_parameters: int | None = None
    gradient_checkpointing: bool = False
    memory: MemoryEstimate | None = None
    device_bytes: int | None = None
    fits: bool | None = None
    policy: Policy | None = None
    remedies: tuple[Remedy, ...] = ()
    seconds: float | None = None
    overlength: tuple[OverlengthRow, ...] = ()
    warnings: tuple[str, ...] = ()


def plan_example() -> dict[str, Any]:
    """Example for the documentation: the demo's dataset, planned for a T4."""
    return {
        "kind": "train",
        "base_model": "smollm2-135m",
        "dataset": "demo",
        "device": "t4",
        "rows": 240,
        "rows_trained": 240,
        "rows_trimmed": 0,
        "rows_protected": 0,
        "rows_dropped": 0,
        "protected_share": 0.0,
        "max_sequence_length": 2048,
        "lengths": {"count": 240, "minimum": 133, "median": 153, "p95": 217, "maximum": 246, "total": 40034},
        "tokens_per_epoch": 40792,
        "labelled_tokens_per_epoch": 16192,
        "verdict_branches": 58,
        "verdict_rows": 0,
        "total_updates": 45,
        "updates_per_epoch": 15,
        "rows_per_update": 16,
        "tokens_per_micro_batch": 4096,
        "warmup_updates": 2,
        "trainable_parameters": 4884480,
        "gradient_checkpointing": False,
        "memory": {
            "weights": 111462336,
            "adapter": 29306880,
            "gradients": 29306880,
            "optimizer": 39075840,
            "activations": 1552295936,
            "logits": 353501184,
            "quantization_buffers": 1824768,
            "checkpoint": 58613760,
            "reserve": 720316620,
            "total": 2752888972,
        },
        "device_bytes": 15569256448,
        "fits": True,
        "policy": "share",
        "remedies": [],
        "seconds": None,
        "overlength": [],
        "warnings": [],
    }
