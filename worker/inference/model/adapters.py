"""One base and the adapters over it: which of them answers.

Where the lean forward serves a base, LoRA adapters lie beside it in the host's memory, and the rows of one batch may
have any mix of them. Elsewhere PEFT has one of them, or none, switched on for a whole batch. An adapter of another kind
has a base for itself, which answers as that adapter and nothing else. Knows no requests.
"""

import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from worker.inference.cache.kv_cache import Forward
from worker.inference.model.base import Base, ModelError
from worker.inference.model.linear import packs
from worker.inference.model.llama_forward import TransformersForward, build_llama_forward
from worker.inference.model.lora import LayerLora
from worker.inference.model.memory_use import MemoryUse, adapter_memory, weights_bytes, weights_in_memory

# Their initialisers change the base's own weights, which all other adapters share.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")


SERVED_KINDS = ("LORA", "IA3", "ADAPTION_PROMPT")

UNKNOWN = ""  # adding or removing an adapter may change which ones PEFT has switched on


class AdaptedBase:
    """A base and its loaded adapters, least recently used first: beside its lean forward, or under PEFT's names."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.peft: PeftModel | None = None
        self.active: str | None = None
        self.loaded: OrderedDict[str, list[LayerLora] | str] = OrderedDict()
        self._stock = TransformersForward(base.model)
        self._lean = build_llama_forward(base.model)
        self._stack = None if self._lean is None else self._lean.stack()
        self._alone = False
        laid_out = self._lean is not None and packs(next(base.model.parameters()))
        copies = 2 if laid_out else 1  # the kernel's layout is one more
        self.bare = MemoryUse(weights_in_memory(base.model) * copies)
        """What the base takes, with an adapter that has it to itself."""
        self.sizes: dict[str, MemoryUse] = {}
        """Of its other adapters, without their places."""
        self._adapters = MemoryUse()

    def mixes(self, digest: str | None) -> bool:
        """Whether a batch may hold this adapter, or the base for None, beside others."""
        return self._lean is not None and (digest is None or not isinstance(self.loaded[digest], str))

    def forward(self, digests: Sequence[str | None], *, alone: bool = False, may_record: bool = True) -> Forward:
        """The forward of a batch whose rows answer as these adapters, or as the base for None. Where they do not mix,
        they are all the same. `alone`: the only row is computed in shapes that depend on nobody else."""
        named = [digest for digest in dict.fromkeys(digests) if digest is not None]
        for digest in named:
            self.loaded.move_to_end(digest)
        if self._lean is None or self._stack is None or not self.mixes(digests[0]):
            self._switch_on(digests[0])
            return self._stock
        mix = self._stack.mix(digests, self._beside(named), alone=alone)
        return partial(self._lean, mix=mix, may_record=may_record)

    def growth(self, digests: Sequence[str | None]) -> MemoryUse:
        """What `forward` will take for those of these that mix, at most."""
        mixing = self._mixing(digests)
        return MemoryUse(0 if self._stack is None else self._stack.growth(mixing, self._beside(mixing)))

    def growth_with(self, size: int, digests: Sequence[str | None]) -> MemoryUse:
        """The same for one more, of which only the bytes are known; or more than that."""
        mixing = self._mixing(digests)
        return MemoryUse(0 if self._stack is None else self._stack.growth_with(size, mixing, self._beside(mixing)))

    def promise(self, digests: Sequence[str | None]) -> None:
        """Count from now on what `forward` will take for these, instead of those that mixed before."""
        mixing = self._mixing(digests)
        if self._stack is not None and mixing:
            self._stack.promise(mixing, self._beside(mixing))

    def _mixing(self, digests: Sequence[str | None]) -> list[str | None]:
        return [digest for digest in digests if self.mixes(digest)]

    def _beside(self, digests: Sequence[str | None]) -> dict[str, list[LayerLora]]:
        """Those of them that lie beside the base."""
        named = [digest for digest in digests if digest is not None]
        return {digest: own for digest in named if not isinstance(own := self.loaded[digest], str)}

    def _switch_on(self, digest: str | None) -> None:
        """Make PEFT answer as this adapter, or as the base for None."""
        if self.peft is None or digest == self.active or self._alone:
            return
        tuner: Any = self.peft.base_model
        if digest is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(str(self.loaded[digest]), inference_mode=True)
        self.active = digest

    def load(
        self, digest: str, directory: Path, max_rank: int, make_room: Callable[[MemoryUse], None] = lambda _: None
    ) -> None:
        """Add an adapter from its PEFT directory. A bad one raises ModelError and leaves nothing behind. `make_room`
        is told what it will take, and raises where that is too much."""
        config = _read_config(digest, directory, max_rank)
        shared = isinstance(config, LoraConfig)
        if self._alone or (self.loaded and not shared):
            raise ModelError(f"adapter {digest} cannot share its base model with others")
        weights = _read_weights(digest, directory)
        if self._lean is not None and isinstance(config, LoraConfig):
            try:
                beside = self._lean.read_lora(config, weights)
            except Exception as error:
                raise ModelError(f"adapter {digest} does not fit its base model: {_reason(error)}") from error
            if beside is not None:
                size = sum(part.nbytes for layer in beside for lora in layer if lora for part in lora)
                make_room(held := adapter_memory(size, self.base.model.device))
                self._note(digest, beside, held)
                return
        make_room(held := MemoryUse(weights_bytes(directory, self.base.model.dtype)))
        name = "a" + hashlib.sha256(digest.encode()).hexdigest()[:24]  # PEFT allows no dots in names
        try:
            self._inject(name, config)
            self._fill(name, weights)
        except Exception as error:
            self._forget(name)
            raise ModelError(f"adapter {digest} does not fit its base model: {_reason(error)}") from error
        finally:
            self.active = UNKNOWN
        self._alone = not shared
        self._note(digest, name, held)

    @property
    def is_alone(self) -> bool:
        """Whether its adapter has it to itself: they go together."""
        return self._alone

    @property
    def bytes(self) -> MemoryUse:
        """What the base, its adapters and their places take."""
        return self.bare.plus(self._adapters).plus(self.places)

    @property
    def places(self) -> MemoryUse:
        """What the adapters' places take, or are promised."""
        return MemoryUse(0 if self._stack is None else self._stack.bytes)

    def clear_places(self) -> None:
        """Give the adapters' places back."""
        if self._stack is not None:
            self._stack.clear()

    def drop(self, digest: str) -> None:
        """Forget an adapter and give its memory back."""
        loaded = self.loaded.pop(digest)
        self._adapters = self._adapters.less(self.sizes.pop(digest))
        if isinstance(loaded, str):
            self._forget(loaded)
            self.active = UNKNOWN
        elif self._stack is not None:
            self._stack.forget(digest)

    def _note(self, digest: str, loaded: list[LayerLora] | str, held: MemoryUse) -> None:
        self.loaded[digest] = loaded
        if self._alone:
            self.bare = self.bare.plus(held)
        else:
            self.sizes[digest] = held
            self._adapters = self._adapters.plus(held)

    def _inject(self, name: str, config: PeftConfig) -> None:
        if self.peft is None:
            with warnings.catch_warnings():
                # PEFT asks transformers for a property by its old name
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                self.peft = PeftModel(self.base.model, config, name, autocast_adapter_dtype=False)
        else:
            self.peft.add_adapter(name, config, autocast_adapter_dtype=False)
        self.peft.eval()  # freshly injected modules start in training mode, with dropout

    def _fill(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        assert self.peft is not None
        wanted = get_peft_model_state_dict(self.peft, adapter_name=name, save_embedding_layers=False).keys()
        if missing := len(wanted - weights.keys()):
            raise ModelError(f"{missing} of its weights are missing")
        result: Any = set_peft_model_state_dict(self.peft, weights, adapter_name=name)
        if surplus := len(result.unexpected_keys):
            raise ModelError(f"{surplus} of its weights are not in the base")
        for parameter in self.peft.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.base.model.dtype)
                parameter.requires_grad_(False)

    def _forget(self, name: str) -> None:
        if self.peft is not None and name in self.peft.peft_config:
            self.peft.delete_adapter(name)
        if self.peft is not None and not self.peft.peft_config:
            # A wrapper without adapters cannot take new ones: unwrap, and wrap again on the next load.
            tuner: Any = self.peft.base_model
            tuner.unload()
            self.peft = None


def _read_config(digest: str, directory: Path, max_rank: int) -> PeftConfig:
    try:
        raw: dict[str, Any] = json.loads((directory / "adapter_config.json").read_bytes())
        kind = raw.get("peft_type")
        config: Any = PeftConfig.from_pretrained(str(directory)) if kind in SERVED_KINDS else None
    except Exception as error:
        raise ModelError(f"adapter {digest} has no readable adapter_config.json") from error
    if config is None:
        raise ModelError(f"adapter {digest} is of type {kind}; this engine serves {', '.join(SERVED_KINDS)}")
    if isinstance(config, LoraConfig):
        _check_lora(digest, config, max_rank)
    config.inference_mode = True
    checked: PeftConfig = config
    return checked


def _check_lora(digest: str, config: LoraConfig, max_rank: int) -> None:
    initialiser: Any = config.init_lora_weights
    if isinstance(initialiser, str) and initialiser.lower().startswith(CHANGES_THE_BASE):
        raise ModelError(f"adapter {digest} was initialised by {initialiser}: convert it to plain LoRA first")
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    if not all(isinstance(rank, int) for rank in ranks):
        raise ModelError(f"adapter {digest} has a rank that is no whole number")
    rank = max(ranks)
    if rank > max_rank:
        raise ModelError(f"adapter {digest} has rank {rank}; at most {max_rank} is served")


def _read_weights(digest: str, directory: Path) -> dict[str, torch.Tensor]:
    try:
        weights = load_file(directory / "adapter_model.safetensors")
    except Exception as error:
        raise ModelError(f"adapter {digest} has no readable adapter_model.safetensors") from error
    if bad := [key for key, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]:
        raise ModelError(f"adapter {digest} holds NaN or infinite weights, first in {bad[0]}")
    return weights


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(text.strip() for text in lines)[:300]
