"""Checks of a spec's target modules and rank against the layers of its base model."""

from app.domain.architectures import Architecture
from app.domain.errors import InvalidError, Problem
from app.domain.spec_parser import build_headline
from app.domain.specs import TrainSpec
from app.domain.spelling import did_you_mean
from app.domain.trainables import get_rank, list_lora_targets
from app.domain.tuning_methods import AdaloraAdapter, LoraAdapter

OTHER_LINEAR_LAYERS = ("lm_head",)
"""Linear layers outside the decoder's."""


def check_targets(spec: TrainSpec, sizes: Architecture | None) -> None:
    """Raise InvalidError for an unknown layer name, and for a rank above the size of a layer.

    It checks architectures with known layer names. Others are checked when the model is loaded.
    """
    adapter = spec.adapter
    if sizes is None or not sizes.is_llama_family or not isinstance(adapter, LoraAdapter | AdaloraAdapter):
        return
    known = (*sizes.linears, *OTHER_LINEAR_LAYERS)
    named = [] if isinstance(adapter.target_modules, str) else adapter.target_modules
    problems = [
        Problem(
            ("adapter", "target_modules", index),
            f"{name!r} names no linear layer of this base model",
            did_you_mean(name, known),
        )
        for index, name in enumerate(named)
        if name.rpartition(".")[2] not in known
    ]
    if not problems and (narrow := _narrower(sizes, spec)):
        name, (inputs, outputs) = narrow
        key = "r" if isinstance(adapter, LoraAdapter) else "init_r"
        message = f"a rank of {get_rank(spec)} is more than {name} has, which is {inputs} × {outputs}"
        hint = f"use at most {min(inputs, outputs)}, or other target_modules"
        problems.append(Problem(("adapter", key), message, hint))
    if problems:
        raise InvalidError(build_headline(problems), code="invalid_spec", problems=tuple(problems))


def _narrower(sizes: Architecture, spec: TrainSpec) -> tuple[str, tuple[int, int]] | None:
    """The narrowest target layer, if the rank is above its size."""
    narrowest = min(list_lora_targets(sizes, spec).items(), key=lambda layer: min(layer[1]), default=None)
    return narrowest if narrowest and get_rank(spec) > min(narrowest[1]) else None
