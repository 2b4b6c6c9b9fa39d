"""A loaded base and the adapters over it.

- Where our own Llama-family forward serves the base, LoRA adapters are kept in the host's memory, and one batch may mix
  any of them.
- Elsewhere PEFT has one adapter, or none, switched on for a whole batch.
- An adapter of another kind owns its base, which is loaded for it alone.
"""

import hashlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from worker.inference.errors import ModelError
from worker.inference.model.adapter_files import read_adapter_config, read_adapter_weights
from worker.inference.model.base import Base
from worker.inference.model.linear import can_pack
from worker.inference.model.llama_forward import build_llama_forward
from worker.inference.model.lora import LayerLora
from worker.inference.model.memory_use import MemoryUse, adapter_memory, weights_bytes, weights_in_memory
from worker.inference.model.transformers_forward import Forward, TransformersForward

UNKNOWN = ""
"""Stands for the active adapter after one was added or removed: PEFT may have switched others on or off."""


class AdaptedBase:
    """A base and its loaded adapters.

    - `loaded`: the adapters by digest, least recently used first: fused LoRA weights, or the adapter's name in PEFT.
    - `base_memory`: the base, with the adapter that owns it if there is one.
    - `adapter_sizes`: the other adapters, without their slots.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.peft: PeftModel | None = None
        self.active: str | None = None
        self.loaded: OrderedDict[str, list[LayerLora] | str] = OrderedDict()
        self.adapter_owns_base = False
        self._transformers_forward = TransformersForward(base.model)
        self._llama_forward = build_llama_forward(base.model)
        self._slots = None if self._llama_forward is None else self._llama_forward.create_slots()
        is_packed = self._llama_forward is not None and can_pack(next(base.model.parameters()))
        copies = 2 if is_packed else 1  # the packed layout is a second copy
        self.base_memory = MemoryUse(weights_in_memory(base.model) * copies)
        self.adapter_sizes: dict[str, MemoryUse] = {}
        self._adapters_memory = MemoryUse()  # their sum

    @property
    def memory(self) -> MemoryUse:
        """Bytes of the base, its adapters and their slots."""
        return self.base_memory.plus(self._adapters_memory).plus(self.slots_memory)

    @property
    def slots_memory(self) -> MemoryUse:
        """Bytes of the adapter slots, or what is reserved for them."""
        return MemoryUse(0 if self._slots is None else self._slots.bytes)

    def can_share_batch(self, digest: str | None) -> bool:
        """Whether this adapter, or the base for None, can share a batch with other adapters."""
        return self._llama_forward is not None and (digest is None or not isinstance(self.loaded[digest], str))

    def forward(
        self, digests: Sequence[str | None], *, deterministic: bool = False, may_capture: bool = True
    ) -> Forward:
        """The forward of a batch whose rows use these adapters, or the base for None. If they cannot share a batch, all
        are the same. `deterministic`: there is one row, and its shapes must not depend on other requests."""
        named = [digest for digest in dict.fromkeys(digests) if digest is not None]
        for digest in named:
            self.loaded.move_to_end(digest)
        if self._llama_forward is None or self._slots is None or not self.can_share_batch(digests[0]):
            self._activate(digests[0])
            return self._transformers_forward
        loras = self._slots.select(digests, self._lora_weights(named), deterministic=deterministic)
        return partial(self._llama_forward, loras=loras, may_capture=may_capture)

    def reserve_slots(
        self, digests: Sequence[str | None], make_room: Callable[[Callable[[], MemoryUse]], None]
    ) -> None:
        """Reserve slots for a batch with these adapters. `make_room` is called with the memory to add, and raises if it
        does not fit."""
        sharing = [digest for digest in digests if self.can_share_batch(digest)]
        if self._slots is not None and sharing:
            weights = self._lora_weights(sharing)
            self._slots.reserve(sharing, weights, lambda needed: make_room(lambda: MemoryUse(needed())))

    def free_slots(self) -> None:
        """Free the adapter slots. They are filled again when a batch needs them."""
        if self._slots is not None:
            self._slots.free()

    def load(
        self, digest: str, directory: Path, max_rank: int, make_room: Callable[[MemoryUse], None] = lambda _: None
    ) -> None:
        """Load an adapter from its PEFT directory. `make_room` is called with its size, and raises if that does not
        fit. A broken adapter raises ModelError and leaves nothing behind."""
        config = read_adapter_config(digest, directory, max_rank)
        is_lora = isinstance(config, LoraConfig)
        if self.adapter_owns_base or (self.loaded and not is_lora):
            raise ModelError(f"adapter {digest} cannot share its base model with others")
        weights = read_adapter_weights(digest, directory)
        if (fused := self._fuse(digest, config, weights)) is not None:
            num_bytes = sum(pair.nbytes for layer in fused for pair in layer if pair)
            make_room(size := adapter_memory(num_bytes, self.base.model.device))
            self._add(digest, fused, size)
            return
        make_room(size := MemoryUse(weights_bytes(directory, self.base.model.dtype)))
        name = "a" + hashlib.sha256(digest.encode()).hexdigest()[:24]  # PEFT allows no dots in names
        try:
            self._inject(name, config)
            self._set_weights(name, weights)
        except Exception as error:
            self._remove_from_peft(name)
            raise ModelError(f"adapter {digest} does not fit its base model: {_reason(error)}") from error
        finally:
            self.active = UNKNOWN
        self.adapter_owns_base = not is_lora
        self._add(digest, name, size)

    def evict_adapter(self, digest: str) -> None:
        """Remove an adapter and free its memory."""
        loaded = self.loaded.pop(digest)
        self._adapters_memory = self._adapters_memory.minus(self.adapter_sizes.pop(digest))
        if isinstance(loaded, str):
            self._remove_from_peft(loaded)
            self.active = UNKNOWN
        elif self._slots is not None:
            self._slots.remove(digest)

    def _fuse(self, digest: str, config: PeftConfig, weights: dict[str, torch.Tensor]) -> list[LayerLora] | None:
        """The adapter's weights for our own forward; None if only PEFT can apply them. Raises ModelError."""
        if self._llama_forward is None or not isinstance(config, LoraConfig):
            return None
        try:
            return self._llama_forward.read_lora(config, weights)
        except Exception as error:
            raise ModelError(f"adapter {digest} does not fit its base model: {_reason(error)}") from error

    def _lora_weights(self, digests: Sequence[str | None]) -> dict[str, list[LayerLora]]:
        named = [digest for digest in digests if digest is not None]
        return {digest: weights for digest in named if not isinstance(weights := self.loaded[digest], str)}

    def _activate(self, digest: str | None) -> None:
        """Let PEFT apply this adapter, or none."""
        if self.peft is None or digest == self.active or self.adapter_owns_base:
            return
        tuner: Any = self.peft.base_model
        if digest is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(str(self.loaded[digest]), inference_mode=True)
        self.active = digest

    def _add(self, digest: str, loaded: list[LayerLora] | str, size: MemoryUse) -> None:
        self.loaded[digest] = loaded
        if self.adapter_owns_base:
            self.base_memory = self.base_memory.plus(size)
        else:
            self.adapter_sizes[digest] = size
            self._adapters_memory = self._adapters_memory.plus(size)

    def _inject(self, name: str, config: PeftConfig) -> None:
        if self.peft is None:
            with warnings.catch_warnings():
                # PEFT asks transformers for a property by its old name
                warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
                self.peft = PeftModel(self.base.model, config, name, autocast_adapter_dtype=False)
        else:
            self.peft.add_adapter(name, config, autocast_adapter_dtype=False)
        self.peft.eval()  # freshly injected modules start in training mode, with dropout

    def _set_weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
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

    def _remove_from_peft(self, name: str) -> None:
        if self.peft is not None and name in self.peft.peft_config:
            self.peft.delete_adapter(name)
        if self.peft is not None and not self.peft.peft_config:
            # A wrapper without adapters cannot take new ones: unwrap, and wrap again on the next load.
            tuner: Any = self.peft.base_model
            tuner.unload()
            self.peft = None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(text.strip() for text in lines)[:300]
