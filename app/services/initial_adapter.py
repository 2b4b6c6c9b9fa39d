"""The published adapter that a training starts from, against what its spec asks for."""

from collections.abc import Iterable, Iterator
from typing import Any

from app.db.tables import BaseModelRow
from app.domain.architectures import Architecture
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import AdapterSpec, LoraAdapter
from app.services.adapters import Adapters

PLACE = ("adapter", "pretrained_adapter_weights")


def pin_initial_adapter(
    spec: TrainSpec, base: BaseModelRow, sizes: Architecture | None, adapters: Adapters
) -> tuple[TrainSpec, str | None]:
    """(the spec, which names the adapter that it starts from by its id; that adapter's digest), or the spec as it is.

    Raises InvalidError where the weights are not what the spec would train.
    """
    asked = spec.adapter
    if asked is None or asked.pretrained_adapter_weights is None:
        return spec, None
    try:
        found = adapters.get(asked.pretrained_adapter_weights)
    except NotFoundError:
        raise _wrong(f"there is no adapter {asked.pretrained_adapter_weights!r}", "GET /adapters lists them") from None
    if found.kind != "peft":
        raise _wrong(f"{found.id} is a whole model and no adapter", "add it as a base model, and name it there")
    if found.manifest.base.digest != base.digest:
        theirs = found.manifest.base.name
        raise _wrong(f"{found.id} belongs to {theirs}, not to {base.name} as it is now", f"set base_model to {theirs}")
    differing = list(_differences(asked, sizes, adapters.config(found.id)))
    if differing:
        theirs, ours = (", ".join(f"{key} {pair[side]}" for key, *pair in differing) for side in (0, 1))
        raise _wrong(f"{found.id} has {theirs}, and the config {ours}", f"write {theirs}")
    pinned = asked.model_copy(update={"pretrained_adapter_weights": found.id})
    return spec.model_copy(update={"adapter": pinned}), found.digest


def _differences(
    asked: AdapterSpec, sizes: Architecture | None, published: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, what the adapter has, what the spec says) of all that gives its weights a shape or a meaning."""
    kind = str(published["peft_type"]).lower()
    if kind != asked.type:
        yield "type", kind, asked.type
    elif isinstance(asked, LoraAdapter):
        pairs = {
            "r": (published["r"], asked.r),
            "alpha": (published["lora_alpha"], asked.scale_alpha),
            "use_rslora": (published["use_rslora"], asked.use_rslora),
            "use_dora": (published["use_dora"], asked.use_dora),
            "target_modules": (_endings(published["target_modules"]), _target_modules(asked, sizes)),
        }
        yield from ((key, theirs, ours) for key, (theirs, ours) in pairs.items() if ours not in (theirs, None))


def _target_modules(asked: LoraAdapter, sizes: Architecture | None) -> list[str] | None:
    """None where only the model itself knows which those are."""
    if not isinstance(asked.target_modules, str):
        return _endings(asked.target_modules)
    return sorted(sizes.linears) if sizes is not None and sizes.is_llama_family else None


def _endings(names: Iterable[str]) -> list[str]:
    """Layers by the last part of their names: PEFT writes out where each of them is, or not."""
    return sorted({name.rpartition(".")[2] for name in names})


def _wrong(message: str, hint: str) -> InvalidError:
    problem = Problem(PLACE, message, hint)
    return InvalidError(f"{'.'.join(PLACE)}: {message}", code="invalid_spec", problems=(problem,))
