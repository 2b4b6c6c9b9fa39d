"""Which model answers: bases and the adapters over them, loaded on demand and dropped by LRU.

Where the lean forward serves a base, LoRA adapters lie beside it in memory, and the rows of one batch may have any mix
of them. Elsewhere PEFT has one of them, or none, switched on for a whole batch. An adapter of another kind has a base
for itself, which answers as that adapter and nothing else. Knows no requests.
"""

import gc
import hashlib
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from worker.inference.bases import Base, ModelError, NoRoom, compute_device, compute_dtype, load_base
from worker.inference.forwards import StockForward, lean_forward
from worker.inference.kv import Forward
from worker.inference.loras import LayerLora
from worker.inference.products import packs
from worker.inference.protocol import ServedModel
from worker.inference.sizes import adapter_bytes, base_bytes, budget, held_bytes
from worker.inference.wire import EngineSettings

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
        self._stock = StockForward(base.model)
        self._lean = lean_forward(base.model)
        self._stack = None if self._lean is None else self._lean.stack()
        self._alone = False
        laid_out = self._lean is not None and packs(next(base.model.parameters()))
        copies = 2 if laid_out else 1  # the kernel's layout is one more
        self._base_bytes = held_bytes(base.model) * copies
        self._sizes: dict[str, int] = {}

    def mixes(self, digest: str | None) -> bool:
        """Whether a batch may hold this adapter, or the base for None, beside others."""
        return self._lean is not None and (digest is None or not isinstance(self.loaded[digest], str))

    def forward(self, digests: Sequence[str | None]) -> Forward:
        """The forward of a batch whose rows answer as these adapters, or as the base for None. Where they do not mix,
        they are all the same."""
        named = [digest for digest in dict.fromkeys(digests) if digest is not None]
        for digest in named:
            self.loaded.move_to_end(digest)
        if self._lean is None or self._stack is None or not self.mixes(digests[0]):
            self._switch_on(digests[0])
            return self._stock
        beside = {digest: own for digest in named if not isinstance(own := self.loaded[digest], str)}
        mix = self._stack.mix(digests, beside)
        return self._lean if mix is None else partial(self._lean, mix=mix)

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

    def load(self, digest: str, directory: Path, max_rank: int) -> None:
        """Add an adapter from its PEFT directory. A bad one raises ModelError and leaves nothing behind."""
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
                self.loaded[digest] = beside
                self._sizes[digest] = sum(part.nbytes for layer in beside for lora in layer if lora for part in lora)
                return
        name = "a" + hashlib.sha256(digest.encode()).hexdigest()[:24]  # PEFT allows no dots in names
        try:
            self._inject(name, config)
            self._fill(name, weights)
        except Exception as error:
            self._forget(name)
            raise ModelError(f"adapter {digest} does not fit its base model: {_reason(error)}") from error
        finally:
            self.active = UNKNOWN
        self.loaded[digest] = name
        self._sizes[digest] = adapter_bytes(directory, self.base.model.dtype)
        self._alone = not shared

    @property
    def is_alone(self) -> bool:
        """Whether its adapter has it to itself: they go together."""
        return self._alone

    @property
    def bytes(self) -> int:
        """What the base, its adapters and their places take."""
        held = self._base_bytes + sum(self._sizes.values())
        return held if self._stack is None else held + self._stack.bytes

    def clear_places(self) -> None:
        """Give back what the batches of many adapters took."""
        if self._stack is not None:
            self._stack.clear()

    def drop(self, digest: str) -> None:
        """Forget an adapter and give its memory back."""
        loaded = self.loaded.pop(digest)
        del self._sizes[digest]
        if isinstance(loaded, str):
            self._forget(loaded)
            self.active = UNKNOWN
        elif self._stack is not None:
            self._stack.forget(digest)

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


class Models:
    """All that is loaded, within a budget of bytes. Not for several threads, but for `read`: the engine's model thread
    owns it."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self.device = compute_device(settings)
        self.dtype = compute_dtype(settings, self.device)
        self._budget = budget(settings, self.device).models
        self._bases: OrderedDict[str, AdaptedBase] = OrderedDict()
        self._coming: dict[str, int] = {}

    @property
    def bases(self) -> int:
        """How many bases are loaded."""
        return len(self._bases)

    @property
    def adapters(self) -> int:
        """How many adapters are loaded, over all bases."""
        return sum(len(adapted.loaded) for adapted in self._bases.values())

    @property
    def bytes(self) -> int:
        """What bases and adapters take, those that are being read included."""
        return sum(adapted.bytes for adapted in self._bases.values()) + sum(self._coming.values())

    def has_base(self, served: ServedModel) -> bool:
        """Whether the base of `served` is in memory."""
        return served.base_digest in self._bases

    def has_room(self, served: ServedModel) -> bool:
        """Whether `served` could be loaded without anything else having to go."""
        adapted = self._bases.get(served.base_digest)
        wanted = 0 if adapted else base_bytes(served, self.device, self.dtype)
        if served.adapter_path is not None and (adapted is None or served.digest not in adapted.loaded):
            wanted += adapter_bytes(Path(served.adapter_path), self.dtype)
        return self.bytes + wanted <= self._budget

    def load(self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str] = ()) -> Base:
        """Have `served` in memory, and say what its base is.

        What was used least recently goes to make room, adapters before bases; what `in_use` and `bases_in_use` name
        never does. Raises ModelError, and NoRoom where it has to wait for those.
        """
        if not self.has_base(served):
            self.make_way(served, in_use, bases_in_use)
            found = None
            try:
                found = self.read(served)
            finally:
                self.take(served.base_digest, found)
        self._bases.move_to_end(served.base_digest)
        adapted = self._bases[served.base_digest]
        if served.adapter_path is not None and served.digest not in adapted.loaded:
            directory = Path(served.adapter_path)
            wanted = adapter_bytes(directory, self.dtype)
            self._make_room(f"adapter {served.digest}", wanted, in_use, bases_in_use, over=served.base_digest)
            adapted.load(served.digest, directory, self._settings.max_rank)
        return adapted.base

    def lane(self, served: ServedModel) -> Hashable:
        """What the models of one batch have in common. `served` is loaded."""
        adapter = served.digest if served.adapter_path else None
        mixes = self._bases[served.base_digest].mixes(adapter)
        return served.base_digest if mixes else (served.base_digest, adapter)

    def forward(self, rows: Sequence[ServedModel]) -> Forward:
        """The forward of a batch whose rows answer as these models, which are loaded and of one lane."""
        adapted = self._bases[rows[0].base_digest]
        return adapted.forward([model.digest if model.adapter_path else None for model in rows])

    def make_way(
        self, served: ServedModel, in_use: Collection[ServedModel], bases_in_use: Collection[str] = ()
    ) -> None:
        """Have room for the base of `served`, which counts as there until `take`. Raises as `load` does."""
        wanted = base_bytes(served, self.device, self.dtype)
        self._make_room(f"base model {served.base_digest}", wanted, in_use, bases_in_use)
        self._coming[served.base_digest] = wanted

    def read(self, served: ServedModel) -> AdaptedBase:
        """The base of `served`, from its directory. May be called on another thread. Raises ModelError."""
        return AdaptedBase(load_base(served, self.device, self.dtype))

    def take(self, base_digest: str, adapted: AdaptedBase | None) -> None:
        """What was made way for is there; or, for None, will not come."""
        del self._coming[base_digest]
        if adapted is not None:
            self._bases[base_digest] = adapted

    def _make_room(
        self, what: str, wanted: int, in_use: Collection[ServedModel], bases: Collection[str], over: str | None = None
    ) -> None:
        """Drop what is idle until `wanted` bytes fit; the base that they lie `over` is not."""
        kept = {*bases, *(model.base_digest for model in in_use)}
        others_may_end = bool(in_use or self._coming or kept - {over})
        idle = self._idle({model.digest for model in in_use}, {*kept, over})
        while self.bytes + wanted > self._budget:
            drop = next(idle, None)
            if drop is not None:
                drop()
            elif others_may_end:
                raise NoRoom
            else:
                needed, given = (self.bytes + wanted) / 1e9, self._budget / 1e9
                raise ModelError(
                    f"{what} takes memory to {needed:.2f} GB; bases and adapters may have {given:.2f} GB here "
                    "(VERITUNE_INFERENCE_MEMORY)"
                )

    def _idle(self, adapters: set[str], bases: set[str | None]) -> Iterator[Callable[[], None]]:
        """Ways to give memory back, the cheapest first."""
        shared = [adapted for adapted in self._bases.values() if not adapted.is_alone]
        for adapted in shared:
            yield from (partial(adapted.drop, digest) for digest in list(adapted.loaded) if digest not in adapters)
        yield from (adapted.clear_places for adapted in shared if not adapters & adapted.loaded.keys())
        yield from (partial(self._drop_base, digest) for digest in list(self._bases) if digest not in bases)

    def _drop_base(self, digest: str) -> None:
        del self._bases[digest]
        gc.collect()  # modules and their PEFT wrapper refer to each other


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
