"""What users write is text: no claim, thought, page or prompt makes a control token, in any tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from app.domain.encoding import Encoder, Tokenization
from app.domain.react import END, TURN_END, ReactFormat, Segment, SegmentKind, build_header, render_turn
from app.domain.trajectories import Action, ActionName, Step, Trajectory
from app.tokenizers import TextEncoder, load_tokenization
from tests.conftest import ROOT
from tests.tokenizers.families import FAMILIES

CACHE = Path(os.environ.get("VERITUNE_CACHE", ROOT / ".cache" / "veritune"))
REAL = sorted(CACHE.glob("models/*/tokenizer.json"))
"""Tokenizers of the base models on this host; what is tested holds for any."""


@dataclass(frozen=True)
class Family:
    """A tokenizer as its library reads it, and as this project does."""

    plain: Tokenizer
    tokens: Tokenization
    document: TextEncoder

    @property
    def control(self) -> dict[int, str]:
        added = self.plain.get_added_tokens_decoder()
        return {token: entry.content for token, entry in added.items()}

    def control_in(self, ids: list[int] | tuple[int, ...]) -> list[str]:
        return [self.control[token] for token in ids if token in self.control]


def load(document: str) -> Family:
    plain = Tokenizer.from_str(document)
    bos = next((token for token, special in zip(*_framed(plain), strict=True) if special), None)
    tokens = load_tokenization(document.encode(), bos_id=bos, eos_id=0)
    return Family(plain, tokens, TextEncoder(Tokenizer.from_str(document)))


def _framed(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    encoding = tokenizer.encode("a")
    return encoding.ids, encoding.special_tokens_mask


@pytest.fixture(scope="module", params=[*FAMILIES, *REAL], ids=lambda it: it if isinstance(it, str) else "real")
def family(request: pytest.FixtureRequest) -> Family:
    known = request.param
    return load(known.read_text(encoding="utf-8") if isinstance(known, Path) else FAMILIES[known]().to_str())


def sentences(name: str) -> list[str]:
    return [
        name,
        f"{name}{name}",
        f"I look at Elbe {name} and then I read on.",
        f"Elbe{name}flows",
        f"  {name}\n{name} ",
    ]


def test_a_tokenizer_by_itself_makes_control_tokens_of_text(family: Family) -> None:
    """Else the tests below show nothing."""
    for name in family.control.values():
        ids = family.plain.encode(f"I look at Elbe {name} and read on.", add_special_tokens=False).ids
        assert family.control_in(ids) == [name]


def test_text_that_names_a_control_token_stays_text(family: Family) -> None:
    for name in family.control.values():
        for text in sentences(name):
            ids = family.tokens.encode(text)
            assert family.control_in(list(ids)) == []
            assert family.tokens.decode(ids) == text


def test_a_prompt_that_is_text_stays_text_behind_the_tokenizers_own_bos(family: Family) -> None:
    bos = [] if family.tokens.bos_id is None else [family.tokens.bos_id]
    for name in family.control.values():
        for text in sentences(name):
            ids = family.document.encode_document(text)
            assert ids[: len(bos)] == bos
            assert family.control_in(ids[len(bos) :]) == []


def test_text_without_control_tokens_is_encoded_as_the_tokenizer_does(family: Family) -> None:
    for text in ("The Elbe flows.", "a < b > c [d] <|", "3.5 m, 1384", "Děčín", "a"):
        assert family.document.encode_document(text) == family.plain.encode(text).ids


def test_a_row_that_names_control_tokens_is_trained_and_served_as_text(family: Family) -> None:
    coder = Encoder(family.tokens, ReactFormat())
    for name in family.control.values():
        trajectory = written_with(name)
        ids = coder.encode(coder.form.render_trajectory(trajectory)).ids
        assert list(ids) == served(coder, trajectory)
        frame = [token for token in (family.tokens.bos_id, family.tokens.eos_id) if token is not None]
        assert [ids[0], ids[-1]][-len(frame) :] == frame
        assert family.control_in(ids[len(frame) - 1 : -1]) == []


def written_with(name: str) -> Trajectory:
    argument = name.replace("[", "").replace("]", "")
    search = Action(name=ActionName.SEARCH, argument=f"Elbe {argument}")
    finish = Action(name=ActionName.FINISH, argument="SUPPORTS")
    seen = f"The Elbe {name} flows."
    first = Step(thought=f"I look at Elbe {name} and then I read on.", action=search, observation=seen)
    return Trajectory(claim=f"{name} The Elbe is long.", steps=(first, Step(thought=name, action=finish)))


def served(coder: Encoder, trajectory: Trajectory) -> list[int]:
    """The ids as serving builds them up, atom by atom."""
    first, last = trajectory.steps
    seen = Segment(SegmentKind.OBSERVATION, f" {first.observation}", trained=False)
    observed = [TURN_END, build_header("Observation", 1), seen, TURN_END]
    written = [*render_turn(1, first.thought, first.action), *observed, *render_turn(2, last.thought, last.action), END]
    bos = [] if coder.tokens.bos_id is None else [coder.tokens.bos_id]
    return [
        *bos,
        *(
            token
            for atom in [*coder.form.render_instructions(trajectory.claim), *written]
            for token in coder.encode_segment(atom)
        ),
    ]


@pytest.mark.parametrize("name", ["llama-3", "qwen-2", "llama-2"])
def test_special_tokens_are_spelled_as_transformers_splits_them(name: str) -> None:
    family = load(FAMILIES[name]().to_str())
    family.plain.encode_special_tokens = True
    for token, entry in family.plain.get_added_tokens_decoder().items():
        ids = family.plain.encode(f"Elbe {entry.content} flows", add_special_tokens=False).ids
        assert token in ids or family.document.encode_document(f"Elbe {entry.content} flows")[-len(ids) :] == ids


@pytest.fixture
def chat() -> Family:
    return load(FAMILIES["qwen-2"]().to_str())


def test_a_template_writes_control_tokens_on_purpose_and_the_claim_in_it_does_not(chat: Family) -> None:
    coder = Encoder(chat.tokens, ReactFormat(template="<|im_start|>user\nClaim: {claim}<|im_end|>\n<think>"))
    ids = coder.encode(coder.form.render_prompt("It is <|im_end|> long.", ())).ids
    assert chat.control_in(ids) == ["<|im_start|>", "<|im_end|>", "<think>"]
    assert ids == coder.encode(coder.form.render_prompt("It is <|im_end|> long.", ())).ids


def test_an_answer_that_holds_an_unmarked_control_token_shows_it(chat: Family) -> None:
    ids = {name: token for token, name in chat.control.items()}
    assert chat.tokens.decode([ids["<tool_call>"], ids["<|im_end|>"]]) == "<tool_call>"


def test_added_words_that_are_no_control_tokens_stay_vocabulary() -> None:
    plain = FAMILIES["qwen-2"]()
    plain.add_tokens([AddedToken("   ", normalized=False), AddedToken("Veritune", normalized=False)])
    tokens = load_tokenization(plain.to_str().encode(), bos_id=None, eos_id=0)
    assert list(tokens.encode("Veritune")) == [plain.token_to_id("Veritune")]
    assert plain.token_to_id("   ") in tokens.encode("a   b")


def test_a_letter_that_the_vocabulary_lacks_is_unknown_and_no_control_token() -> None:
    plain = FAMILIES["unigram"]()
    tokens = load_tokenization(plain.to_str().encode(), bos_id=None, eos_id=2)
    unknown = plain.token_to_id("<unk>")
    assert list(tokens.encode("日本")) == [unknown]
    assert unknown not in tokens.encode("<unk>")
    assert plain.token_to_id("</s>") not in tokens.encode("＜/s＞"), "NFKC makes the wide brackets narrow"


def test_a_text_of_nothing_but_control_tokens_is_encoded_in_linear_time() -> None:
    tokens = load(FAMILIES["unigram"]().to_str()).tokens
    assert len(tokens.encode("</s>" * 20_000)) >= 20_000
