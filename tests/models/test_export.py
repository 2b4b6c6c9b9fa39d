"""A served base as plain weights: the function that the engine serves, under the digest that asks for it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from app.cli import models as commands
from app.composition import Services
from app.domain.base_models import QUANTIZATION_BY_NAME, DirectorySource, served_base_digest
from app.domain.errors import InvalidError
from tests.models.test_models import run
from tests.tiny import make_tiny_model
from worker.inference.model.base import load_base
from worker.inference.sampling_params import ServedModel
from worker.models.export import export_base
from worker.models.store import ModelStore

ENGINE_WORDS = {
    "nf4": {"bits": 4, "type": "nf4", "double": True},
    "fp4": {"bits": 4, "type": "fp4", "double": True},
    "int8": {"bits": 8},
    "none": None,
}


@pytest.mark.parametrize("name", QUANTIZATION_BY_NAME)
def test_the_exported_weights_are_those_that_the_engine_serves(name: str, tmp_path: Path) -> None:
    found = ModelStore(tmp_path / "cache").obtain("tiny", DirectorySource(path=make_tiny_model(tmp_path / "base")))
    exported = export_base(found, QUANTIZATION_BY_NAME[name], tmp_path / "served")
    assert exported.digest == served_base_digest(found.digest, QUANTIZATION_BY_NAME[name])
    assert exported.path == tmp_path / "served" / exported.digest
    assert [path.name for path in exported.path.parent.iterdir() if path.name[0] != "."] == [exported.digest]
    assert "quantization_config" not in json.loads((exported.path / "config.json").read_text())
    assert (exported.path / "tokenizer.json").read_bytes() == (found.path / "tokenizer.json").read_bytes()

    told = ServedModel(
        digest="x", base_digest="x", base_path=str(found.path), quantization=ENGINE_WORDS[name], max_model_len=512
    )
    engine = load_base(told, torch.device("cpu"), torch.float32).model
    config = AutoConfig.from_pretrained(exported.path)
    plain = AutoModelForCausalLM.from_pretrained(exported.path, config=config, dtype=torch.float32)
    stored = load_file(found.path / "model.safetensors")
    layer = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(plain.state_dict()[layer], stored[layer]) == (name == "none")
    for key, value in engine.state_dict().items():
        assert torch.equal(value, plain.state_dict()[key]), key


def test_an_export_that_was_killed_is_made_anew(tmp_path: Path) -> None:
    found = ModelStore(tmp_path / "cache").obtain("tiny", DirectorySource(path=make_tiny_model(tmp_path / "base")))
    digest = served_base_digest(found.digest, None)
    left = tmp_path / "served" / f".partial-{digest[:16]}"
    left.mkdir(parents=True)
    (left / "half.safetensors").write_text("half")
    exported = export_base(found, None, tmp_path / "served")
    assert {path.name for path in exported.path.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not (exported.path / "half.safetensors").exists()
    assert not left.exists()
    written = (exported.path / "config.json").stat().st_mtime_ns
    assert export_base(found, None, tmp_path / "served") == exported
    assert (exported.path / "config.json").stat().st_mtime_ns == written


def test_the_command_exports_what_is_listed(services: Services, tmp_path: Path) -> None:
    exported = commands.export(services, "tiny", QUANTIZATION_BY_NAME["nf4"], tmp_path / "served")
    row = services.base_models.get("tiny")
    assert exported.digest == services.base_models.served_digest(row, QUANTIZATION_BY_NAME["nf4"])
    assert (exported.path / "model.safetensors").is_file()
    with pytest.raises(InvalidError):
        commands.export(services, "nobody", None, tmp_path / "served")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    found = ModelStore(tmp_path / "cache").obtain("tiny", DirectorySource(path=base))
    (tmp_path / "file").write_text("in the way")
    asked = ["export", found.source.model_dump_json(), "--name", "tiny", "--digest", found.digest]
    line, status = run(
        *asked, "--quantization", "null", "--to", str(tmp_path / "file"), "--cache", str(tmp_path / "cache")
    )
    assert status == 1
    assert str(tmp_path / "file") in line["error"]["message"]
