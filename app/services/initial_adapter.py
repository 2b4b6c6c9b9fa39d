"""The published adapter that a training starts from, against what its spec asks for."""

from collections.abc import Iterable, Iterator
from typing import Any

from app.db.tables import BaseModelRow
from app.domain.architectures import Architecture
from app.domain.errors import InvalidError, NotFoundError, Problem
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import AdapterSpec, LoraAdapter
from app.services.adapters import Adapters

SPEC_KEY = ("adapter", "pretrained_adapter_weights")


def pin_initial_adapter(
    spec: TrainSpec, base: BaseModelRow, sizes: Architecture | None, adapters: Adapters
) -> tuple[TrainSpec, str | None]:
    """(the spec with the id of its initial adapter, that adapter's digest), or (the spec, None) if it names none.

    Raises InvalidError if the spec would train other weights.
    """
    asked = spec.adapter
    if asked is None or asked.pretrained_adapter_weights is None:
        return spec, None
    try:
        found = adapters.get(asked.pretrained_adapter_weights)
    except NotFoundError:
        raise _invalid(
            f"there is no adapter {asked.pretrained_adapter_weights!r}", "GET /adapters lists them"
        ) from None
    if found.kind != "peft":
        raise _invalid(f"{found.id} is a full model and no adapter", "add it as a base model, and name it there")
    if found.manifest.base.digest != base.digest:
        theirs = found.manifest.base.name
        raise _invalid(
            f"{found.id} belongs to {theirs}, not to {base.name} as it is now", f"set base_model to {theirs}"
        )
    differing = list(_list_differences(asked, sizes, adapters.config(found.id)))
    if differing:
        theirs, ours = (", ".join(f"{key} {pair[side]}" for key, *pair in differing) for side in (0, 1))
        raise _invalid(f"{found.id} has {theirs}, and the config {ours}", f"write {theirs}")
    pinned = asked.model_copy(update={"pretrained_adapter_weights": found.id})
    return spec.model_copy(update={"adapter": pinned}), found.digest


def _list_differences(
    asked: AdapterSpec, sizes: Architecture | None, published: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(key, the adapter's value, the spec's value) of each differing key that defines the weights."""
    kind = str(published["peft_type"]).lower()
    if kind != asked.type:
        yield "type", kind, asked.type
    elif isinstance(asked, LoraAdapter):
        pairs = {
            "r": (published["r"], asked.r),
            "alpha": (published["lora_alpha"], asked.scale_alpha),
            "use_rslora": (published["use_rslora"], asked.use_rslora),
            "use_dora": (published["use_dora"], asked.use_dora),
            "target_modules": (_short_names(published["target_modules"]), _target_modules(asked, sizes)),
        }
        yield from ((key, theirs, ours) for key, (theirs, ours) in pairs.items() if ours not in (theirs, None))


def _target_modules(asked: LoraAdapter, sizes: Architecture | None) -> list[str] | None:
    """None if only the loaded model knows them."""
    if not isinstance(asked.target_modules, str):
        return _short_names(asked.target_modules)
    return sorted(sizes.linears) if sizes is not None and sizes.is_llama_family else None


def _short_names(names: Iterable[str]) -> list[str]:
    """The last part of each layer's name: PEFT writes full names or short ones."""
    return sorted({name.rpartition(".")[2] for name in names})


def _invalid(message: str, hint: str) -> InvalidError:
    problem = Problem(SPEC_KEY, message, hint)
    return InvalidError(f"{'.'.join(SPEC_KEY)}: {message}", code="invalid_spec", problems=(problem,))
