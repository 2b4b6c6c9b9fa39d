"""TrainSpec: a training job's config, in Ludwig's vocabulary. No key is ignored.

All of the vocabulary is parsed. `not_yet_supported` lists the options that this version cannot run; a job with one is
refused when it is submitted.
"""

import math
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from app.domain.evaluations import EvaluationOptions
from app.domain.model_catalogue import DEFAULT_BASE_MODEL
from app.domain.react import DEFAULT_TEMPLATE, PLACEHOLDER, ReactFormat
from app.domain.spec_base import (
    Count,
    Fraction,
    Integer,
    Metadata,
    Name,
    Positive,
    Real,
    Reference,
    Spec,
    build_disagreement,
)
from app.domain.tuning_methods import (
    PAIRINGS,
    AdapterSpec,
    LoraAdapter,
    Quantization,
    name_adapter_type,
    name_quantization,
)


class JobKind(StrEnum):
    TRAIN = "train"
    EXPORT = "export"
    EVALUATE = "evaluate"
    SYNTHESIZE = "synthesize"
    REGROUND = "reground"
    DISTILL = "distill"


class Feature(Spec):
    """A column of the dataset: `claim`, `trajectories`, or a column mapped to one of them. The type is always text."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["text"] = "text"
    column: str | None = None


class Prompt(Spec):
    template: str = DEFAULT_TEMPLATE

    @model_validator(mode="after")
    def _renders(self) -> Self:
        if self.template.count(PLACEHOLDER) != 1:
            raise ValueError("the template must contain {claim} exactly once")
        ReactFormat(template=self.template)
        return self


class Split(Spec):
    """Random: shares of train, validation and test rows.

    Fixed: by the values 0, 1, 2 of a column, by default `split`.
    """

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
            raise build_disagreement("a random split reads no column; set type to fixed, or leave column out", "column")
        return self


class Preprocessing(Spec):
    global_max_sequence_length: Annotated[Integer, Field(ge=64, le=1_000_000)] | None = None
    overlength: Literal["trim_observations", "drop", "refuse"] = "trim_observations"
    split: Split = Split()


class LearningRateScheduler(Spec):
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_fraction: Annotated[Real, Field(ge=0, lt=1)] = 0.03


class GradientClipping(Spec):
    clipglobalnorm: Positive | None = 1.0


class Optimizer(Spec):
    type: Literal["adamw"] = "adamw"
    betas: tuple[Annotated[Real, Field(ge=0, lt=1)], Annotated[Real, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0


class EvaluateAfter(EvaluationOptions):
    """The evaluation of the adapter that a job trains, beside its base."""

    promote: bool = True


class Trainer(Spec):
    """`batch_size`: most rows of a micro-batch; `auto` limits its tokens instead.

    The effective batch is `batch_size` × `gradient_accumulation_steps`. Three numbers that contradict each other are
    refused. `early_stop`: training ends after so many evaluations in a row without a lower validation loss; -1 and 0
    disable it. `verdict_branch`: share of rows that also learn the verdict directly behind the last Observation,
    without a Thought. `verdict_rows`: share of training rows that learn nothing else, from the sentences alone that the
    last Thought quotes: fewer than half of the tokens. `verdict_weight`: the weight of a verdict's first token in the
    loss; every other trained token has 1. Weighted losses are divided by the sum of their weights; so are the losses
    that are reported, and by which the best state is chosen. `evaluate_after`: an evaluation job that is queued when
    the adapter is published.
    """

    type: Literal["finetune"] = "finetune"
    epochs: Annotated[Real, Field(gt=0, le=10_000)] = 3
    train_steps: Annotated[Integer, Field(ge=1, le=10_000_000)] | None = None
    learning_rate: Annotated[Real, Field(gt=0, le=1)] = 2e-4
    batch_size: Literal["auto"] | Annotated[Integer, Field(ge=1, le=4_096)] = "auto"
    effective_batch_size: Annotated[Integer, Field(ge=1, le=65_536)] | None = None
    gradient_accumulation_steps: Annotated[Integer, Field(ge=1, le=65_536)] | None = None
    eval_batch_size: Literal["auto"] | Count = "auto"
    optimizer: Optimizer = Optimizer()
    learning_rate_scheduler: LearningRateScheduler = LearningRateScheduler()
    gradient_clipping: GradientClipping = GradientClipping()
    early_stop: Annotated[Integer, Field(ge=-1)] = -1
    steps_per_checkpoint: Annotated[Integer, Field(ge=0)] = 0
    enable_gradient_checkpointing: Literal["auto"] | bool = "auto"
    train_on_observations: bool = False
    verdict_branch: Fraction = 0.25
    verdict_rows: Fraction = 0.0
    verdict_weight: Annotated[Real, Field(ge=1, le=1_000)] = 1.0
    evaluate_after: EvaluateAfter | None = None

    @model_validator(mode="after")
    def _batches_agree(self) -> Self:
        batch, steps, effective = self.batch_size, self.gradient_accumulation_steps, self.effective_batch_size
        if batch != "auto" and steps and effective and batch * steps != effective:
            raise build_disagreement(
                f"batch_size {batch} × gradient_accumulation_steps {steps} = {batch * steps}, but "
                f"effective_batch_size says {effective}; leave one of the three out",
                "effective_batch_size",
            )
        if batch == "auto" and steps:
            raise build_disagreement(
                "gradient_accumulation_steps needs a batch_size that is a number; with batch_size auto, say "
                "effective_batch_size instead",
                "gradient_accumulation_steps",
            )
        return self

    @property
    def effective_rows(self) -> int:
        """Effective batch size: trajectories per update."""
        if self.effective_batch_size:
            return self.effective_batch_size
        if self.batch_size != "auto" and self.gradient_accumulation_steps:
            return self.batch_size * self.gradient_accumulation_steps
        return 16


class Generation(Spec):
    """Sampling parameters. `max_new_tokens` limits one Thought."""

    temperature: Annotated[Real, Field(ge=0, le=2)] = 0.0
    top_p: Annotated[Real, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Annotated[Integer, Field(ge=1, le=2_048)] = 128


class Backend(Spec):
    type: Literal["local"] = "local"
    processes: Annotated[Integer, Field(ge=1, le=64)] = 1
    strategy: Literal["ddp", "fsdp"] | None = None


class TrainSpec(Spec):
    """A training job. Only `dataset` is required."""

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
    global_max_sequence_length: Annotated[Integer, Field(ge=64, le=1_000_000)] | None = None
    trainer: Trainer = Trainer()
    generation: Generation = Generation()
    backend: Backend = Backend()
    seed: Annotated[Integer, Field(ge=0, lt=2**32)] = 42
    metadata: Metadata = Field(default_factory=dict)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        inner, outer = self.preprocessing.global_max_sequence_length, self.global_max_sequence_length
        if inner and outer and inner != outer:
            raise build_disagreement(
                f"global_max_sequence_length is {outer} at the top and {inner} under preprocessing; keep one",
                "global_max_sequence_length",
            )
        pairing = PAIRINGS[name_adapter_type(self.adapter)][name_quantization(self.quantization)]
        if pairing is not None:
            raise build_disagreement(pairing, "quantization")
        if getattr(self.adapter, "use_dora", False) and self.quantization is not None and self.quantization.bits == 8:
            raise build_disagreement(
                "use_dora does not train over an 8-bit base; use quantization {bits: 4}, or leave use_dora out",
                "adapter",
                "use_dora",
            )
        initialiser = getattr(self.adapter, "init_lora_weights", True)
        if initialiser in ("pissa", "olora") and self.quantization is not None:
            raise build_disagreement(
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


def not_yet_supported(spec: TrainSpec) -> list[tuple[tuple[str, ...], str]]:
    """(path, name) of each option in the spec that this version parses but cannot run."""
    asked: list[tuple[bool, tuple[str, ...], str]] = [
        (spec.backend.processes > 1, ("backend", "processes"), "more than one process"),
        (spec.backend.strategy is not None, ("backend", "strategy"), "a distribution strategy"),
    ]
    return [(path, what) for wanted, path, what in asked if wanted]


def spec_examples() -> dict[str, Any]:
    """Example configs for the documentation. The first one runs after `veritune demo`."""
    return {
        "the least": {"dataset": "demo"},
        "named": {"dataset": "demo", "base_model": DEFAULT_BASE_MODEL, "trainer": {"epochs": 1}},
    }
