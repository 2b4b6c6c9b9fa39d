"""AdaLoRA's rank allocation (Zhang et al., 2023). PEFT's RankAllocator decides; this gives it weights and gradients.

Its state is part of a checkpoint, so a resumed run keeps the same ranks as an uninterrupted one.
"""

from typing import Any

import torch
from torch import nn

from worker.training.master_weights import MasterWeights

NAME = "default"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class AdaLoraAllocator:
    """Over a PEFT model of type adalora."""

    def __init__(self, model: Any, masters: MasterWeights) -> None:
        self._tuner = model.base_model
        self._config = model.peft_config[NAME]
        self._masters = masters
        self._pairs = [name for name in masters.names if ".lora_A." in name or ".lora_B." in name]
        self._scales = [name for name in masters.names if ".lora_E." in name]

    def regularise(self) -> None:
        """Add the gradient of the orthogonality penalty, which belongs to an update and not to a micro-batch."""
        weight = self._config.orth_reg_weight / len(self._pairs)
        for name in self._pairs:
            value, gradient = self._masters.value(name), self._masters.gradient_of(name)
            turned = ".lora_B." in name
            rows = value.t() if turned else value
            off = rows @ rows.t() - torch.eye(rows.shape[0], device=rows.device)
            d_rows = (2 * weight / off.norm().clamp_min(1e-12)) * (off @ rows)
            gradient.add_(d_rows.t() if turned else d_rows)

    def allocate_ranks(self, applied: int) -> None:
        """Score the ranks by the update's gradients, and drop those above the budget after `applied` updates."""
        self._masters.lend_gradients()
        self._tuner.update_and_allocate(applied)
        for name in self._scales:
            self._masters.drop_zeros(name)

    def remaining_ranks(self) -> dict[str, int]:
        """Module → number of its remaining ranks. Empty as long as none is dropped."""
        pattern = self._config.rank_pattern or {}
        return {name.partition(".lora_E.")[0]: sum(flags) for name, flags in pattern.items()}

    def state(self) -> dict[str, torch.Tensor]:
        allocator = self._tuner.rankallocator
        kept = {f"{which}/{name}": value for which in AVERAGES for name, value in getattr(allocator, which).items()}
        pattern = self._config.rank_pattern or {}
        return kept | {f"pattern/{name}": torch.tensor(flags) for name, flags in pattern.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        device = self._masters.flat.device
        for key, value in state.items():
            which, _, name = key.partition("/")
            if which == "pattern":
                self._config.rank_pattern = {**(self._config.rank_pattern or {}), name: value.tolist()}
            else:
                getattr(self._tuner.rankallocator, which)[name] = value.to(device)


def adalora_allocator(module: nn.Module, masters: MasterWeights) -> AdaLoraAllocator | None:
    """The budget of a module that has one."""
    untyped: Any = module
    tuner = getattr(untyped, "base_model", None)
    return AdaLoraAllocator(untyped, masters) if hasattr(tuner, "rankallocator") else None
