"""What models take in memory: before they are loaded, from their files; afterwards, from their weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from worker.inference.products import packs
from worker.inference.protocol import ServedModel

BESIDE_BLOCKS = 1.1
"""Of quantised weights: block scales, and layers that stay as they are."""


def base_bytes(served: ServedModel, device: torch.device, dtype: torch.dtype) -> int:
    """About what a base will take. 0 for one that cannot be read: loading it will say why."""
    numbers = sum(_numbers(path) for path in Path(served.base_path).glob("*.safetensors"))
    if served.quantization is not None and device.type == "cuda":
        return int(numbers * int(served.quantization["bits"]) / 8 * BESIDE_BLOCKS)
    copies = 2 if packs(torch.empty(1, 1, dtype=dtype, device=device)) else 1  # the kernel's layout is one more
    return numbers * dtype.itemsize * copies


def adapter_bytes(directory: Path, dtype: torch.dtype) -> int:
    """What an adapter's weights take in this dtype. 0 for one that cannot be read: loading it will say why."""
    return _numbers(directory / "adapter_model.safetensors") * dtype.itemsize


def held_bytes(model: nn.Module) -> int:
    """What a model's weights take: those of layers that share one storage once."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return sum(_count(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - it is no dict
    except Exception:
        return 0


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
