"""JobSpec: what the user asked for, in Ludwig's vocabulary, with nothing dropped in silence.

The whole vocabulary is parsed here. What this version cannot run yet is named by `not_yet_supported` and refused at
submit; which adapter goes with which quantisation is one table, `PAIRINGS`.
"""

import json
import math
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator
from pydantic_core import PydanticCustomError

from app.domain.claims import fold, forbidden_character
from app.domain.react import DEFAULT_TEMPLATE, PLACEHOLDER, ReactFormat


class JobKind(StrEnum):
    TRAIN = "train"
    EXPORT = "export"
    EVALUATE = "evaluate"
    SYNTHESIZE = "synthesize"
    DISTILL = "distill"


SPEC_CODES = frozenset({"base_would_change"})
"""Codes of their own, for what the vocabulary allows and this combination forbids."""


def _disagree(message: str, *place: str, code: str = "disagreement") -> PydanticCustomError:
    """What a validator of several fields raises: the message, and the place of the field to change."""
    return PydanticCustomError(code, "{message}", {"message": message, "place": place})


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _reference(text: str) -> str:
    if bad := forbidden_character(text):
        raise ValueError(f"the reference holds {bad}")
    if not text or text != fold(text) or len(text) > 200:
        raise ValueError("a reference is an id or a name of 1 to 200 characters")
    if "://" in text or text.startswith(("/", "./", "../", "~", "\\")):
        raise ValueError("this is a path or a URL; name something that this deployment lists")
    return text


Reference = Annotated[str, AfterValidator(_reference)]
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
MODULE_LIMIT = 64


class Feature(_Spec):
    """A column of the dataset. Only text in and text out: `claim`, `trajectories`, or columns mapped to them."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["text"] = "text"
    column: str | None = None


class Prompt(_Spec):
    template: str = DEFAULT_TEMPLATE

    @model_validator(mode="after")
    def _renders(self) -> Self:
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError("the template must hold {claim} exactly once")
        ReactFormat(template=self.template)
        return self


class _Adapter(_Spec):
    """`pretrained_adapter_weights`: a published adapter of the same shape, by id or name, to start from."""

    pretrained_adapter_weights: Reference | None = None


TargetModules = Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, max_length=MODULE_LIMIT)]


class LoraAdapter(_Adapter):
    """Low-rank adaptation. `alpha` defaults to twice the rank."""

    type: Literal["lora"] = "lora"
    r: Annotated[int, Field(ge=1, le=256)] = 16
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True

    @model_validator(mode="after")
    def _begins_once(self) -> Self:
        if self.pretrained_adapter_weights is not None and self.init_lora_weights in ("pissa", "olora"):
            raise _disagree(
                f"the weights begin either as pretrained_adapter_weights or as {self.init_lora_weights} makes them; "
                "leave one of the two out",
                "pretrained_adapter_weights",
            )
        return self

    @property
    def scale_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.r


class AdaloraAdapter(_Adapter):
    """LoRA with a rank budget that is spent where it helps."""

    type: Literal["adalora"]
    target_r: Annotated[int, Field(ge=1, le=256)] = 8
    init_r: Annotated[int, Field(ge=1, le=256)] = 12
    alpha: Positive | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _shrinks(self) -> Self:
        if self.target_r >= self.init_r:
            raise _disagree(
                f"adalora begins with init_r {self.init_r} ranks and ends with fewer, but target_r says "
                f"{self.target_r}; use a target_r below init_r",
                "target_r",
            )
        if self.pretrained_adapter_weights is not None:
            raise _disagree(
                "adalora begins with ranks of its own, and is published as plain LoRA; to train such an adapter "
                "further, use {type: lora}",
                "pretrained_adapter_weights",
            )
        return self

    @property
    def scale_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.init_r


class Ia3Adapter(_Adapter):
    """Learned scales of activations. `feedforward_modules`: those of `target_modules` whose input is scaled."""

    type: Literal["ia3"]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, max_length=MODULE_LIMIT)] | None = None
    feedforward_modules: Annotated[tuple[str, ...], Field(max_length=MODULE_LIMIT)] | None = None

    @model_validator(mode="after")
    def _inner_is_target(self) -> Self:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise _disagree("name both target_modules and feedforward_modules, or neither", "feedforward_modules")
        if surplus := set(self.feedforward_modules or ()) - set(self.target_modules or ()):
            raise _disagree(
                f"feedforward_modules must be among target_modules: {', '.join(sorted(surplus))}",
                "feedforward_modules",
            )
        return self


class AdaptionPromptAdapter(_Adapter):
    """LLaMA-Adapter: learned prompts gated into the upper layers."""

    type: Literal["adaption_prompt"]
    adapter_len: Annotated[int, Field(ge=1, le=256)] = 10
    adapter_layers: Count | None = None


AdapterSpec = Annotated[LoraAdapter | AdaloraAdapter | Ia3Adapter | AdaptionPromptAdapter, Field(discriminator="type")]


class Quantization(_Spec):
    """How the frozen base is held. `quant_type` and `double_quant` matter at 4 bits only."""

    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


class Split(_Spec):
    """Shares of train, validation and test rows; or `fixed`, by the values 0, 1, 2 of a column, `split` by default."""

    type: Literal["random", "fixed"] = "random"
    probabilities: tuple[Fraction, Fraction, Fraction] = (1.0, 0.0, 0.0)
    column: str | None = None

    @model_validator(mode="after")
    def _sums_to_one(self) -> Self:
        if not math.isclose(sum(self.probabilities), 1.0, abs_tol=1e-6):
            raise ValueError("the three probabilities must sum to 1")
        if self.probabilities[0] == 0:
            raise ValueError("no row would be left to train on: the first probability is 0")
        if self.type == "random" and self.column is not None:
            raise _disagree("a random split reads no column; set type to fixed, or leave column out", "column")
        return self


class Preprocessing(_Spec):
    global_max_sequence_length: Annotated[int, Field(ge=64, le=1_000_000)] | None = None
    overlength: Literal["trim_observations", "drop", "refuse"] = "trim_observations"
    split: Split = Split()


class Scheduler(_Spec):
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03


class GradientClipping(_Spec):
    clipglobalnorm: Positive | None = 1.0


class Optimizer(_Spec):
    type: Literal["adamw"] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0


class Trainer(_Spec):
    """`batch_size` caps the rows of a micro-batch; `auto` caps tokens instead. The product of it and
    `gradient_accumulation_steps` is the effective batch; three numbers that disagree are refused.

    `early_stop`: so many evaluations in a row without a lower validation loss end the training; -1 and 0 never do.
    """

    type: Literal["finetune"] = "finetune"
    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3
    train_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=4_096)] = "auto"
    effective_batch_size: Annotated[int, Field(ge=1, le=65_536)] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=65_536)] | None = None
    eval_batch_size: Literal["auto"] | Count = "auto"
    optimizer: Optimizer = Optimizer()
    learning_rate_scheduler: Scheduler = Scheduler()
    gradient_clipping: GradientClipping = GradientClipping()
    early_stop: Annotated[int, Field(ge=-1)] = -1
    steps_per_checkpoint: Annotated[int, Field(ge=0)] = 0
    enable_gradient_checkpointing: Literal["auto"] | bool = "auto"
    train_on_observations: bool = False
    verdict_branch: Fraction = 0.25

    @model_validator(mode="after")
    def _batches_agree(self) -> Self:
        batch, steps, effective = self.batch_size, self.gradient_accumulation_steps, self.effective_batch_size
        if batch != "auto" and steps and effective and batch * steps != effective:
            raise _disagree(
                f"batch_size {batch} × gradient_accumulation_steps {steps} = {batch * steps}, but "
                f"effective_batch_size says {effective}; leave one of the three out",
                "effective_batch_size",
            )
        if batch == "auto" and steps:
            raise _disagree(
                "gradient_accumulation_steps needs a batch_size that is a number; with batch_size auto, say "
                "effective_batch_size instead",
                "gradient_accumulation_steps",
            )
        return self

    @property
    def effective_rows(self) -> int:
        """Trajectories an update."""
        if self.effective_batch_size:
            return self.effective_batch_size
        if self.batch_size != "auto" and self.gradient_accumulation_steps:
            return self.batch_size * self.gradient_accumulation_steps
        return 16


class Generation(_Spec):
    """How a model writes. `max_new_tokens` bounds one Thought."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=2_048)] = 128


class Backend(_Spec):
    type: Literal["local"] = "local"
    processes: Annotated[int, Field(ge=1, le=64)] = 1
    strategy: Literal["ddp", "fsdp"] | None = None


METADATA_LIMIT = 16_384


def _bounded(metadata: dict[str, JsonValue]) -> dict[str, JsonValue]:
    size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")))
    if size > METADATA_LIMIT:
        raise ValueError(f"metadata has {size:,} characters as JSON; at most {METADATA_LIMIT:,} are kept")
    return metadata


Metadata = Annotated[dict[str, JsonValue], AfterValidator(_bounded)]


class TrainSpec(_Spec):
    """A training job. Only `dataset` is required; every default runs."""

    kind: Literal["train"] = "train"
    name: Name | None = None
    model_type: Literal["llm"] = "llm"
    base_model: Reference | None = None
    dataset: Reference
    input_features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=1)] = (Feature(name="claim"),)
    output_features: Annotated[tuple[Feature, ...], Field(min_length=1, max_length=1)] = (Feature(name="trajectories"),)
    prompt: Prompt = Prompt()
    adapter: AdapterSpec | None = LoraAdapter()
    quantization: Quantization | None = Quantization()
    preprocessing: Preprocessing = Preprocessing()
    global_max_sequence_length: Annotated[int, Field(ge=64, le=1_000_000)] | None = None
    trainer: Trainer = Trainer()
    generation: Generation = Generation()
    backend: Backend = Backend()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        inner, outer = self.preprocessing.global_max_sequence_length, self.global_max_sequence_length
        if inner and outer and inner != outer:
            raise _disagree(
                f"global_max_sequence_length is {outer} at the top and {inner} under preprocessing; keep one",
                "global_max_sequence_length",
            )
        pairing = PAIRINGS[adapter_word(self.adapter)][quantization_word(self.quantization)]
        if pairing is not None:
            raise _disagree(pairing, "quantization")
        if getattr(self.adapter, "use_dora", False) and self.quantization is not None and self.quantization.bits == 8:
            raise _disagree(
                "use_dora does not train over an 8-bit base; use quantization {bits: 4}, or leave use_dora out",
                "adapter",
                "use_dora",
            )
        initialiser = getattr(self.adapter, "init_lora_weights", True)
        if initialiser in ("pissa", "olora") and self.quantization is not None:
            raise _disagree(
                f"init_lora_weights {initialiser} rewrites the base's weights, which a quantised base cannot take; "
                "set quantization to null or leave init_lora_weights out",
                "adapter",
                "init_lora_weights",
                code="base_would_change",
            )
        return self

    @property
    def max_sequence_length(self) -> int | None:
        return self.preprocessing.global_max_sequence_length or self.global_max_sequence_length

    def format(self) -> ReactFormat:
        return ReactFormat(template=self.prompt.template)


def adapter_word(adapter: BaseModel | None) -> str:
    return "full" if adapter is None else str(getattr(adapter, "type"))  # noqa: B009  a union of four models


def quantization_word(quantization: Quantization | None) -> str:
    return "none" if quantization is None else f"{quantization.bits}-bit"


def servable_by(adapter: AdapterSpec | None) -> tuple[str, ...]:
    """Who can serve what such a job publishes. vLLM takes whole models and plain LoRA; AdaLoRA is published as that."""
    plain = adapter is None or adapter.type == "adalora" or (adapter.type == "lora" and not adapter.use_dora)
    return ("veritune", "vllm") if plain else ("veritune",)


def shares_its_base(adapter: AdapterSpec | None) -> bool:
    """Whether adapters of this kind can lie beside each other over one served base, and be switched there."""
    return adapter is not None and adapter.type in ("lora", "adalora")


_FULL_NEEDS_PLAIN = (
    "full fine-tuning (adapter: null) changes every weight, which a quantised base cannot take; "
    "set quantization to null, or keep the quantisation and use adapter {type: lora}"
)
_IA3_NEEDS_PLAIN = "ia3 scales activations of an unquantised base; set quantization to null, or use {type: lora}"
_ADALORA_NOT_8 = "adalora does not train over an 8-bit base; use quantization {bits: 4}, or {type: lora}"

PAIRINGS: dict[str, dict[str, str | None]] = {
    "full": {"none": None, "4-bit": _FULL_NEEDS_PLAIN, "8-bit": _FULL_NEEDS_PLAIN},
    "lora": {"none": None, "4-bit": None, "8-bit": None},
    "adalora": {"none": None, "4-bit": None, "8-bit": _ADALORA_NOT_8},
    "ia3": {"none": None, "4-bit": _IA3_NEEDS_PLAIN, "8-bit": _IA3_NEEDS_PLAIN},
    "adaption_prompt": {"none": None, "4-bit": None, "8-bit": None},
}
"""Adapter × quantisation → None when the pair is sound, else why not and the nearest pair that is."""


def not_yet_supported(spec: TrainSpec) -> list[tuple[tuple[str, ...], str]]:
    """(place, what) of everything in the spec that parses but that this version does not run."""
    asked: list[tuple[bool, tuple[str, ...], str]] = [
        (spec.backend.processes > 1, ("backend", "processes"), "more than one process"),
        (spec.backend.strategy is not None, ("backend", "strategy"), "a distribution strategy"),
    ]
    return [(place, what) for wanted, place, what in asked if wanted]


JobSpec = TrainSpec
"""The union over job kinds; `train` is the only kind that runs so far."""


def spec_examples() -> dict[str, Any]:
    """Configurations for the documentation; the first runs against the demo's state."""
    return {
        "the least": {"dataset": "demo"},
        "named": {"dataset": "demo", "base_model": "smollm2-135m", "trainer": {"epochs": 1}},
    }
