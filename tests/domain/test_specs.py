"""The job's vocabulary: what is accepted, with which defaults, and what no combination allows."""

import typing
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from app.domain.errors import InvalidError, NotYetSupportedError
from app.domain.spec_base import METADATA_LIMIT
from app.domain.spec_parser import read_spec
from app.domain.specs import TrainSpec, not_yet_supported, spec_examples
from app.domain.tuning_methods import PAIRINGS, LoraAdapter, Quantization, name_adapter_type, name_quantization
from tests.conftest import SHARED, needs_shared_data

LEAST = {"dataset": "rows"}

EVERYTHING: dict[str, Any] = {
    "kind": "train",
    "name": "first",
    "model_type": "llm",
    "base_model": "smollm2-135m",
    "dataset": "rows",
    "input_features": [{"name": "claim", "type": "text", "column": "statement"}],
    "output_features": [{"name": "trajectories", "type": "text"}],
    "prompt": {"template": "Is this so? {claim}\n"},
    "adapter": {
        "type": "lora",
        "r": 8,
        "alpha": 8,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": True,
        "use_dora": False,
        "init_lora_weights": True,
        "pretrained_adapter_weights": None,
    },
    "quantization": {"bits": 4, "quant_type": "fp4", "double_quant": False},
    "preprocessing": {
        "global_max_sequence_length": 512,
        "overlength": "drop",
        "split": {"type": "random", "probabilities": [1, 0, 0]},
    },
    "trainer": {
        "type": "finetune",
        "epochs": 1.5,
        "train_steps": 100,
        "learning_rate": 1e-3,
        "batch_size": 4,
        "effective_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "eval_batch_size": 2,
        "optimizer": {"type": "adamw", "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.01},
        "learning_rate_scheduler": {"decay": "linear", "warmup_fraction": 0.1},
        "gradient_clipping": {"clipglobalnorm": None},
        "early_stop": -1,
        "steps_per_checkpoint": 5,
        "enable_gradient_checkpointing": True,
        "train_on_observations": True,
        "verdict_branch": 0,
        "verdict_rows": 0.5,
        "verdict_weight": 20,
        "evaluate_after": {
            "dataset": "heldout",
            "corpus": "pages",
            "split": "test",
            "max_claims": 100,
            "max_steps": 5,
            "controls": [],
            "fit_calibration": True,
            "promote": False,
            "seed": 7,
        },
    },
    "generation": {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64},
    "backend": {"type": "local", "processes": 1},
    "seed": 7,
    "metadata": {"ticket": [1, {"nested": None}]},
}


def refusal(**spec: Any) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        read_spec(LEAST | spec)
    return caught.value


def test_only_the_dataset_is_required_and_every_default_runs() -> None:
    spec = read_spec(LEAST)
    assert not_yet_supported(spec) == []
    assert spec.base_model is None
    assert isinstance(spec.adapter, LoraAdapter)
    assert (spec.adapter.r, spec.adapter.scale_alpha, spec.adapter.dropout) == (16, 32, 0)
    assert spec.adapter.target_modules == "all-linear"
    assert spec.quantization == Quantization(bits=4, quant_type="nf4", double_quant=True)
    assert spec.preprocessing.overlength == "trim_observations"
    assert spec.max_sequence_length is None
    trainer = spec.trainer
    assert (trainer.epochs, trainer.learning_rate, trainer.batch_size, trainer.effective_rows) == (3, 2e-4, "auto", 16)
    assert (trainer.learning_rate_scheduler.decay, trainer.learning_rate_scheduler.warmup_fraction) == ("cosine", 0.03)
    assert (trainer.gradient_clipping.clipglobalnorm, trainer.early_stop) == (1.0, -1)
    assert (trainer.enable_gradient_checkpointing, trainer.train_on_observations) == ("auto", False)
    assert (trainer.verdict_branch, trainer.verdict_rows, trainer.verdict_weight) == (0.25, 0, 1)
    assert (spec.generation.temperature, spec.generation.max_new_tokens) == (0, 128)
    assert (spec.backend.type, spec.backend.processes, spec.seed, spec.metadata) == ("local", 1, 42, {})


def test_the_whole_vocabulary_is_read_and_written_back() -> None:
    spec = read_spec(EVERYTHING)
    assert TrainSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert spec.model_dump(mode="json", exclude_unset=True) == EVERYTHING


def keys(model: type[BaseModel]) -> dict[str, Any]:
    return {name: field.annotation for name, field in model.model_fields.items()}


def test_everything_really_names_every_key() -> None:
    """A key that is added to the vocabulary is added above, or this fails."""

    def missing(model: type[BaseModel], given: dict[str, Any], path: str) -> list[str]:
        found = [f"{path}{name}" for name in keys(model) if name not in given]
        for name, annotation in keys(model).items():
            inner = [m for m in (annotation, *typing.get_args(annotation)) if isinstance(m, type)]
            for member in (m for m in inner if issubclass(m, BaseModel)):
                if isinstance(given.get(name), dict):
                    found += missing(member, given[name], f"{path}{name}.")
        return found

    asked = missing(TrainSpec, EVERYTHING, "")
    # Given at another place, or refused so far; the adapter's union is read by its members below.
    assert set(asked) - {"global_max_sequence_length", "preprocessing.split.column", "backend.strategy"} == set()


@pytest.mark.parametrize(
    "adapter",
    [
        {"type": "adalora", "target_r": 4, "init_r": 6, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj"]},
        {"type": "ia3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        {"type": "adaption_prompt", "adapter_len": 8, "adapter_layers": 2},
        {"type": "lora", "use_dora": True},
        {"type": "lora", "init_lora_weights": "gaussian"},
        {"type": "lora", "pretrained_adapter_weights": "adp_1"},
        None,
    ],
)
def test_other_adapters_parse(adapter: dict[str, Any] | None) -> None:
    spec = TrainSpec.model_validate(LEAST | {"adapter": adapter, "quantization": None})
    assert name_adapter_type(spec.adapter) == ("full" if adapter is None else adapter["type"])


@needs_shared_data
def test_the_users_own_config_is_accepted() -> None:
    """Unchanged but for `dataset` added and `base_model` replaced."""
    source = SHARED / "seed_config.yaml"
    config = yaml.safe_load(source.read_text()) | {"dataset": "rows", "base_model": "smollm2-135m"}
    spec = read_spec(config)
    assert spec.prompt.template == config["prompt"]["template"]
    assert (spec.trainer.batch_size, spec.trainer.gradient_accumulation_steps, spec.trainer.effective_rows) == (
        1,
        16,
        16,
    )
    assert (spec.max_sequence_length, spec.generation.temperature) == (512, 0.1)
    assert spec.trainer.learning_rate_scheduler.warmup_fraction == 0.03


@pytest.mark.parametrize("example", spec_examples().values(), ids=spec_examples())
def test_the_documented_examples_run(example: dict[str, Any]) -> None:
    read_spec(example)


# Numbers and nulls.


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key of a document below its sections, with its value."""
    for key, inner in value.items():
        if isinstance(inner, dict) and key != "metadata":
            yield from places(inner, (*path, key))
        else:
            yield (*path, key), inner


OTHER_ADAPTERS: tuple[dict[str, Any], ...] = (
    {"type": "adalora", "target_r": 4, "init_r": 6, "alpha": 8, "dropout": 0.1},
    {"type": "adaption_prompt", "adapter_len": 8, "adapter_layers": 2},
)
DOCUMENTS: list[dict[str, Any]] = [EVERYTHING, *(LEAST | {"adapter": adapter} for adapter in OTHER_ADAPTERS)]
KEYS = [(document, path, value) for document in DOCUMENTS for path, value in places(document)]
NUMBERS = [
    (document, path, value)
    for document, path, value in KEYS
    if isinstance(value, int | float) and not isinstance(value, bool)
]


def changed(document: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of `document` with `value` at `path`."""
    first, *rest = path
    inner = changed(document[first], tuple(rest), value) if rest else value
    return document | {first: inner}


def names(parameter: Any) -> str:
    return ".".join(parameter) if isinstance(parameter, tuple) else ""


@pytest.mark.parametrize(("document", "path", "value"), NUMBERS, ids=names)
def test_a_number_may_be_a_string_at_every_key_and_a_boolean_is_none(
    document: dict[str, Any], path: tuple[str, ...], value: float
) -> None:
    for spelled in (str(value), f" {value} ", f"{value:e}"):
        assert read_spec(changed(document, path, spelled)) == read_spec(document)
    for flag in (True, False):
        with pytest.raises(InvalidError, match="true and false are no numbers") as refused:
            read_spec(changed(document, path, flag))
        assert refused.value.problems[0].loc == path


def test_the_numbers_of_a_list_follow_the_same_rule() -> None:
    assert read_spec(LEAST | {"trainer": {"optimizer": {"betas": ["0.9", "9.5e-1"]}}}).trainer.optimizer.betas == (
        0.9,
        0.95,
    )
    error = refusal(preprocessing={"split": {"probabilities": [True, 0, 0]}})
    assert error.problems[0].loc == ("preprocessing", "split", "probabilities", 0)


@pytest.mark.parametrize(("path", "value"), [("learning_rate", "2e-4"), ("eps", "1e-8")])
def test_what_yaml_reads_as_a_string_is_a_number(path: str, value: str) -> None:
    assert isinstance(yaml.safe_load(f"{path}: {value}")[path], str)
    section = {"learning_rate": value} if path == "learning_rate" else {"optimizer": {path: value}}
    assert read_spec(LEAST | {"trainer": section}) == read_spec(LEAST)


NULL_SAYS_SOMETHING = {("adapter",), ("quantization",), ("trainer", "gradient_clipping", "clipglobalnorm")}
"""Keys whose null is a value of its own, and not the default: full fine-tuning, no quantisation, no clipping."""


def test_a_null_is_the_default_at_every_other_key() -> None:
    sections_and_keys = {key[:end] for _, key, _ in KEYS for end in range(1, len(key) + 1)}
    for path in sections_and_keys - NULL_SAYS_SOMETHING:
        if path[0] in ("dataset", "adapter") or path[:2] == ("trainer", "evaluate_after") != path:
            continue
        document: Any = None
        for key in reversed(path):
            document = {key: document}
        assert read_spec(LEAST | document) == read_spec(LEAST), path


@pytest.mark.parametrize("adapter", [EVERYTHING["adapter"], *OTHER_ADAPTERS], ids=lambda one: one["type"])
def test_a_null_is_the_default_at_every_key_of_an_adapter(adapter: dict[str, Any]) -> None:
    for key in set(adapter) - {"type"}:
        asked = {"type": adapter["type"], key: None}
        assert read_spec(LEAST | {"adapter": asked}) == read_spec(LEAST | {"adapter": {"type": adapter["type"]}}), key


def test_a_null_is_the_default_at_every_key_of_an_evaluation_after() -> None:
    least = {"dataset": "heldout"}
    for key in set(EVERYTHING["trainer"]["evaluate_after"]) - {"dataset"}:
        asked = {"trainer": {"evaluate_after": least | {key: None}}}
        assert read_spec(LEAST | asked) == read_spec(LEAST | {"trainer": {"evaluate_after": least}}), key


def test_a_null_that_says_something() -> None:
    assert read_spec(LEAST | {"adapter": None, "quantization": None}).adapter is None
    clipping = {"trainer": {"gradient_clipping": {"clipglobalnorm": None}}}
    assert read_spec(LEAST | clipping).trainer.gradient_clipping.clipglobalnorm is None


def test_a_null_where_there_is_no_default() -> None:
    error = refusal(dataset=None)
    assert (error.problems[0].loc, error.problems[0].message) == (("dataset",), "Field required")
    assert refusal(adapter={"type": None}).problems[0].message == "the type is missing"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"trainer": []}, "a section is needed"),
        ({"adapter": "lora"}, "{type: lora}"),
        ({"metadata": [1]}, "a section is needed"),
        ({"input_features": [None]}, "a section is needed"),
        ({"input_features": {"name": "claim"}}, "a list is needed"),
        ({"preprocessing": {"split": {"probabilities": 0.9}}}, "a list is needed"),
    ],
)
def test_sections_and_lists_are_called_so(spec: dict[str, Any], words: str) -> None:
    assert words in refusal(**spec).detail


# The template's placeholders.


@pytest.mark.parametrize(
    ("template", "unfilled"),
    [
        ("Judge {{claim}}", "{{claim}}"),
        ("Judge {claim} with {context}", "{context}"),
        ("Judge {claim} with {{ context | trim }}", "{{ context | trim }}"),
        ("Judge ${claim}", "${claim}"),
        ("Judge {claim} {}", "{}"),
        ("Judge {claim} {0}", "{0}"),
        ("Judge {claim} {page!r}", "{page!r}"),
        ("{% if page %}{claim}", "{% if page %}"),
        ("Judge {claim} by %(page)s", "%(page)s"),
    ],
)
def test_a_placeholder_that_nothing_fills(template: str, unfilled: str) -> None:
    error = refusal(prompt={"template": template})
    (problem,) = error.problems
    assert problem.loc == ("prompt", "template")
    assert problem.message.endswith(unfilled)
    assert problem.hint is not None
    assert "{claim}" in problem.hint


@pytest.mark.parametrize(
    "template",
    ['Answer {"claim": "{claim}"}', 'Answer {"claim": {claim}}', "{claim} {see: the pages}", "{claim} is 5% (or so)s"],
)
def test_braces_that_are_no_placeholder(template: str) -> None:
    assert read_spec(LEAST | {"prompt": {"template": template}}).prompt.template == template


def test_a_job_that_was_stored_with_another_placeholder_can_still_be_read() -> None:
    stored = LEAST | {"prompt": {"template": "{claim} {context}"}}
    assert TrainSpec.model_validate(stored).prompt.template == "{claim} {context}"


# Cross-field checks.


@pytest.mark.parametrize(
    ("trainer", "rows"),
    [
        ({}, 16),
        ({"effective_batch_size": 8}, 8),
        ({"batch_size": 2, "gradient_accumulation_steps": 3}, 6),
        ({"batch_size": 2, "gradient_accumulation_steps": 3, "effective_batch_size": 6}, 6),
        ({"batch_size": 4, "effective_batch_size": 8}, 8),
        ({"batch_size": 4}, 16),
    ],
)
def test_batch_numbers_that_agree(trainer: dict[str, Any], rows: int) -> None:
    assert read_spec(LEAST | {"trainer": trainer}).trainer.effective_rows == rows


def test_three_batch_numbers_that_disagree() -> None:
    trainer = {"batch_size": 2, "gradient_accumulation_steps": 3, "effective_batch_size": 16}
    error = refusal(trainer=trainer)
    assert error.problems[0].loc == ("trainer", "effective_batch_size")
    assert "2 × gradient_accumulation_steps 3 = 6" in error.detail


def test_accumulation_needs_a_batch_size() -> None:
    error = refusal(trainer={"gradient_accumulation_steps": 4})
    assert error.problems[0].loc == ("trainer", "gradient_accumulation_steps")
    assert "effective_batch_size" in error.detail


def test_both_maximum_lengths() -> None:
    inner = {"global_max_sequence_length": 512}
    assert read_spec(LEAST | {"global_max_sequence_length": 256}).max_sequence_length == 256
    assert read_spec(LEAST | {"preprocessing": inner, "global_max_sequence_length": 512}).max_sequence_length == 512
    error = refusal(preprocessing=inner, global_max_sequence_length=256)
    assert error.problems[0].loc == ("global_max_sequence_length",)
    assert "256 at the top and 512 under preprocessing" in error.detail


def test_a_column_is_for_a_fixed_split() -> None:
    error = refusal(preprocessing={"split": {"type": "random", "column": "part"}})
    assert error.problems[0].loc == ("preprocessing", "split", "column")
    split = read_spec(LEAST | {"preprocessing": {"split": {"type": "fixed", "column": "part"}}}).preprocessing.split
    assert split.column == "part"


ADAPTERS = {"full": None} | {word: {"type": word} for word in ("lora", "adalora", "ia3", "adaption_prompt")}
QUANTISATIONS: dict[str, Any] = {"none": None, "4-bit": {"bits": 4}, "8-bit": {"bits": 8}}
SOUND = {
    ("full", "none"),
    ("lora", "none"), ("lora", "4-bit"), ("lora", "8-bit"),
    ("adalora", "none"), ("adalora", "4-bit"),
    ("ia3", "none"),
    ("adaption_prompt", "none"), ("adaption_prompt", "4-bit"), ("adaption_prompt", "8-bit"),
}  # fmt: skip


@pytest.mark.parametrize("quantisation", QUANTISATIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_which_adapter_goes_with_which_quantisation(adapter: str, quantisation: str) -> None:
    asked = {"adapter": ADAPTERS[adapter], "quantization": QUANTISATIONS[quantisation]}
    reason = PAIRINGS[adapter][quantisation]
    assert (reason is None) == ((adapter, quantisation) in SOUND)
    if reason is None:
        spec = TrainSpec.model_validate(LEAST | asked)
        assert (name_adapter_type(spec.adapter), name_quantization(spec.quantization)) == (adapter, quantisation)
        return
    error = refusal(**asked)
    assert (error.code, error.problems[0].loc) == ("invalid_spec", ("quantization",))
    assert reason in error.detail
    assert "{type: lora}" in reason


def test_the_table_of_pairings_is_whole() -> None:
    assert set(PAIRINGS) == set(ADAPTERS)
    assert all(set(row) == set(QUANTISATIONS) for row in PAIRINGS.values())


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
@pytest.mark.parametrize("bits", [4, 8])
def test_an_initialiser_that_would_change_a_quantised_base(initialiser: str, bits: int) -> None:
    asked = {"type": "lora", "init_lora_weights": initialiser}
    error = refusal(adapter=asked, quantization={"bits": bits})
    assert (error.code, error.problems[0].loc) == ("base_would_change", ("adapter", "init_lora_weights"))
    assert "quantization to null" in error.detail
    TrainSpec.model_validate(LEAST | {"adapter": asked, "quantization": None})


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
def test_an_initialiser_that_doubles_the_rank(initialiser: str) -> None:
    asked = {"type": "lora", "init_lora_weights": initialiser}
    error = refusal(adapter=asked | {"r": 129}, quantization=None)
    assert error.problems[0].loc == ("adapter", "r")
    assert "at most 128" in error.detail
    TrainSpec.model_validate(LEAST | {"adapter": asked | {"r": 128}, "quantization": None})


# Not run by this version.


@pytest.mark.parametrize(
    ("asked", "place"),
    [
        ({"backend": {"processes": 2}}, ("backend", "processes")),
        ({"backend": {"strategy": "ddp"}}, ("backend", "strategy")),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_what_is_understood_but_not_run_yet(asked: dict[str, Any], place: tuple[str, ...]) -> None:
    error = refusal(**asked)
    assert isinstance(error, NotYetSupportedError)
    assert (error.code, [problem.loc for problem in error.problems]) == ("not_yet_supported", [place])


def test_all_that_is_not_run_yet_is_listed_at_once() -> None:
    error = refusal(backend={"processes": 2, "strategy": "ddp"})
    assert len(error.problems) == 2


@pytest.mark.parametrize(
    ("adapter", "quantization", "place", "words"),
    [
        ({"type": "adalora", "target_r": 12, "init_r": 12}, {"bits": 4}, ("adapter", "target_r"), "below init_r"),
        ({"type": "lora", "use_dora": True}, {"bits": 8}, ("adapter", "use_dora"), "bits: 4"),
        (
            {"type": "ia3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]},
            None,
            ("adapter", "feedforward_modules"),
            "down_proj",
        ),
        ({"type": "ia3", "target_modules": ["k_proj"]}, None, ("adapter", "feedforward_modules"), "both"),
        (
            {"type": "adalora", "pretrained_adapter_weights": "adp_1"},
            None,
            ("adapter", "pretrained_adapter_weights"),
            "{type: lora}",
        ),
        (
            {"type": "lora", "init_lora_weights": "olora", "pretrained_adapter_weights": "adp_1"},
            None,
            ("adapter", "pretrained_adapter_weights"),
            "either",
        ),
    ],
)
def test_keys_of_an_adapter_that_do_not_go_together(
    adapter: dict[str, Any], quantization: dict[str, Any] | None, place: tuple[str, ...], words: str
) -> None:
    error = refusal(adapter=adapter, quantization=quantization)
    assert error.problems[0].loc == place
    assert words in error.detail


# Bounds.


@pytest.mark.parametrize(
    ("place", "values"),
    [
        ("trainer.epochs", [0, -1, 10_001, "many"]),
        ("trainer.train_steps", [0, 1.5]),
        ("trainer.learning_rate", [0, -1, 1.1, float("nan"), float("inf"), "nan", "x"]),
        ("trainer.batch_size", [0, "all", 4_097]),
        ("trainer.effective_batch_size", [0, -4]),
        ("trainer.verdict_branch", [-0.1, 1.1]),
        ("trainer.verdict_rows", [-0.1, 1.1, True]),
        ("trainer.verdict_weight", [0, 1_001]),
        ("trainer.early_stop", [-2]),
        ("trainer.type", ["pretrain"]),
        ("trainer.optimizer.type", ["sgd"]),
        ("trainer.optimizer.betas", [[0.9], [0.9, 0.99, 0.999]]),
        ("trainer.learning_rate_scheduler.decay", ["sine"]),
        ("trainer.learning_rate_scheduler.warmup_fraction", [1, -0.1]),
        ("trainer.gradient_clipping.clipglobalnorm", [0, -1]),
        ("quantization.bits", [3, 16, "4 bits"]),
        ("quantization.quant_type", ["int4"]),
        ("preprocessing.overlength", ["cut"]),
        ("preprocessing.global_max_sequence_length", [0, 63]),
        ("preprocessing.split.probabilities", [[0.5, 0.5], [2, -1, 0]]),
        ("preprocessing.split", [{"probabilities": [0.5, 0, 0]}, {"probabilities": [0, 1, 0]}]),
        ("generation.temperature", [-1, 3]),
        ("generation.max_new_tokens", [0]),
        ("backend.type", ["ray"]),
        ("backend.processes", [0]),
        ("model_type", ["ecd"]),
        ("seed", [-1, 2**32]),
        ("name", ["", "-a", "a b", "a" * 101]),
        ("dataset", ["", " a", "a" * 201, "a\nb", 3, None]),
        ("base_model", ["/a", "./a", "../a", "~/a", "\\\\host\\a", "http://a", "hf://a"]),
        ("input_features", [[], [{"name": "a"}, {"name": "b"}]]),
        ("prompt", [{"template": ""}, {"template": "{claim} {claim}"}, {"template": "{claim}" + "a" * 9_000}]),
        ("metadata", [[], {"a": "b" * METADATA_LIMIT}]),
    ],
)
def test_values_out_of_bounds(place: str, values: list[Any]) -> None:
    for value in values:
        spec: Any = value
        for key in reversed(place.split(".")):
            spec = {key: spec}
        error = refusal(**spec)
        assert error.code == "invalid_spec", (place, value)
        assert any(".".join(map(str, problem.loc)).startswith(place) for problem in error.problems), (place, value)


def test_a_spec_does_not_change() -> None:
    with pytest.raises(ValidationError):
        read_spec(LEAST).seed = 1  # type: ignore[misc]
