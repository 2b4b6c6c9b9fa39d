"""What was trained → the directory that is published: a PEFT adapter, or a whole model.

Its bytes depend on nothing but the training. What trained as something else but is a product of two thin matrices, is
published as plain LoRA: AdaLoRA, and LoRA that began with a part of the base (PiSSA, OLoRA).
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

from app.atomic_dirs import publish
from app.domain.adapters import EXTRA_FILES
from app.domain.attempts import BaseOnDisk
from worker.training.master_weights import MasterWeights
from worker.training.tuning_methods import TuningMethod

Tensors = dict[str, torch.Tensor]
NAME = "default"
METADATA = {"format": "pt"}


def write_published(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> Path:
    """Write `adapter/` under `directory`, whole or not at all; return it."""
    final, partial = directory / "adapter", directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_files(method, masters, base, partial)
    publish(partial, final)
    return final


def write_files(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> None:
    """Write what is published as things stand into `directory`, which exists."""
    if hasattr(method.module, "peft_config"):
        _write_adapter(method, masters, base, directory)
    else:
        _write_model(method, base, directory)


def _write_model(method: TuningMethod, base: BaseOnDisk, directory: Path) -> None:
    """What a base's directory holds, with other weights, in the dtype that computed with them."""
    for name in EXTRA_FILES["full"]:
        if (base.path / name).exists():
            shutil.copy(base.path / name, directory / name)
    config: dict[str, Any] = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    weights = {name: p.detach().cpu().contiguous() for name, p in method.parameters().items()}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    written = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(written, encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata=METADATA)


def _write_adapter(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> None:
    """With the float32 masters."""
    model: Any = method.module
    config, values = model.peft_config[NAME], masters.by_name()
    if isinstance(config, AdaLoraConfig):
        config, values = _from_adalora(config, values)
    elif method.initial:
        config, values = _from_changed_base(config, values, method.initial)
    # Without False, PEFT asks the hub whether the base's vocabulary was resized.
    named: Tensors = (
        {name.replace(f".{NAME}.", "."): value for name, value in values.items()}
        if config is not model.peft_config[NAME]
        else get_peft_model_state_dict(model, state_dict=values, save_embedding_layers=False)
    )
    _write_config(config, base, directory)
    save_file(
        {name: value.contiguous() for name, value in named.items()},
        directory / "adapter_model.safetensors",
        metadata=METADATA,
    )


def _write_config(config: Any, base: BaseOnDisk, directory: Path) -> None:
    config.save_pretrained(str(directory))
    path = directory / "adapter_config.json"
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # By name and revision: a path would mean nothing elsewhere and would change the digest.
    written |= {"base_model_name_or_path": f"{base.name}@{base.revision}", "inference_mode": True}
    canonical = {key: sorted(v) if isinstance(v, list) else v for key, v in written.items()}
    path.write_text(json.dumps(canonical, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain(config: LoraConfig, rank: int) -> LoraConfig:
    """Plain LoRA of this rank whose product counts as it is."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=config.target_modules, task_type="CAUSAL_LM")


def _from_adalora(config: AdaLoraConfig, values: Tensors) -> tuple[LoraConfig, Tensors]:
    """Ranks that were dropped are left out; a module with fewer than the richest one is filled up with zeros."""
    scale = config.lora_alpha / (config.init_r + 1e-5)  # PEFT's own, its small number included
    kept: dict[str, torch.Tensor] = {}
    for name, value in values.items():
        if ".lora_E." in name:
            module = name.partition(".lora_E.")[0]
            kept[module] = value.flatten().nonzero().flatten()
    rank = max(1, *(len(places) for places in kept.values()))
    named: Tensors = {}
    for module, places in kept.items():
        down, scales, up = (values[f"{module}.lora_{which}.{NAME}"] for which in "AEB")
        filling = rank - len(places)
        named[f"{module}.lora_A.{NAME}.weight"] = _filled(scale * scales[places] * down[places], filling, 0)
        named[f"{module}.lora_B.{NAME}.weight"] = _filled(up[:, places], filling, 1)
    return _plain(config, rank), named


def _filled(value: torch.Tensor, more: int, dimension: int) -> torch.Tensor:
    shape = list(value.shape)
    shape[dimension] = more
    return torch.cat([value, value.new_zeros(shape)], dimension)


def _from_changed_base(config: LoraConfig, values: Tensors, initial: Tensors) -> tuple[LoraConfig, Tensors]:
    """What was learned is B·A less what it began as, which the base lost: a product of twice the rank.

    Made from its singular values, since the two products are large and nearly alike: as they stand, rounding to
    sixteen bits would be larger than what was learned.
    """
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    named: Tensors = {}
    for name in values:
        if ".lora_A." not in name:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        down = torch.cat([values[name], initial[name].float()])
        up = torch.cat([values[other], -initial[other].float()], 1)
        left, inner = torch.linalg.qr(up)
        right, outer = torch.linalg.qr(down.t())
        u, sizes, vt = torch.linalg.svd(inner @ outer.t() * scale)
        half = sizes.sqrt()
        named[name], named[other] = half[:, None] * (vt @ right.t()), (left @ u) * half
    return _plain(config, 2 * config.r), named
