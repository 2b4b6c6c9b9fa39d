"""The compute dtype on this hardware, for training and for serving.

It does not call `is_bf16_supported()`, which is True on a T4 although a T4 only emulates bfloat16.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from worker.processor import Cpu, cpu_here


class Fp16UnsafeError(Exception):
    """This GPU computes in float16 only, and the base model overflows in it."""


INITIAL_SCALE = 2.0**12
"""The initial loss scale under float16. PyTorch's default of 2^16 overflows the first updates of a 7B model."""


@dataclass(frozen=True, slots=True)
class Precision:
    """`compute`: the dtype of products and activations. `scaled`: whether the loss needs scaling."""

    name: str
    compute: torch.dtype
    scaled: bool


BF16 = Precision("bf16", torch.bfloat16, scaled=False)
FP16 = Precision("fp16", torch.float16, scaled=True)
FP32 = Precision("fp32", torch.float32, scaled=False)


def precision_for(
    capability: tuple[int, int] | None, cpu: Cpu, fp16: Literal["safe", "unsafe", "unknown"]
) -> Precision:
    """The precision for a CUDA capability, or for `cpu` when there is none.

    Raises Fp16UnsafeError when only float16 is left and the base model overflows in it.
    """
    if capability is None:
        return BF16 if cpu.fast_bf16 else FP32
    if capability >= (8, 0):
        return BF16
    if capability < (7, 0):
        return FP32
    if fp16 == "unsafe":
        raise Fp16UnsafeError("this base model overflows in float16, and this GPU has nothing wider that is fast")
    return FP16


def precision_here(device: torch.device, fp16: Literal["safe", "unsafe", "unknown"]) -> Precision:
    """The precision for `device` on this machine."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return precision_for(capability, cpu_here(), fp16)
