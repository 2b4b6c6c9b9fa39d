"""Counts from sizes alone: trainable parameters, and bytes of activations that a token's backward pass needs."""

from app.domain.architectures import Architecture
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import AdaloraAdapter, AdaptionPromptAdapter, Ia3Adapter, LoraAdapter

IA3_OUTPUTS = ("k_proj", "v_proj")
IA3_INPUTS = ("down_proj",)
"""Layers that IA3 (arXiv:2205.05638) scales by default: the outputs of the first, the inputs of the second."""


def uses_llama_forward(sizes: Architecture, spec: TrainSpec) -> bool:
    """Whether the plan counts the activations of `worker.training.llama_forward`: plain LoRA over the Llama family.

    Dropout runs there too, with a mask for each input, but the plan counts it as transformers' larger forward."""
    adapter = spec.adapter
    plain = isinstance(adapter, LoraAdapter) and not adapter.use_dora and not adapter.dropout
    return plain and sizes.is_llama_family


def list_lora_targets(sizes: Architecture, spec: TrainSpec) -> dict[str, tuple[int, int]]:
    """The linear layers of one decoder layer that have LoRA weights: name → (inputs, outputs)."""
    named = getattr(spec.adapter, "target_modules", None)
    if named is None or named == "all-linear":
        return sizes.linears
    endings = {name.rpartition(".")[2] for name in named}
    return {name: shape for name, shape in sizes.linears.items() if name in endings}


def get_rank(spec: TrainSpec) -> int:
    """LoRA rank; 0 for methods without one."""
    match spec.adapter:
        case LoraAdapter(r=r):
            return r
        case AdaloraAdapter(init_r=r):
            return r
    return 0


def count_trainable_parameters(sizes: Architecture, spec: TrainSpec) -> int:
    """Number of trainable parameters."""
    match spec.adapter:
        case None:
            return sizes.parameters
        case LoraAdapter(use_dora=dora):
            per_layer = sum(
                get_rank(spec) * (i + o) + (o if dora else 0) for i, o in list_lora_targets(sizes, spec).values()
            )
            return sizes.layers * per_layer + _count_head_parameters(sizes, spec)
        case AdaloraAdapter():
            return sizes.layers * sum(get_rank(spec) * (i + o + 1) for i, o in list_lora_targets(sizes, spec).values())
        case Ia3Adapter() as ia3:
            return sizes.layers * sum(_list_ia3_widths(sizes, ia3))
        case AdaptionPromptAdapter(adapter_len=length, adapter_layers=layers):
            return min(layers or sizes.layers, sizes.layers) * (length * sizes.hidden + 1)


def _count_head_parameters(sizes: Architecture, spec: TrainSpec) -> int:
    """Parameters of LoRA on the output layer, if the spec names `lm_head`."""
    named = getattr(spec.adapter, "target_modules", ())
    return get_rank(spec) * (sizes.hidden + sizes.vocabulary) if "lm_head" in named else 0


def _list_ia3_widths(sizes: Architecture, ia3: Ia3Adapter) -> list[int]:
    inner = IA3_INPUTS if ia3.feedforward_modules is None else ia3.feedforward_modules
    named = (*IA3_OUTPUTS, *IA3_INPUTS) if ia3.target_modules is None else ia3.target_modules
    linears = {name: sizes.linears[name] for name in named if name in sizes.linears}
    return [inputs if name in inner else outputs for name, (inputs, outputs) in linears.items()]


def count_llama_forward_bytes(sizes: Architecture, spec: TrainSpec, compute: int) -> int:
    """Bytes per token that a layer of `llama_forward` saves for its backward pass: the fields of `SavedActivations`."""
    streams = 2 * sizes.hidden + 2 * sizes.query_width + 2 * sizes.key_width + 2 * sizes.intermediate
    return compute * (streams + get_rank(spec) * len(list_lora_targets(sizes, spec))) + 2 * 4


def count_transformers_bytes(sizes: Architecture, spec: TrainSpec, compute: int) -> int:
    """The same for transformers' own forward with PEFT's layers: an estimate, close to the measured cases.

    Norms save float32. Attention saves keys and values once for each query head. The MLP saves three tensors.
    """
    base = 8 * sizes.hidden + compute * (4 * sizes.query_width + 3 * sizes.intermediate) + 2 * 4
    return base + compute * _count_adapter_activations(sizes, spec)


def _count_adapter_activations(sizes: Architecture, spec: TrainSpec) -> int:
    """Numbers per token that one layer's adapters save."""
    shared = 2 * sizes.hidden + sizes.intermediate
    chosen = list_lora_targets(sizes, spec).values()
    inputs, outputs = sum(i for i, _ in chosen), sum(o for _, o in chosen)
    match spec.adapter:
        case None:
            return shared + 2 * sizes.hidden
        case LoraAdapter(dropout=dropout, use_dora=dora):
            # With dropout each adapted layer saves its own input and a mask. DoRA saves both outputs.
            return get_rank(spec) * len(chosen) + (2 * inputs if dropout else shared) + (2 * outputs if dora else 0)
        case AdaloraAdapter(dropout=dropout):
            return get_rank(spec) * len(chosen) + (2 * inputs if dropout else shared)
        case Ia3Adapter() as ia3:
            return sum(_list_ia3_widths(sizes, ia3))
        case AdaptionPromptAdapter(adapter_len=length):
            return 2 * sizes.query_width + 2 * length * sizes.heads
