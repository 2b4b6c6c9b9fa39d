"""A served base as a directory of plain weights, for a server that knows nothing of our quantisations (vLLM).

`<digest of the served base>/`: config, safetensors in the stored dtype, tokenizer; complete or absent.
"""

import os
import shutil
from pathlib import Path

import torch

from app.atomic_dirs import locked, publish
from app.domain.base_models import BaseModelDescription, DirectorySource, ExportedBase, served_base_digest
from app.domain.tuning_methods import Quantization
from worker.models.describe import COMPANIONS
from worker.models.fetch import copy_directory, say

MADE_ANEW = ("config.json", "model.safetensors.index.json")
"""Companions that tell of the quantisation or of the shards, so not those of the source."""


def export_base(described: BaseModelDescription, held: Quantization | None, to: Path) -> ExportedBase:
    """Write the base of `described`, as it is served at `held`, under the directory `to`. At once when it is there."""
    digest = served_base_digest(described.digest, held)
    final = to.resolve() / digest
    with locked(final.parent / f".lock-{digest[:16]}"):
        if not final.exists():
            _make(described, held, final)
    return ExportedBase(name=described.name, digest=digest, path=final)


def _make(described: BaseModelDescription, held: Quantization | None, final: Path) -> None:
    partial = final.parent / f".partial-{final.name[:16]}"
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    partial.mkdir()
    try:
        if held is None:
            copy_directory(DirectorySource(path=described.path), partial)
        else:
            _dequantise(described.path, held, partial)
        publish(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _dequantise(base: Path, held: Quantization, into: Path) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # a bar is noise in a log, and it is read at import
    from transformers import AutoConfig  # takes seconds to import

    from worker.quantization import bitsandbytes_config
    from worker.weights import load_weights

    say("quantising and dequantising")
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    # The format of products matters to those who compute with quantised weights; here they are only rounded.
    told = bitsandbytes_config(held.bits, held.quant_type, double_quant=held.double_quant, compute=torch.float32)
    model = load_weights(base, config, told, torch.device("cpu"), None)
    say("writing")
    model.save_pretrained(into)
    for name in COMPANIONS:
        if name not in MADE_ANEW and (base / name).is_file():
            shutil.copyfile(base / name, into / name)
