"""The tuning methods: full fine-tuning or a PEFT adapter, over a base that is quantised or not.

The table `PAIRINGS` says which adapter may have which quantisation.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

from app.domain.spec_base import Count, Integer, Number, Positive, Real, Reference, Spec, build_disagreement

MODULE_LIMIT = 64
MAX_RANK = 256
Rank = Annotated[Integer, Field(ge=1, le=MAX_RANK)]


class _Adapter(Spec):
    """`pretrained_adapter_weights`: id or name of a published adapter of the same shape.

    Its weights are the initial ones.
    """

    pretrained_adapter_weights: Reference | None = None


TargetModules = Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1, max_length=MODULE_LIMIT)]


class LoraAdapter(_Adapter):
    """LoRA (arXiv:2106.09685). `alpha` is twice the rank by default.

    `use_rslora`: rsLoRA (arXiv:2312.03732). `use_dora`: DoRA (arXiv:2402.09353). `init_lora_weights`: `pissa` is
    arXiv:2404.02948, `olora` is arXiv:2406.01775.
    """

    type: Literal["lora"] = "lora"
    r: Rank = 16
    alpha: Positive | None = None
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora"] = True

    @model_validator(mode="after")
    def _initialiser_is_valid(self) -> Self:
        if self.init_lora_weights not in ("pissa", "olora"):
            return self
        if self.r > MAX_RANK // 2:
            raise build_disagreement(
                f"{self.init_lora_weights} adapters are published as plain LoRA of twice the rank, which is at most "
                f"{MAX_RANK}; use an r of at most {MAX_RANK // 2}",
                "r",
            )
        if self.pretrained_adapter_weights is not None:
            raise build_disagreement(
                f"the weights begin either as pretrained_adapter_weights or as {self.init_lora_weights} makes them; "
                "leave one of the two out",
                "pretrained_adapter_weights",
            )
        return self

    @property
    def scale_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.r


class AdaloraAdapter(_Adapter):
    """AdaLoRA (arXiv:2303.10512): LoRA that moves a rank budget to the layers where it matters most."""

    type: Literal["adalora"]
    target_r: Rank = 8
    init_r: Rank = 12
    alpha: Positive | None = None
    dropout: Annotated[Real, Field(ge=0, lt=1)] = 0.0
    target_modules: TargetModules = "all-linear"

    @model_validator(mode="after")
    def _rank_shrinks(self) -> Self:
        if self.target_r >= self.init_r:
            raise build_disagreement(
                f"adalora begins with init_r {self.init_r} ranks and ends with fewer, but target_r says "
                f"{self.target_r}; use a target_r below init_r",
                "target_r",
            )
        if self.pretrained_adapter_weights is not None:
            raise build_disagreement(
                "adalora begins with ranks of its own, and is published as plain LoRA; to train such an adapter "
                "further, use {type: lora}",
                "pretrained_adapter_weights",
            )
        return self

    @property
    def scale_alpha(self) -> float:
        return self.alpha if self.alpha is not None else 2.0 * self.init_r


class Ia3Adapter(_Adapter):
    """IA3 (arXiv:2205.05638): learned scales of activations.

    `feedforward_modules`: the members of `target_modules` whose inputs are scaled. The others' outputs are scaled.
    """

    type: Literal["ia3"]
    target_modules: Annotated[tuple[str, ...], Field(min_length=1, max_length=MODULE_LIMIT)] | None = None
    feedforward_modules: Annotated[tuple[str, ...], Field(max_length=MODULE_LIMIT)] | None = None

    @model_validator(mode="after")
    def _inner_is_target(self) -> Self:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise build_disagreement(
                "name both target_modules and feedforward_modules, or neither", "feedforward_modules"
            )
        if surplus := set(self.feedforward_modules or ()) - set(self.target_modules or ()):
            raise build_disagreement(
                f"feedforward_modules must be among target_modules: {', '.join(sorted(surplus))}",
                "feedforward_modules",
            )
        return self


class AdaptionPromptAdapter(_Adapter):
    """LLaMA-Adapter (arXiv:2303.16199): learned prompts with a gate, in the upper layers."""

    type: Literal["adaption_prompt"]
    adapter_len: Annotated[Integer, Field(ge=1, le=256)] = 10
    adapter_layers: Count | None = None


AdapterSpec = Annotated[LoraAdapter | AdaloraAdapter | Ia3Adapter | AdaptionPromptAdapter, Field(discriminator="type")]


class Quantization(Spec):
    """Quantisation of the frozen base: QLoRA (arXiv:2305.14314) at 4 bits, LLM.int8() (arXiv:2208.07339) at 8.

    `quant_type` and `double_quant` count at 4 bits only.
    """

    bits: Annotated[Literal[4, 8], Number] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


def name_adapter_type(adapter: BaseModel | None) -> str:
    return "full" if adapter is None else str(getattr(adapter, "type"))  # noqa: B009  a union of four models


def name_quantization(quantization: Quantization | None) -> str:
    return "none" if quantization is None else f"{quantization.bits}-bit"


def servable_by(adapter: AdapterSpec | None) -> tuple[str, ...]:
    """The servers that can serve what such a job publishes.

    vLLM serves whole models and plain LoRA. AdaLoRA is published as plain LoRA.
    """
    plain = adapter is None or adapter.type == "adalora" or (adapter.type == "lora" and not adapter.use_dora)
    return ("veritune", "vllm") if plain else ("veritune",)


def shares_its_base(adapter: AdapterSpec | None) -> bool:
    """Whether one loaded base can serve several adapters of this kind."""
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
"""Adapter × quantisation → None if the pair works, else why not and the nearest pair that works."""
