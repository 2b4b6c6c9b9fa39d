"""A tokenizer.json becomes an encode that treats its text as mid-document, whatever its family."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from app.domain.encoding import Tokenization
from app.tokenizers import load_tokenization

TEXT = [
    "Thought 1: I look up the Danube.\n",
    "Action 1: Search[Danube]\n",
    "Finish[NOT ENOUGH INFO]",
    "REFUTES SUPPORTS",
]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=350, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def dummy_prefix() -> Tokenizer:
    """As SentencePiece does it: a space before the text, spaces as ▁, bytes where nothing else fits."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([line.replace("\n", "") for line in TEXT], trainer)
    document = json.loads(tokenizer.to_str())
    # The trainer knows no byte tokens but special ones, which decoding would leave out.
    document["added_tokens"] = document["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(document))


FAMILIES = {"byte-level": byte_level, "dummy-prefix": dummy_prefix}


@pytest.fixture(scope="module", params=FAMILIES)
def tokens(request: pytest.FixtureRequest) -> Tokenization:
    tokenizer = FAMILIES[request.param]()
    return load_tokenization(tokenizer.to_str().encode(), bos_id=None, eos_id=0)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1))
def test_what_is_encoded_decodes_to_itself(tokens: Tokenization, text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text


@pytest.mark.parametrize("text", [" I look up", "Danube", "]", "\n", " Search[", "NOT ENOUGH INFO"])
def test_an_atom_decodes_alone_to_just_its_text(tokens: Tokenization, text: str) -> None:
    assert tokens.decode(tokens.encode(text)) == text


def test_an_argument_gets_no_space_before_it() -> None:
    plain = dummy_prefix()
    tokens = load_tokenization(plain.to_str().encode(), bos_id=1, eos_id=2)
    assert list(plain.encode("Danube", add_special_tokens=False).ids) != list(tokens.encode("Danube"))
    whole = tokens.decode([*tokens.encode(" Search["), *tokens.encode("Danube"), *tokens.encode("]")])
    assert whole == " Search[Danube]"


def test_what_is_no_tokenizer_is_said_so() -> None:
    with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
        load_tokenization(b"{}", bos_id=None, eos_id=0)
