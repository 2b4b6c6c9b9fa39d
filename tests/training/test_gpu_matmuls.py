"""What an update asks of a card: the formats of its matrix products, and no wait for it within a micro-step.

At SmolLM2's layers on the meta device, under the number format that a card's capability leads to.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from app.domain.architectures import PUBLISHED_ARCHITECTURES
from benchmarks.shape_only import kernels_of_a_gpu, rows_of, shapes_of, transformers_forward
from tests.training.test_shapes import ADAPTERS
from worker.precision import Precision, precision_for
from worker.processor import Cpu
from worker.training.llama_forward import build_training_forward
from worker.training.master_weights import MasterWeights
from worker.training.model import TrainableModel
from worker.training.tuning_methods import TuningMethod
from worker.training.updates import backward_micro_batch

META = torch.device("meta")
SIZES = PUBLISHED_ARCHITECTURES["SmolLM2-135M"]
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "linear")
WAITS = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "item", "unique", "_unique2")


class Asked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation that reaches a device: its matrix products, and what waits for their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[tuple[str, torch.dtype, list[tuple[int, ...]]]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        # Beside its heads, attention's backward pass takes the logarithms of its sums, in float32 and in no product.
        least = 4 if "attention" in name else 2
        given = [a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point() and a.ndim >= least]
        if name.strip("_") in PRODUCTS or "attention" in name:
            self.products += [(name, operand.dtype, [tuple(a.shape) for a in given]) for operand in given]
        moved = isinstance(out, torch.Tensor) and out.device.type == "cpu"
        if name in WAITS or (moved and any(isinstance(a, torch.Tensor) and a.device == META for a in args)):
            self.waits.append(name)
        return out


def is_outer(shapes: list[tuple[int, ...]]) -> bool:
    """Whether nothing is added up: the angles of the positions, which transformers reckons in float32 on purpose."""
    return shapes[0][-1] == 1


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "dora", "adalora"])  # a meta device has no generator for dropout
@pytest.mark.parametrize(
    ("capability", "compute"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_products_have_the_cards_own_format_and_nothing_waits_for_it(
    adapter: str, capability: tuple[int, int], compute: torch.dtype, recompute: bool
) -> None:
    precision = precision_for(capability, Cpu(), "safe")
    assert precision.compute is compute
    seen = asked_of(precision, adapter, recompute=recompute)
    narrow = [product for product in seen.products if not is_outer(product[2])]
    assert len(narrow) > 20 * SIZES.layers
    assert {dtype for _name, dtype, _shapes in narrow} == {compute}
    assert seen.waits == []


def asked_of(precision: Precision, adapter: str, *, recompute: bool) -> Asked:
    """What two micro-steps over 4-bit weights ask of a device."""
    adapted, model = shapes_of(SIZES, ADAPTERS[adapter][1](), packed=True, compute=precision.compute)
    fast = build_training_forward(adapted, model.base_model, recompute=recompute)
    assert (fast is None) == (adapter in ("dora", "adalora"))
    hidden = fast or transformers_forward(model, recompute=recompute)
    trainable = TrainableModel(TuningMethod(adapted), model.base_model, hidden, model.lm_head, SIZES.vocabulary)
    masters = MasterWeights(trainable.method.parameters(), precision.compute)
    weight, seen = torch.ones((), device=META), Asked()
    with kernels_of_a_gpu(), seen:
        for _ in range(2):
            backward_micro_batch(trainable, masters, rows_of(512, 128, 0.33), weight)
    return seen
