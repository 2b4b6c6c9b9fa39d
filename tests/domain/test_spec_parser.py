"""Mistakes in a config: each is named by its place in what was sent, with the word that was probably meant."""

import typing
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.domain.errors import InvalidError, Problem
from app.domain.spec_parser import MAX_PROBLEMS, list_problems, read_spec, reject_forbidden
from app.domain.specs import TrainSpec
from app.domain.spelling import did_you_mean, find_correction
from app.domain.vocabularies import FOREIGN_KEYS, ForeignKey


def refusal(spec: Any) -> InvalidError:
    with pytest.raises(InvalidError) as caught:
        read_spec(spec)
    return caught.value


def hinted(**spec: Any) -> tuple[str, str | None]:
    """(place, hint) of the one thing wrong."""
    (problem,) = refusal({"dataset": "rows"} | spec).problems
    return ".".join(map(str, problem.loc)), problem.hint


@pytest.mark.parametrize(
    ("spec", "place", "meant"),
    [
        ({"datasets": "rows"}, "datasets", "dataset"),
        ({"basemodel": "x"}, "basemodel", "base_model"),
        ({"epoch": 3}, "epoch", "trainer.epochs"),
        ({"learning_rate": 1}, "learning_rate", "trainer.learning_rate"),
        ({"lr_scheduler_warmup_fraction": 1}, "lr_scheduler_warmup_fraction",
         "trainer.learning_rate_scheduler.warmup_fraction"),
        ({"trainer": {"epoch": 3}}, "trainer.epoch", "epochs"),
        ({"trainer": {"optimizer": {"weight_decy": 0}}}, "trainer.optimizer.weight_decy", "weight_decay"),
        ({"trainer": {"learning_rate_scheduler": {"warm_up_fraction": 0}}},
         "trainer.learning_rate_scheduler.warm_up_fraction", "warmup_fraction"),
        ({"trainer": {"gradient_clipping": {"clip_global_norm": 1}}},
         "trainer.gradient_clipping.clip_global_norm", "clipglobalnorm"),
        ({"adapter": {"type": "lora", "alhpa": 1}}, "adapter.alhpa", "alpha"),
        ({"adapter": {"type": "lora", "target_module": ["q"]}}, "adapter.target_module", "target_modules"),
        ({"adapter": {"type": "adalora", "target_rank": 4}}, "adapter.target_rank", "adapter.target_r"),
        ({"adapter": {"type": "ia3", "feedforward": []}}, "adapter.feedforward", "adapter.feedforward_modules"),
        ({"adapter": {"type": "adaption_prompt", "adapter_len_": 3}}, "adapter.adapter_len_", "adapter_len"),
        ({"quantization": {"bit": 4}}, "quantization.bit", "bits"),
        ({"preprocessing": {"split": {"probability": []}}}, "preprocessing.split.probability", "probabilities"),
        ({"input_features": [{"name": "claim", "typ": "text"}]}, "input_features.0.typ", "type"),
        ({"prompt": {"templates": "x"}}, "prompt.templates", "template"),
        ({"backend": {"process": 2}}, "backend.process", "processes"),
    ],
)  # fmt: skip
def test_did_you_mean(spec: dict[str, Any], place: str, meant: str) -> None:
    assert hinted(**spec) == (place, f"did you mean {meant!r}?")


@pytest.mark.parametrize(
    ("word", "meant", "note"),
    [
        ("warmup_steps", "trainer.learning_rate_scheduler.warmup_fraction", "It is a share of all updates"),
        ("warmup_ratio", "trainer.learning_rate_scheduler.warmup_fraction", ""),
        ("val_set_size", "preprocessing.split.probabilities", "shares of train, validation and test"),
        ("lora_target", "adapter.target_modules", "all-linear or a list"),
        ("eval_steps", "trainer.steps_per_checkpoint", "every checkpoint is evaluated"),
        ("max_steps", "trainer.train_steps", ""),
        ("learning_rate_multiplier", "trainer.learning_rate", "not a factor"),
        ("validation_file", "preprocessing.split", "{type: fixed}"),
        ("micro_batch_size", "trainer.batch_size", ""),
        ("batch_size", "trainer.batch_size", "effective_batch_size counts those of an update"),
        ("random_state", "seed", ""),
        ("train_on_inputs", "trainer.train_on_observations", "the prompt never"),
        ("load_in_4bit", "quantization.bits", "bits: 4"),
        ("max_tokens", "generation.max_new_tokens", "one Thought"),
        ("n-epochs", "trainer.epochs", ""),
        ("microBatchSize", "trainer.batch_size", ""),
        ("warmup_setps", "trainer.learning_rate_scheduler.warmup_fraction", "It is a share of all updates"),
    ],
)
def test_a_word_of_another_trainer_is_understood_by_its_meaning(word: str, meant: str, note: str) -> None:
    hint = hinted(**{word: 1})[1]
    assert hint is not None
    assert hint.startswith(f"did you mean {meant!r}?")
    assert note in hint
    assert bool(note) == (hint != f"did you mean {meant!r}?")


@pytest.mark.parametrize(("word", "meaning"), FOREIGN_KEYS.items())
def test_every_word_of_another_trainer_gets_its_hint(word: str, meaning: ForeignKey) -> None:
    """At the top, in a section that is not its own, or in the only one where it has this meaning."""
    section, _, name = word.rpartition(".")
    document: dict[str, Any] = {section: {name: 1}} if section else {word: 1}
    if section == "adapter":
        document[section]["type"] = "adalora"
    hint = (hinted(trainer={"optimizer": {name: 1}}) if section == "optimizer" else hinted(**document))[1]
    assert hint is not None
    assert (f"did you mean {meaning.key!r}?" in hint) == (meaning.key is not None)
    assert meaning.note is None or meaning.note[1:] in hint


def test_every_key_that_is_hinted_at_exists() -> None:
    def keys(model: type[BaseModel], path: str = "") -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            found.add(path + name)
            for inner in models_in(field.annotation):
                found |= keys(inner, f"{path}{name}.")
        return found

    assert {meaning.key for meaning in FOREIGN_KEYS.values() if meaning.key} <= keys(TrainSpec)


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for one in typing.get_args(annotation) for model in models_in(one)]


@pytest.mark.parametrize(
    ("place", "words"),
    [("adapter", "published unmerged"), ("trainer", "published unmerged"), ("", "published unmerged")],
)
def test_a_word_without_a_key_is_answered_by_what_happens_instead(place: str, words: str) -> None:
    inner: dict[str, Any] = {"postprocessor": 1}
    document = {place: inner | ({"type": "lora"} if place == "adapter" else {})} if place else inner
    hint = hinted(**document)[1]
    assert hint is not None
    assert words in hint
    assert "did you mean" not in hint


@pytest.mark.parametrize(
    "word", ["ensemble_steps", "size", "set_size", "process_step", "eval_set", "beam", "column", "type"]
)
def test_a_word_of_another_meaning_is_told_nothing_wrong(word: str) -> None:
    """Alike in spelling only, or a key of several sections."""
    hint = hinted(**{word: 1})[1]
    assert hint is not None
    assert hint.startswith("known here: ")


def test_the_body_of_a_prediction_is_told_nothing_of_training() -> None:
    class Body(BaseModel, extra="forbid"):
        claim: str = ""

    with pytest.raises(ValidationError) as caught:
        Body.model_validate({"fp16": True})
    assert list_problems(caught.value.errors(), {"fp16": True}, Body)[0].hint == "known here: claim"


@pytest.mark.parametrize("word", ["xyz", "rank"])
def test_an_adapters_key_is_not_offered_to_another_adapter(word: str) -> None:
    place, hint = hinted(adapter={"type": "ia3", word: 1}, quantization=None)
    assert place == f"adapter.{word}"
    assert hint is not None
    assert "feedforward_modules" in hint
    assert "use_dora" not in hint


def test_a_word_like_none_gets_the_list() -> None:
    assert hinted(backend={"zzz": 1}) == ("backend.zzz", "known here: processes, strategy, type")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"quantization": {"bnb_4bit_compute_dtype": "x"}}, "follows the device"),
        ({"quantization": {"bnb_4bit_quant_type": "nf4"}}, "quant_type"),
        ({"quantization": {"bnb_4bit_use_double_quant": True}}, "double_quant"),
        ({"trainer": {"max_batch_size": 8}}, "leave it out"),
        ({"preprocessing": {"sample_ratio": 0.5}}, "every row is used"),
    ],
)
def test_words_of_ludwig_that_go_another_way_here(spec: dict[str, Any], words: str) -> None:
    hint = hinted(**spec)[1]
    assert hint is not None
    assert words in hint


def test_a_type_that_is_none_or_missing() -> None:
    assert hinted(adapter={"type": "lorra"}) == ("adapter.type", "did you mean 'lora'?")
    error = refusal({"dataset": "rows", "adapter": {"r": 3}})
    assert error.problems == (Problem(("adapter", "type"), "the type is missing"),)


def test_a_value_that_fits_no_member_of_a_union_is_one_problem() -> None:
    (problem,) = refusal({"dataset": "rows", "trainer": {"batch_size": 0}}).problems
    assert problem.loc == ("trainer", "batch_size")
    assert "'auto'" in problem.message
    assert "; or " in problem.message


def test_every_mistake_is_listed_and_the_headline_counts_them() -> None:
    error = refusal({"dataset": "rows", "epochs": 3, "trainer": {"epoch": 3}, "quantization": {"bits": 3}})
    assert {".".join(map(str, problem.loc)) for problem in error.problems} == {
        "epochs",
        "trainer.epoch",
        "quantization.bits",
    }
    assert "(and 2 more)" in error.detail


def test_the_given_value_is_quoted_and_cut() -> None:
    error = refusal({"dataset": "rows", "quantization": {"bits": "b" * 10_000}})
    assert f"(given: '{'b' * 60}')" in error.detail
    assert len(error.detail) < 300


def test_what_is_missing_is_named() -> None:
    assert refusal({}).problems[0].loc == ("dataset",)
    error = refusal({"dataset": "rows", "input_features": [{}]})
    assert error.problems[0].loc == ("input_features", 0, "name")


@pytest.mark.parametrize("document", [None, [], "rows", 3, [{"dataset": "rows"}]])
def test_a_config_is_an_object(document: Any) -> None:
    assert refusal(document).code == "invalid_spec"


@pytest.mark.parametrize(
    ("kind", "code"),
    [("export", "not_yet_supported"), ("distill", "not_yet_supported"), ("evaluate", "invalid_spec"),
     ("trian", "invalid_spec"), (3, "invalid_spec"), ([], "invalid_spec"), ({}, "invalid_spec")],
)  # fmt: skip
def test_other_kinds_of_job(kind: Any, code: str) -> None:
    error = refusal({"dataset": "rows", "kind": kind})
    assert (error.code, error.problems[0].loc) == (code, ("kind",))


def test_a_hundred_thousand_mistakes_are_not_all_put_into_words() -> None:
    error = refusal({"dataset": "rows"} | {f"key{number}": number for number in range(100_000)})
    assert len(error.problems) == MAX_PROBLEMS


def test_problems_of_a_document_inside_a_list() -> None:
    class Inner(BaseModel, extra="forbid"):
        size: int = 1

    class Outer(BaseModel, extra="forbid"):
        inner: list[Inner]

    sent = {"inner": [{"size": 1}, {"sice": 2}]}
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(sent)
    (problem,) = list_problems(caught.value.errors(), sent, Outer)
    assert (problem.loc, problem.hint) == (("inner", 1, "sice"), "did you mean 'size'?")


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("weight_decy", ["weight_decay", "beta"], "weight_decay"),
        ("alhpa", ["alpha"], "alpha"),
        ("probability", ["probabilities"], "probabilities"),
        ("process", ["processes"], "processes"),
        ("claims", ["claim"], "claim"),
        ("train_steps", ["eval_steps"], None),
        ("lr", ["r"], None),
        ("bit", ["bite", "bits"], "bits"),
        ("cat", ["bats", "hats"], None),
    ],
)
def test_misspelt_words(word: str, known: list[str], meant: str | None) -> None:
    assert find_correction(word, known) == meant


def test_hints() -> None:
    assert did_you_mean("epoch", ["epochs", "seed"]) == "did you mean 'epochs'?"
    assert did_you_mean("zzz", ["b", "a"]) == "known here: a, b"
    assert did_you_mean("zzz", []) is None
    assert did_you_mean("epochs" + "x" * 1_000_000, ["epochs"]) == "known here: epochs"


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ("a\0", ()),
        ({"a": "b\ud800"}, ("a",)),
        ({"a": ["b", {"c": "\udfff"}]}, ("a", 1, "c")),
        ({"a\0b": 1}, ()),
        ({"a": {"b\0": 1}}, ("a",)),
    ],
)
def test_characters_that_no_text_here_may_hold(document: Any, place: tuple[str | int, ...]) -> None:
    with pytest.raises(InvalidError) as caught:
        reject_forbidden(document)
    assert (caught.value.code, caught.value.problems[0].loc) == ("forbidden_character", place)


def test_other_characters_are_fine() -> None:
    reject_forbidden({"a": ["😀", "\x01", "é", 1, None, True, 1.5], "b": {"": "\n"}})
