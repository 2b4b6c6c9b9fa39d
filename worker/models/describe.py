"""A model directory → its files, their digest and everything the application wants to know of it.

It reads headers and configurations only: no weight is loaded, and code that a model brings along is refused.
"""

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from app.domain.base_models import BaseModelDescription, ModelSource, canonical_digest
from worker.models.errors import BaseModelError

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
NAMED_BY_DIGEST = ("config.json", "tokenizer.json")
SAFE_IN_FP16 = ("llama", "mistral", "smollm3")
QWEN2_7B_HIDDEN_SIZE = 3_584


def describe(
    directory: Path, *, name: str, source: ModelSource, revision: str | None, licence: str | None
) -> BaseModelDescription:
    """Everything about the model in `directory`. Without a `revision`, the digest's first characters are one.

    Raises BaseModelError when something needed is missing, broken or not allowed.
    """
    config = checked_config(directory)
    special = _special_ids(directory, config)
    weights = weight_files(directory)
    hashes = {file: sha256_of(directory / file) for file in (*NAMED_BY_DIGEST, *weights)}
    digest = canonical_digest(sorted(hashes.items()))
    parameters, dtype = _tensors([directory / file for file in weights])
    return BaseModelDescription(
        name=name,
        source=source,
        revision=revision or digest[:12],
        digest=digest,
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        parameters=parameters,
        bytes=sum((directory / file).stat().st_size for file in weights),
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        context_length=config["max_position_embeddings"],
        dtype=dtype,
        **special,
        fp16=fp16_safety(config["model_type"], config["hidden_size"]),
        licence=licence,
        files=hashes,
        path=directory,
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked_config(directory: Path) -> dict[str, Any]:
    """config.json, once it is known to be a plain causal language model that the trainer can load."""
    config = _json(directory / "config.json")
    if "auto_map" in config:
        raise BaseModelError(
            "custom_code",
            "config.json asks to run code that comes with the model (auto_map)",
            "use a model of an architecture that transformers ships; code from models is never run",
        )
    if "quantization_config" in config:
        raise BaseModelError(
            "already_quantized",
            "the weights are quantised already (quantization_config in config.json)",
            "add the unquantised original; each job quantises as its spec says",
        )
    _check_architecture(config)
    return config


def weight_files(directory: Path) -> list[str]:
    """Names of the safetensors files that make up the model: those of the index, else the single file."""
    index = directory / "model.safetensors.index.json"
    names = sorted(set(_json(index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]
    missing = [name for name in names if "/" in name or not (directory / name).is_file()]
    if missing or not names:
        raise BaseModelError(
            "no_safetensors",
            f"the weights are not there as safetensors: {', '.join(missing) or 'the index is empty'}",
            "convert it to safetensors (transformers: save_pretrained); pickled weights are never loaded",
        )
    return names


def fp16_safety(model_type: str, hidden_size: int) -> Literal["safe", "unsafe", "unknown"]:
    """Whether float16 activations stay finite. The 7B of Qwen2 and 2.5 overflows; others await a probe."""
    if model_type in SAFE_IN_FP16:
        return "safe"
    if model_type == "qwen2" and hidden_size == QWEN2_7B_HIDDEN_SIZE:
        return "unsafe"
    return "unknown"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BaseModelError(
            "missing_file",
            f"{path.name} is missing",
            "a base model needs config.json, tokenizer.json and its weights as safetensors",
        ) from error
    except (ValueError, RecursionError) as error:
        raise BaseModelError("broken_file", f"{path.name} is not valid JSON", "fetch the file again") from error
    if not isinstance(content, dict):
        raise BaseModelError("broken_file", f"{path.name} is not a JSON object", "fetch the file again")
    return content


def _check_architecture(config: dict[str, Any]) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    sizes = ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings")
    known = isinstance(model_type, str) and MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type) in architectures[:1]
    if not known or not all(isinstance(config.get(size), int) for size in sizes):
        raise BaseModelError(
            "unsupported_architecture",
            f"model_type {model_type!r} with architectures {architectures!r} is no language model known here",
            "use a text-only decoder such as a Llama, Mistral, Qwen2 or SmolLM model",
        )


def _tensors(files: list[Path]) -> tuple[int, str]:
    """(number of parameters, the dtype most of them have), from the headers alone."""
    counts: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118  not a dict
                    piece = tensors.get_slice(key)
                    counts[piece.get_dtype()] += math.prod(piece.get_shape())
        except SafetensorError as error:
            raise BaseModelError("broken_file", f"{path.name} is not a safetensors file", "fetch it again") from error
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    most = counts.most_common(1)[0][0] if counts else "empty"
    if most not in names:
        raise BaseModelError("unsupported_dtype", f"the weights are {most}", "use bfloat16, float16 or float32 weights")
    return counts.total(), names[most]


def _special_ids(directory: Path, config: dict[str, Any]) -> dict[str, int | None]:
    tokenizer = _tokenizer(directory / "tokenizer.json")
    if (largest := max(tokenizer.get_vocab(with_added_tokens=True).values())) >= config["vocab_size"]:
        raise BaseModelError(
            "vocabulary_mismatch",
            f"the tokenizer has an id {largest}, but the model embeds only {config['vocab_size']} ids",
            "take config.json, tokenizer.json and weights from the same model",
        )
    settings_path = directory / "tokenizer_config.json"
    settings = _json(settings_path) if settings_path.exists() else {}
    eos = _id(tokenizer, settings.get("eos_token"), config.get("eos_token_id"))
    if eos is None:
        raise BaseModelError(
            "no_eos",
            "neither tokenizer_config.json nor config.json names an end-of-sequence token",
            "set eos_token_id in config.json",
        )
    pad = _id(tokenizer, settings.get("pad_token"), config.get("pad_token_id"))
    return {"bos_id": _bos(tokenizer), "eos_id": eos, "pad_id": eos if pad is None else pad}


def _tokenizer(path: Path) -> Tokenizer:
    _json(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise BaseModelError(
            "broken_file",
            f"tokenizer.json cannot be read: {error}",
            "save it with a current tokenizers library",
        ) from error


def _bos(tokenizer: Tokenizer) -> int | None:
    """What the tokenizer itself puts in front of a text, if anything."""
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a", add_special_tokens=True).ids
    return dressed[0] if dressed[1 : 1 + len(bare)] == bare and dressed[: len(bare)] != bare else None


def _id(tokenizer: Tokenizer, token: object, fallback: object) -> int | None:
    """The id of a token of tokenizer_config.json (a string or `{content}`), else that of config.json."""
    text = token.get("content") if isinstance(token, dict) else token
    if isinstance(text, str) and (found := tokenizer.token_to_id(text)) is not None:
        return int(found)
    first = fallback[0] if isinstance(fallback, list) and fallback else fallback
    return first if isinstance(first, int) else None
