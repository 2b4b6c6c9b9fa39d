"""Memory that models take: estimated from their files before they are loaded, counted from their tensors afterwards."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig

from worker.architecture import is_llama
from worker.inference.ipc import EngineSettings
from worker.inference.model.linear import can_pack
from worker.inference.sampling_params import ServedModel

PROCESS_BYTES = {"cpu": 512 << 20, "cuda": 1 << 30}
"""Bytes of an engine that has loaded nothing: its libraries, or a GPU's context with kernels and CUDA graphs."""

BLOCK_SIZE, SCALES_BLOCK_SIZE = 64, 256
"""4-bit weights that share a scale, and scales that share one where they are quantised themselves."""

_OF_A_LAYER = re.compile(r"\.\d+\.")  # what is quantised; embeddings and output are in no numbered layer


class MemoryUse(NamedTuple):
    """Bytes of the device's memory, and of the host's if that is another one."""

    device: int = 0
    host: int = 0

    def plus(self, other: "MemoryUse") -> "MemoryUse":
        """The sum."""
        return MemoryUse(self.device + other.device, self.host + other.host)

    def minus(self, other: "MemoryUse") -> "MemoryUse":
        """The difference."""
        return MemoryUse(self.device - other.device, self.host - other.host)


class Budget(NamedTuple):
    """Bytes for the KV caches of running sequences, for the prefix cache, and for bases and adapters."""

    kv_cache: int
    prefix_cache: int
    models: MemoryUse


def budget(settings: EngineSettings, device: torch.device) -> Budget:
    """How an engine divides its memory."""
    available = max(0, settings.memory_bytes - PROCESS_BYTES[device.type])
    kv_cache = _share(settings.kv_bytes, available, 4)
    prefix_cache = _share(settings.prefix_cache_bytes, available - kv_cache, 12)
    return Budget(kv_cache, prefix_cache, MemoryUse(available - kv_cache - prefix_cache, settings.host_bytes))


def _share(asked: int | None, available: int, parts: int) -> int:
    return available // parts if asked is None else min(asked, available)


def base_memory(served: ServedModel, device: torch.device, dtype: torch.dtype) -> MemoryUse:
    """An estimate of a base's memory."""
    return MemoryUse(base_bytes(served, device, dtype))


def adapter_memory(num_bytes: int, device: torch.device) -> MemoryUse:
    """An adapter for our own forward: its weights stay in the host's memory, only slots are on the device."""
    return MemoryUse(num_bytes) if device.type == "cpu" else MemoryUse(host=num_bytes)


def base_bytes(served: ServedModel, device: torch.device, dtype: torch.dtype) -> int:
    """An estimate of a base's bytes. 0 if it cannot be read: loading it will give the reason."""
    sizes = [size for path in Path(served.base_path).glob("*.safetensors") for size in _sizes(path).items()]
    numbers = sum(size for _, size in sizes)
    if served.quantization is not None and device.type == "cuda":
        quantised = sum(size for name, size in sizes if _OF_A_LAYER.search(name))
        return int(quantised * _bytes_a_weight(served.quantization) + (numbers - quantised) * dtype.itemsize)
    is_packed = has_llama_forward(served.base_path) and can_pack(torch.empty(1, 1, dtype=dtype, device=device))
    copies = 2 if is_packed else 1  # the packed layout is a second copy
    return numbers * dtype.itemsize * copies


def weights_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of an adapter's weights in this dtype. 0 if they cannot be read: loading them will give the reason."""
    return sum(_sizes(directory / "adapter_model.safetensors").values()) * dtype.itemsize


def weights_in_memory(model: nn.Module) -> int:
    """Bytes of a model's weights and of their quantisation scales. Tensors that share a storage count once."""
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    for state in [getattr(parameter, "quant_state", None) for parameter in model.parameters()]:
        tensors += [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def has_llama_forward(directory: str) -> bool:
    """Whether the base in this directory is served by our own Llama-family forward."""
    try:
        return is_llama(AutoConfig.from_pretrained(directory, local_files_only=True))
    except Exception:
        return False


def _bytes_a_weight(quantization: dict[str, Any]) -> float:
    if quantization["bits"] == 8:
        return 1.0
    scale = 1 + 4 / SCALES_BLOCK_SIZE if quantization.get("double", True) else 4
    return 0.5 + scale / BLOCK_SIZE


def _sizes(path: Path) -> dict[str, int]:
    """The number of elements of each tensor in a safetensors file, from its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: _count(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except Exception:
        return {}


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
