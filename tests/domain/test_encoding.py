"""Training ids equal serving ids, token for token.

Three small tokenizers are trained here, one of each family that base models use.
"""

import json
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.domain.claims import Verdict
from app.domain.corpora import split_sentences
from app.domain.encoding import MIN_OBSERVATION_BUDGET, Encoder, Tokenization
from app.domain.react import (
    CLOSE,
    END,
    TURN_END,
    ReactFormat,
    Segment,
    SegmentKind,
    build_header,
    join_text,
    render_turn,
)
from app.domain.trajectories import Action, ActionName, Step, Trajectory
from app.tokenizers import load_tokenization
from tests.domain.strategies import texts, trajectories

FORMAT = ReactFormat()

_SPECIAL = ["<s>", "</s>", "<unk>"]
_SIZE = 600
_PROSE = (
    "Judge the claim. Search for pages, read them, and finish with SUPPORTS, REFUTES or NOT ENOUGH INFO.\n"
    "Claim: Ada wrote the first program in 1843.\nThought 1: I should search Ada and see what she wrote.\n"
    "Action 1: Search[Ada Lovelace]\nObservation 1: Ada Lovelace was a mathematician. She wrote the first program "
    "for the Analytical Engine in 1843. The engine was never built.\nThought 2: The observation says it, so the "
    "claim is true.\nAction 2: Lookup[program]\nAction 3: Finish[SUPPORTS]\n"
)
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2_style() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _qwen_style() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _sentencepiece_style() -> Tokenizer:
    """As Llama 2 has it: a dummy prefix, spaces as ▁, and bytes for what the vocabulary lacks."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=2 * _SIZE, special_tokens=_SPECIAL + bytes_, show_progress=False)
    without_newlines = [line for line in _PROSE.split("\n") if line] * 20
    tokenizer.train_from_iterator(without_newlines, trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] in _SPECIAL]
    return Tokenizer.from_str(json.dumps({**written, "pre_tokenizer": None}))


def _trained(tokenizer: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=_SIZE, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([_PROSE] * 20, trainer)
    return tokenizer


_FAMILIES = {"gpt2": _gpt2_style, "qwen": _qwen_style, "sentencepiece": _sentencepiece_style}
_LOADED = {
    name: load_tokenization(make().to_str().encode(), bos_id=None if name == "qwen" else 0, eos_id=1)
    for name, make in _FAMILIES.items()
}
quick = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
families = pytest.mark.parametrize("family", list(_FAMILIES))


def encoder(family: str) -> Encoder:
    return Encoder(_LOADED[family], FORMAT)


def served(coder: Encoder, trajectory: Trajectory) -> Iterator[tuple[list[int], bool]]:
    """The ids as serving builds them up, atom by atom: (ids so far, whether a turn is complete)."""
    ids = [] if coder.tokens.bos_id is None else [coder.tokens.bos_id]
    for segment in FORMAT.render_instructions(trajectory.claim):
        ids += coder.encode_segment(segment)
    for number, step in enumerate(trajectory.steps, start=1):
        for segment in render_turn(number, step.thought, step.action):
            ids += coder.encode_segment(segment)
        if step.observation is None:
            yield [*ids, *coder.encode_segment(END)], True
            return
        yield list(ids), False
        seen = Segment(SegmentKind.OBSERVATION, f" {step.observation}", False)
        for segment in (TURN_END, build_header("Observation", number), seen, TURN_END):
            ids += coder.encode_segment(segment)
        yield list(ids), True


@families
@given(trajectory=trajectories())
@quick
def test_training_ids_are_serving_ids(family: str, trajectory: Trajectory) -> None:
    coder = encoder(family)
    trained = list(coder.encode(FORMAT.render_trajectory(trajectory)).ids)
    built = list(served(coder, trajectory))
    assert built[-1][0] == trained
    for ids, _ in built:
        assert trained[: len(ids)] == ids


@families
@given(trajectory=trajectories())
@quick
def test_the_ids_of_a_prompt_begin_the_ids_of_its_continuation(family: str, trajectory: Trajectory) -> None:
    coder = encoder(family)
    trained = coder.encode(FORMAT.render_trajectory(trajectory)).ids
    for done in range(len(trajectory.steps)):
        prompt = coder.encode(FORMAT.render_prompt(trajectory.claim, trajectory.steps[:done])).ids
        assert trained[: len(prompt)] == prompt


@families
@given(trajectory=trajectories())
@quick
def test_an_encoded_segment_decodes_to_its_text(family: str, trajectory: Trajectory) -> None:
    tokens = _LOADED[family]
    for segment in FORMAT.render_trajectory(trajectory)[:-1]:
        assert tokens.decode(encoder(family).encode_segment(segment)) == segment.text


@families
@given(trajectory=trajectories())
@quick
def test_the_trained_spans_are_the_text_that_a_model_writes(family: str, trajectory: Trajectory) -> None:
    coder = encoder(family)
    segments = FORMAT.render_trajectory(trajectory)
    encoded = coder.encode(segments)
    learned = [coder.tokens.decode(encoded.ids[start:end]) for start, end in encoded.trained]
    assert "".join(learned) == join_text(segment for segment in segments if segment.trained)
    assert encoded.ids.count(coder.tokens.eos_id) == 1
    assert encoded.trained[-1][1] == len(encoded.ids), "the end of the sequence is learned"
    assert encoded.labelled == sum(end - start for start, end in encoded.trained)


@families
def test_bos_stands_once_at_the_front_or_not_at_all(family: str) -> None:
    coder = encoder(family)
    ids = coder.encode(FORMAT.render_prompt("It is.", ())).ids
    bos = coder.tokens.bos_id
    assert (ids[0] == 0 and ids.count(0) == 1) if bos == 0 else 0 not in ids


@families
def test_one_token_tells_actions_and_verdicts_apart(family: str) -> None:
    coder = encoder(family)
    assert set(coder.map_action_tokens().values()) == set(ActionName)
    assert set(coder.map_verdict_tokens().values()) == set(Verdict)


def test_two_atoms_that_begin_alike_are_named() -> None:
    coder = encoder("gpt2")
    alike = [Segment(SegmentKind.ARGUMENT, word, True) for word in ("zz1", "zz2")]
    with pytest.raises(ValueError, match="zz1"):
        coder.map_first_tokens(alike)


# --- trimming ------------------------------------------------------------------------------

_SENTENCES = st.lists(
    st.sampled_from(
        [
            "Ada Lovelace was a mathematician.",
            "She wrote the first program in 1843.",
            "The engine was never built.",
            "Nobody knows why that is so, although many people have written about it since.",
            "It rained.",
        ]
    ),
    min_size=1,
    max_size=40,
).map(" ".join)


@st.composite
def long_trajectories(draw: st.DrawFn) -> Trajectory:
    """Steps with observations of up to forty sentences, one of which a later thought may quote."""
    steps = []
    quoted = ""
    for _ in range(draw(st.integers(1, 4))):
        observation = draw(_SENTENCES)
        action = Action(name=ActionName.SEARCH, argument="Ada")
        steps.append(Step(thought=quoted, action=action, observation=observation))
        sentence = draw(st.sampled_from(split_sentences(observation)))
        quoted = draw(st.sampled_from(["Hm.", f'It says "{sentence}"']))
    last = Step(thought=quoted, action=Action(name=ActionName.FINISH, argument="SUPPORTS"))
    return Trajectory(claim="Ada wrote the first program.", steps=(*steps, last))


def _around(words: list[str], observation: str) -> bool:
    """Whether `words` are neighbouring sentences of the observation."""
    sentences = split_sentences(observation)
    return any(sentences[at : at + len(words)] == words for at in range(len(sentences)))


def _budget(coder: Encoder, trimmed: Trajectory, number: int, limit: int) -> int:
    """Budget of the observation of the step at `number`, computed as serving does."""
    step = trimmed.steps[number]
    opened = [*render_turn(number + 1, step.thought, step.action), TURN_END, build_header("Observation", number + 1)]
    used = coder.count_tokens([*FORMAT.render_prompt(trimmed.claim, trimmed.steps[:number]), *opened])
    return coder.get_observation_budget(used, limit)


limits = st.integers(250, 1200)


@given(trajectory=long_trajectories(), limit=limits)
@quick
def test_trimming_keeps_all_but_observations(trajectory: Trajectory, limit: int) -> None:
    trimmed = encoder("gpt2").trim_observations(trajectory, limit).trajectory
    assert trimmed.claim == trajectory.claim
    assert trimmed.steps[-1] == trajectory.steps[-1]
    assert [(s.thought, s.action) for s in trimmed.steps] == [(s.thought, s.action) for s in trajectory.steps]


@given(trajectory=long_trajectories(), limit=limits)
@quick
def test_trimming_keeps_whole_neighbouring_sentences_within_the_budget(trajectory: Trajectory, limit: int) -> None:
    coder = encoder("gpt2")
    trimmed = coder.trim_observations(trajectory, limit)
    if coder.count_tokens(FORMAT.render_trajectory(trajectory)) <= limit // 2 - 96:
        assert trimmed.trajectory == trajectory
        return
    for number, (before, after) in enumerate(zip(trajectory.steps[:-1], trimmed.trajectory.steps[:-1], strict=True)):
        assert before.observation is not None
        assert after.observation is not None
        budget = _budget(coder, trimmed.trajectory, number, limit)
        fits = len(coder.tokens.encode(f" {after.observation}")) <= budget
        assert fits or after.observation == before.observation.split()[0] or trimmed.observations == 0
        whole = _around(split_sentences(after.observation), before.observation)
        longest = max(len(coder.tokens.encode(f" {s}")) for s in split_sentences(before.observation))
        assert whole or budget < longest, "only a sentence that is longer than the budget is cut inside"


@given(trajectory=long_trajectories(), limit=limits)
@quick
def test_trimming_is_idempotent(trajectory: Trajectory, limit: int) -> None:
    coder = encoder("gpt2")
    once = coder.trim_observations(trajectory, limit).trajectory
    assert coder.trim_observations(once, limit).trajectory == once


@given(trajectory=long_trajectories(), limit=st.integers(600, 1200))
@quick
def test_a_protected_row_keeps_a_sentence_that_is_quoted(trajectory: Trajectory, limit: int) -> None:
    coder = encoder("gpt2")
    trimmed = coder.trim_observations(trajectory, limit)
    for number, step in enumerate(trajectory.steps[:-1]):
        kept = trimmed.trajectory.steps[number].observation or ""
        following = trajectory.steps[number + 1].thought
        if '"' not in following:
            continue
        quoted = following.split('"')[1].strip(" .,")
        said = [s.thought.split('"')[1].strip(" .,") for s in trajectory.steps[number + 1 :] if '"' in s.thought]
        if len({quotation for quotation in said if quotation in (step.observation or "")}) > 1:
            continue  # two sentences far apart cannot both stay in one run of sentences
        budget = _budget(coder, trimmed.trajectory, number, limit)
        if quoted in kept or len(coder.tokens.encode(f" {quoted}.")) > budget:
            continue
        pytest.fail(f"{quoted!r} is quoted by step {number + 2} and was cut from {step.observation!r}")


def test_a_quoted_sentence_far_down_is_kept_and_the_row_is_counted_as_protected() -> None:
    page = " ".join(["The engine was never built."] * 60) + " She wrote the first program in 1843."
    seen = Step(thought="", action=Action(name=ActionName.SEARCH, argument="Ada"), observation=page)
    said = 'It says she "wrote the first program".'
    done = Step(thought=said, action=Action(name=ActionName.FINISH, argument="SUPPORTS"))
    trajectory = Trajectory(claim="Ada wrote the first program.", steps=(seen, done))
    trimmed = encoder("gpt2").trim_observations(trajectory, 500)
    assert trimmed.protected
    assert trimmed.observations == 1
    assert trimmed.tokens > 0
    assert "wrote the first program" in (trimmed.trajectory.steps[0].observation or "")


@given(observation=texts, budget=st.integers(4, 60))
@quick
def test_a_shortened_observation_begins_the_whole_one(observation: str, budget: int) -> None:
    coder = encoder("qwen")
    kept = coder.shorten_observation(observation, budget)
    assert observation.startswith(kept)
    assert kept
    assert coder.shorten_observation(kept, budget) == kept


def test_the_budget_depends_only_on_the_tokens_before() -> None:
    coder = encoder("gpt2")
    assert coder.get_observation_budget(100, 1096) == 450
    assert coder.get_observation_budget(1090, 1096) == MIN_OBSERVATION_BUDGET


def test_an_encoding_names_no_tokenizer() -> None:
    """Any `encode` will do: here one token a byte."""
    plain = Tokenization(
        encode=lambda text: list(text.encode()),
        encode_template=lambda text: list(text.encode()),
        decode=lambda ids: bytes(ids).decode(),
        bos_id=None,
        eos_id=256,
        vocab_size=257,
    )
    coder = Encoder(plain, ReactFormat(template="{claim}"))
    encoded = coder.encode(coder.form.render_prompt("It is.", ()))
    assert bytes(encoded.ids) == b"It is.\n"
    assert encoded.trained == ()
    assert coder.encode([CLOSE]).labelled == 0, "the first token of a sequence is never predicted"
