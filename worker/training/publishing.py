"""Writes the trained weights as a PEFT adapter or a whole model.

Equal weights give equal bytes. AdaLoRA is published as plain LoRA, and so is LoRA whose initialiser took weights out of
the base (PiSSA, OLoRA): a server then needs only the unchanged base.
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
ADAPTER_NAME = "default"
"""PEFT's name of the adapter in training."""

METADATA = {"format": "pt"}


def write_published(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> Path:
    """Write `adapter/` under `directory` by an atomic rename. Returns its path."""
    final, partial = directory / "adapter", directory / "adapter.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_weights(method, masters, base, partial)
    publish(partial, final)
    return final


def write_weights(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> None:
    """Write the present weights into `directory`, which exists, in the format of a published adapter or model."""
    if hasattr(method.module, "peft_config"):
        _write_adapter(method, masters, base, directory)
    else:
        _write_model(method, base, directory)


def _write_model(method: TuningMethod, base: BaseOnDisk, directory: Path) -> None:
    """Write a model directory like the base's, with the trained weights in the compute dtype."""
    for name in EXTRA_FILES["full"]:
        if (base.path / name).exists():
            shutil.copy(base.path / name, directory / name)
    config: dict[str, Any] = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    weights = {name: p.detach().cpu().contiguous() for name, p in method.parameters().items()}
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": dtype}
    content = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "config.json").write_text(content, encoding="utf-8")
    save_file(weights, directory / "model.safetensors", metadata=METADATA)


def _write_adapter(method: TuningMethod, masters: MasterWeights, base: BaseOnDisk, directory: Path) -> None:
    """Write a PEFT adapter with the float32 master weights."""
    model: Any = method.module
    config, values = model.peft_config[ADAPTER_NAME], masters.by_name()
    if isinstance(config, AdaLoraConfig):
        config, values = _adalora_to_lora(config, values)
    elif method.initial_weights:
        config, values = _subtract_initial_lora(config, values, method.initial_weights)
    # With "auto", the default, PEFT would ask the hub whether the base's vocabulary was resized.
    named: Tensors = (
        {name.replace(f".{ADAPTER_NAME}.", "."): value for name, value in values.items()}
        if config is not model.peft_config[ADAPTER_NAME]
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
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # Name and revision, not the path: a path is of this host only and would change the digest.
    content |= {"base_model_name_or_path": f"{base.name}@{base.revision}", "inference_mode": True}
    canonical = {key: sorted(v) if isinstance(v, list) else v for key, v in content.items()}
    path.write_text(json.dumps(canonical, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _plain_lora_config(config: LoraConfig, rank: int) -> LoraConfig:
    """Configuration of plain LoRA with this rank and a scale of one: alpha equals the rank."""
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=config.target_modules, task_type="CAUSAL_LM")


def _adalora_to_lora(config: AdaLoraConfig, values: Tensors) -> tuple[LoraConfig, Tensors]:
    """Convert AdaLoRA's B · diag(E) · A into plain LoRA's B · A, without the dropped ranks, whose E is zero.

    All modules get the rank of the one with the most remaining ranks, padded with zeros.
    """
    scale = config.lora_alpha / (config.init_r + 1e-5)  # as PEFT's AdaLoRA layer scales
    remaining: dict[str, torch.Tensor] = {}  # module -> indices of its remaining ranks
    for name, value in values.items():
        if ".lora_E." in name:
            module = name.partition(".lora_E.")[0]
            remaining[module] = value.flatten().nonzero().flatten()
    rank = max(1, *(len(indices) for indices in remaining.values()))
    named: Tensors = {}
    for module, indices in remaining.items():
        # [init_r, in_features], [init_r, 1], [out_features, init_r]
        lora_a, lora_e, lora_b = (values[f"{module}.lora_{which}.{ADAPTER_NAME}"] for which in "AEB")
        padding = rank - len(indices)
        scaled_a = scale * lora_e[indices] * lora_a[indices]
        named[f"{module}.lora_A.{ADAPTER_NAME}.weight"] = _pad_with_zeros(scaled_a, padding, 0)
        named[f"{module}.lora_B.{ADAPTER_NAME}.weight"] = _pad_with_zeros(lora_b[:, indices], padding, 1)
    return _plain_lora_config(config, rank), named


def _pad_with_zeros(value: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    shape = list(value.shape)
    shape[dim] = count
    return torch.cat([value, value.new_zeros(shape)], dim)


def _subtract_initial_lora(config: LoraConfig, values: Tensors, initial: Tensors) -> tuple[LoraConfig, Tensors]:
    """Compute B · A - B0 · A0 as plain LoRA of twice the rank: the base lost B0 · A0 when training began.

    As PEFT's `subtract_mutated_init`, but factored anew by a singular value decomposition. B · A and B0 · A0 are large
    and nearly equal: in PEFT's factors, rounding to 16 bits would be larger than their difference.
    """
    scale = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
    named: Tensors = {}
    for name in values:
        if ".lora_A." not in name:
            continue
        name_b = name.replace(".lora_A.", ".lora_B.")
        stacked_a = torch.cat([values[name], initial[name].float()])  # [2 * rank, in_features]
        stacked_b = torch.cat([values[name_b], -initial[name_b].float()], 1)  # [out_features, 2 * rank]
        q_b, r_b = torch.linalg.qr(stacked_b)
        q_a, r_a = torch.linalg.qr(stacked_a.t())
        u, singular_values, vt = torch.linalg.svd(r_b @ r_a.t() * scale)
        root = singular_values.sqrt()
        named[name], named[name_b] = root[:, None] * (vt @ q_a.t()), (q_b @ u) * root
    return _plain_lora_config(config, 2 * config.r), named
