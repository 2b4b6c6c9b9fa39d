"""What models take in memory: before they are loaded, from their files; afterwards, from their weights."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from worker.architecture import is_llama
from worker.inference.ipc import EngineSettings
from worker.inference.model.linear import packs
from worker.inference.protocol import ServedModel

PROCESS_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
"""Of an engine that has loaded nothing: its libraries, or a GPU's context with kernels and recordings."""

BLOCK, BLOCK_OF_SCALES = 64, 256
"""Of 4-bit weights that share a scale, and of scales that share one where they are quantised themselves."""

JOINED = 2
"""Times what an adapter's weights take that they may take beside joined products: zeros stand where a rank of one
output meets the others."""

_OF_A_LAYER = re.compile(r"\.\d+\.")  # what is quantised; embeddings and output are in no numbered layer


class MemoryUse(NamedTuple):
    """Bytes in the device's memory, and in the host's where that is another one."""

    device: int = 0
    host: int = 0

    def plus(self, other: "MemoryUse") -> "MemoryUse":
        """Both together."""
        return MemoryUse(self.device + other.device, self.host + other.host)

    def less(self, other: "MemoryUse") -> "MemoryUse":
        """Without the other."""
        return MemoryUse(self.device - other.device, self.host - other.host)


class Budget(NamedTuple):
    """Bytes for keys and values of live sequences, for those of finished ones, and for bases and adapters."""

    live: int
    prefixes: int
    models: MemoryUse


def budget(settings: EngineSettings, device: torch.device) -> Budget:
    """How an engine divides its memory."""
    room = max(0, settings.memory_bytes - PROCESS_BYTES[device.type])
    live = _share(settings.kv_bytes, room, 4)
    prefixes = _share(settings.prefix_cache_bytes, room - live, 12)
    return Budget(live, prefixes, MemoryUse(room - live - prefixes, settings.host_bytes))


def _share(asked: int | None, room: int, parts: int) -> int:
    return room // parts if asked is None else min(asked, room)


def base_bytes(served: ServedModel, device: torch.device, dtype: torch.dtype) -> int:
    """About what a base will take. 0 for one that cannot be read: loading it will say why."""
    sizes = [size for path in Path(served.base_path).glob("*.safetensors") for size in _sizes(path).items()]
    numbers = sum(size for _, size in sizes)
    if served.quantization is not None and device.type == "cuda":
        quantised = sum(size for name, size in sizes if _OF_A_LAYER.search(name))
        return int(quantised * _bytes_a_weight(served.quantization) + (numbers - quantised) * dtype.itemsize)
    laid_out = has_llama_forward(served.base_path) and packs(torch.empty(1, 1, dtype=dtype, device=device))
    copies = 2 if laid_out else 1  # the kernel's layout is one more
    return numbers * dtype.itemsize * copies


def adapter_bytes(served: ServedModel, dtype: torch.dtype) -> int:
    """About what an adapter will take. 0 for one that cannot be read: loading it will say why."""
    joined = JOINED if has_llama_forward(served.base_path) else 1
    return 0 if served.adapter_path is None else weights_bytes(Path(served.adapter_path), dtype) * joined


def weights_bytes(directory: Path, dtype: torch.dtype) -> int:
    """What an adapter's weights take in this dtype. 0 for one that cannot be read: loading it will say why."""
    return sum(_sizes(directory / "adapter_model.safetensors").values()) * dtype.itemsize


def adapter_memory(size: int, device: torch.device) -> MemoryUse:
    """An adapter beside a base: in the memory that the host has."""
    return MemoryUse(size) if device.type == "cpu" else MemoryUse(host=size)


def weights_in_memory(model: nn.Module) -> int:
    """What a model's weights take, with the scales of quantised ones; those of layers that share one storage once."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for state in [getattr(parameter, "quant_state", None) for parameter in model.parameters()]:
        tensors += [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def has_llama_forward(directory: str) -> bool:
    """Whether the base there is served by the lean forward."""
    try:
        return is_llama(AutoConfig.from_pretrained(directory, local_files_only=True))
    except Exception:
        return False


def _bytes_a_weight(quantization: dict[str, Any]) -> float:
    if quantization["bits"] == 8:
        return 1.0
    scale = 1 + 4 / BLOCK_OF_SCALES if quantization.get("double", True) else 4
    return 0.5 + scale / BLOCK


def _sizes(path: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _count(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception:
        return {}


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
