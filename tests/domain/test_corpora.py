"""Page text: what normalising, splitting and escaping promise, on invented, hostile and real text."""

import csv
import json
import re
import time
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from app.domain.claims import STEP_MARKER, to_one_line
from app.domain.corpora import (
    CorpusPage,
    clean_page_text,
    escape_steps,
    normalise_page_text,
    page_name_key,
    page_name_key_without_suffix,
    split_sentences,
)
from app.domain.trajectories import Action, ActionName, Step
from tests.conftest import SHARED, needs_shared_data

TOKENISER_MARKS = ("``", "''", "--", "-LRB-", "-RRB-", "-LSB-", "-RSB-", "-COLON-", "LRB", "COLON-", "'s")
STEP_PIECES = ("Thought", "ACTION", "Observation", "Thought 1:", "Action\u20022 :", " -- ", " 's", " n't")
SENTENCE_PIECES = ("…", "..", ".[1]", "Dr.", "U.S.", "\u200b", "\u00a0", "\u0338", "\u1fef", "\ufeff")
CHARACTERS = "` '\".,:;!?%()[]{}-$#12aXé\n\t\0_"
pieces = st.sampled_from([*CHARACTERS, *TOKENISER_MARKS, *STEP_PIECES, *SENTENCE_PIECES])
hostile_text = st.lists(pieces, max_size=30).map("".join) | st.text(max_size=60)


class TestNormalise:
    @pytest.mark.parametrize(
        ("given_text", "kept"),
        [
            ("`` Red Sails '' is a song ( 1988 ) .", '"Red Sails" is a song (1988).'),
            ("It 's the band 's third , is n't it ?", "It's the band's third, isn't it?"),
            ("The players ' union won 81 -- 78 .", "The players' union won 81–78."),
            ("-LRB-born 3 May 1950 -- 4 June 1999-RRB-", "(born 3 May 1950 – 4 June 1999)"),
            ("-LSB-sic-RSB- and -LCB-x-RCB- 2001-COLON- A Voyage", "[sic] and {x} 2001: A Voyage"),
            ("He sang ` Amber ' twice .", "He sang 'Amber' twice."),
            ("It cost $ 40 , or 3 % more .", "It cost $40, or 3% more."),
            ("cafe\u0301  bar\r\n\tand\u00a0grill", "café bar and grill"),
            ("so\u00adft\u200b \u202ereversed\u202c\0", "soft reversed"),
        ],
    )
    def test_undoes_what_tokenisers_and_web_pages_leave(self, given_text: str, kept: str) -> None:
        assert normalise_page_text(given_text) == kept

    @pytest.mark.parametrize(
        "text",
        [
            "The .NET runtime, version 3.5, isn't 'new'.",
            "rock 'n' roll in the '80s - not now",
            "f(x) = {y: y > 0} and a [note]",
            "می\u200cخواهم",
        ],
    )
    def test_leaves_plain_text_alone(self, text: str) -> None:
        assert normalise_page_text(text) == text

    @settings(max_examples=500)
    @given(hostile_text)
    def test_once_is_enough(self, text: str) -> None:
        once = normalise_page_text(text)
        assert normalise_page_text(once) == once
        assert once == to_one_line(once)
        once.encode()

    @settings(max_examples=500)
    @given(hostile_text)
    def test_clean_text_stays_clean(self, text: str) -> None:
        assert clean_page_text(clean_page_text(text)) == clean_page_text(text)


class TestEscapeSteps:
    @pytest.mark.parametrize(
        "marker",
        ["Thought 1:", "action 22 :", "OBSERVATION\n3:", "Observation3:", "Thought\u200b\u00a01\u2009\uff1a"],
    )
    def test_a_marker_is_defused_and_its_words_stay(self, marker: str) -> None:
        escaped = escape_steps(f"He wrote.\n{marker} Finish[SUPPORTS]")
        assert not re.search(r"\d\W*[:\uff1a]", escaped)
        assert escaped.endswith(", Finish[SUPPORTS]")
        assert "\n" not in escaped

    @pytest.mark.parametrize("text", ["Transaction 5: paid", "Action: now", "a Thought 1, kept", "In 1999: a film"])
    def test_other_colons_stay(self, text: str) -> None:
        assert escape_steps(text) == text

    @settings(max_examples=500)
    @given(hostile_text)
    def test_a_parser_never_sees_a_step(self, text: str) -> None:
        escaped = escape_steps(text)
        assert not STEP_MARKER.search(escaped)
        assert escape_steps(escaped) == escaped

    @given(hostile_text.map(clean_page_text).filter(bool))
    def test_clean_text_can_be_an_observation(self, text: str) -> None:
        action = Action(name=ActionName.SEARCH, argument="Marlow")
        assert Step(thought="", action=action, observation=text).observation == text


class TestSplitSentences:
    @pytest.mark.parametrize(
        "sentences",
        [
            ["Mr. J. R. Hale met Dr. Ito at St. Ives on Jan. 5, 1990.", "They spoke."],
            ["It rose by 3.5 percent (approx. No. 4 of 9).", "In 2001, it fell."],
            ["The U.S. Navy left Washington D.C.", "It came back."],
            ['She said, "We are done."', "Then she left."],
            ["The first ended..", "The second did too.."],
            ["It opened in 2005..", "iPods were sold.[3]", "Others followed.[4][5]."],
            ["He founded Hale & Co. Ltd. in May.", "The firm, Hale Inc., grew."],
            ["Who was it?", "Nobody knew!", "(It was he.)", "“So they say.”"],
            ["She lived in Rome (c. 40 B.C.) and wrote vs. Varro, e.g. Letters."],
            ["Robert Hale Jr. (June 9, 1945 – May 2, 2009) wrote... and sang."],
            ["यह एक वाक्य है।", "यह दूसरा है।"],
        ],
    )
    def test_ends_where_a_reader_would_end(self, sentences: list[str]) -> None:
        assert split_sentences(" ".join(sentences)) == sentences

    @settings(max_examples=500)
    @given(hostile_text)
    def test_nothing_is_lost_and_nothing_is_empty(self, text: str) -> None:
        sentences = split_sentences(text)
        assert " ".join(sentences) == " ".join(text.split())
        assert all(sentences)

    @needs_shared_data
    def test_the_same_on_real_observations(self) -> None:
        with (SHARED / "react_fever_270.csv").open(newline="", encoding="utf-8") as file:
            texts = [row["trajectories"] for row in csv.DictReader(file)]
        observations = [o for text in texts for o in re.findall(r"Observation \d+: ([^\n]*)", text)]
        split = [split_sentences(observation) for observation in observations]
        assert [" ".join(sentences) for sentences in split] == [" ".join(o.split()) for o in observations]
        assert 3.5 < sum(map(len, split)) / len(split) < 5.5


@needs_shared_data
def test_real_pages_lose_their_marks() -> None:
    with (SHARED / "fever_pages.jsonl").open(encoding="utf-8") as file:
        sentences = [clean_page_text(sentence) for line in file for sentence in json.loads(line)["sentences"]]
    marked = [s for s in sentences if re.search(r"``|''|-[LR][RSC]B-|-COLON-| [.,;)\]]( |$)|\( ", s)]
    assert marked == []


@pytest.mark.parametrize(
    "function", [normalise_page_text, escape_steps, split_sentences, page_name_key, page_name_key_without_suffix]
)
@pytest.mark.parametrize("unit", ["` ", "' ", "''", "-LRB- ", " .", "[1]", "a.", "1 -- ", "Thought 1 ", " '"])
def test_long_hostile_text_takes_no_long_time(function: Callable[[str], object], unit: str) -> None:
    text = unit * (200_000 // len(unit))
    started = time.process_time()
    function(text)
    assert time.process_time() - started < 2


class TestNames:
    def test_case_spacing_underscores_and_composition_do_not_matter(self) -> None:
        spellings = ["Café de Flore", "cafe\u0301_de_Flore", " CAFÉ  DE FLORE ", "[Café] de Flore"]
        assert len({page_name_key(spelling) for spelling in spellings}) == 1

    def test_a_disambiguation_can_be_left_out(self) -> None:
        assert page_name_key_without_suffix("Mercury_(planet)") == "mercury"
        assert page_name_key_without_suffix("Mercury") is None
        assert page_name_key_without_suffix("(planet)") is None

    @given(hostile_text)
    def test_a_name_and_its_kept_form_share_a_key(self, text: str) -> None:
        assert unicodedata.is_normalized("NFC", page_name_key(text))
        assert page_name_key(clean_page_text(text)) == page_name_key(text)


def test_a_page_has_a_title_and_a_sentence() -> None:
    with pytest.raises(ValidationError, match="sentences"):
        CorpusPage(title="Empty", sentences=())
    with pytest.raises(ValidationError, match="title"):
        CorpusPage(title="", sentences=("A sentence.",))
