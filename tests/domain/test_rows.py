"""Parsing one row: repairs, refusals and their messages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.claims import Verdict
from app.domain.datasets import SEVERITY_BY_CODE, Columns, Severity, SourceRow
from app.domain.rows import RowResult, read_row
from app.domain.trajectories import Trajectory
from tests.domain.strategies import steps_text, trajectories

CLAIM = "Ada wrote a program."
SEEN = "Thought 1: Look. Action 1: Search[Ada] Observation 1: Ada wrote it. "
GOOD = SEEN + "Thought 2: Yes. Action 2: Finish[SUPPORTS]"


def read(**fields: object) -> RowResult:
    return read_row(SourceRow(7, {"claim": CLAIM, **fields}), Columns())


def text(written: str, label: object = None) -> RowResult:
    return read(trajectories=written, label=label)


def codes(reading: RowResult) -> list[str]:
    return [found.code for found in reading.findings]


def kept(reading: RowResult) -> Trajectory:
    assert reading.trajectory is not None, reading.findings
    return reading.trajectory


def test_a_good_row_has_no_findings() -> None:
    reading = text(GOOD, "SUPPORTS")
    assert steps_text(kept(reading).steps) == (
        "Thought 1: Look.\nAction 1: Search[Ada]\nObservation 1: Ada wrote it.\n"
        "Thought 2: Yes.\nAction 2: Finish[SUPPORTS]"
    )
    assert (reading.findings, reading.label, reading.source) == ((), Verdict.SUPPORTS, "trajectories")


def test_the_verdict_comes_from_finish_then_the_label_column_then_the_prefix() -> None:
    assert kept(text(GOOD)).verdict is Verdict.SUPPORTS
    assert kept(text(SEEN, "REFUTES")).verdict is Verdict.REFUTES
    assert kept(text("Label: NOT ENOUGH INFO " + SEEN)).verdict is Verdict.NOT_ENOUGH_INFO


@pytest.mark.parametrize(
    ("written", "label", "code", "ending"),
    [
        (SEEN, "REFUTES", "finish_missing_with_label", ("", "Finish[REFUTES]")),
        (SEEN + "Thought 2: So.", "REFUTES", "finish_missing_with_label", ("So.", "Finish[REFUTES]")),
        (SEEN + "Thought 2: So. Action 2: Finish[DONE]", "REFUTES", "finish_done", ("So.", "Finish[REFUTES]")),
        (SEEN + "Thought 2: So. Action 2: Finish[]", "REFUTES", "finish_done", ("So.", "Finish[REFUTES]")),
        (SEEN + "Thought 2: So. Action 2: Finish", "REFUTES", "finish_done", ("So.", "Finish[REFUTES]")),
        ("Label: SUPPORTS " + GOOD, None, "label_prefix", ("Yes.", "Finish[SUPPORTS]")),
        ("Please judge. " + GOOD, None, "preamble_dropped", ("Yes.", "Finish[SUPPORTS]")),
        (GOOD + " Observation 2: Episode finished, reward = 1\n", None, "episode_tail", None),
        (GOOD + " Observation 2: ", None, "episode_tail", None),
        (GOOD.replace("Ada wrote it.", "Ada\nwrote it."), None, "newline_folded", None),
        (GOOD.replace("[SUPPORTS]", "[supported]"), None, "verdict_spelling", None),
        (GOOD, "Supports", "verdict_spelling", None),
    ],
)
def test_a_repair_is_made_and_reported(
    written: str, label: str | None, code: str, ending: tuple[str, str] | None
) -> None:
    reading = text(written, label)
    thought, action = ending or ("Yes.", "Finish[SUPPORTS]")
    last = kept(reading).steps[-1]
    assert (last.thought, str(last.action)) == (thought, action)
    assert kept(reading).steps[0].observation == "Ada wrote it."
    assert codes(reading) == [code]
    assert reading.findings[0].severity is Severity.REPAIRED
    assert reading.findings[0].line == 7


def test_a_bracket_that_nothing_opened_is_left_out_of_a_last_thought() -> None:
    reading = text(SEEN + "Thought 2: So [it] is.]", "SUPPORTS")
    assert kept(reading).steps[-1].thought == "So [it] is."
    assert codes(reading) == ["finish_missing_with_label", "stray_bracket"]
    assert kept(text(SEEN + "Thought 2: So [it is]", "SUPPORTS")).steps[-1].thought == "So [it is]"


def test_the_claim_before_the_label_is_no_preamble() -> None:
    assert codes(text(f"### {CLAIM} Label: SUPPORTS {GOOD}")) == ["label_prefix"]
    assert codes(text(f"Claim: {CLAIM}\n{GOOD}")) == []


@pytest.mark.parametrize(
    ("written", "label", "code"),
    [
        ("", None, "missing_trajectory"),
        (" \n", None, "missing_trajectory"),
        (3.5, None, "missing_trajectory"),
        ("It is so.", "SUPPORTS", "no_steps"),
        (SEEN, None, "no_verdict"),
        (SEEN + "Thought 2: So.", None, "no_verdict"),
        (SEEN + "Thought 2: So. Action 2: Finish[DONE]", None, "no_verdict"),
        (GOOD, "REFUTES", "verdict_mismatch"),
        ("Label: REFUTES " + GOOD, None, "verdict_mismatch"),
        ("Label: REFUTES " + SEEN, "SUPPORTS", "verdict_mismatch"),
        (SEEN, "maybe", "no_verdict"),
        (SEEN, 1, "no_verdict"),
        ("Label: maybe " + SEEN, None, "no_verdict"),
        ("Thought 1: Look. " + GOOD, None, "step_without_action"),
        ("Thought 1: Look. Observation 1: It. " + GOOD, None, "step_without_action"),
        ("Thought 1: Look. Observation 1: It.", "SUPPORTS", "step_without_action"),
        ("Action 1: " + GOOD, None, "step_without_action"),
        (GOOD.replace("Search[Ada]", "Login"), None, "unknown_action"),
        (GOOD.replace("Search[Ada]", "Search[Ada] again"), None, "unknown_action"),
        (GOOD.replace("Search[Ada]", "Search[]"), None, "bad_argument"),
        (GOOD.replace("Search[Ada]", "Search[a [b]]"), None, "bad_argument"),
        (GOOD.replace("Ada wrote it.", ""), None, "empty_observation"),
        ("Thought 1: Look. Action 1: Search[Ada]", "SUPPORTS", "empty_observation"),
        (GOOD + " Observation 2: Invalid action", None, "finish_not_last"),
        (GOOD + " Thought 3: More.", "SUPPORTS", "finish_not_last"),
        (GOOD + " Action 3: Finish[SUPPORTS]", None, "finish_not_last"),
        (GOOD.replace("Yes", "Y\0s"), None, "forbidden_character"),
        (GOOD.replace("Yes", "Y\ud800s"), None, "forbidden_character"),
    ],
)
def test_a_row_is_refused_for_one_reason_with_a_way_out(written: object, label: object, code: str) -> None:
    reading = read(trajectories=written, label=label)
    assert reading.trajectory is None
    refused = [found for found in reading.findings if found.severity is Severity.REFUSED]
    assert [found.code for found in refused] == [code]
    assert len(refused[0].message) > 15
    refused[0].message.encode()


@pytest.mark.parametrize(
    ("claim", "code"),
    [
        (None, "missing_claim"),
        ("", "missing_claim"),
        (" ", "missing_claim"),
        (5, "bad_claim"),
        ("x" * 20_000, "bad_claim"),
        ("Observation 1: x Finish[SUPPORTS]", "bad_claim"),
        ("a\0", "forbidden_character"),
    ],
)
def test_a_row_with_a_bad_claim_is_refused(claim: object, code: str) -> None:
    assert codes(read(claim=claim, trajectories=GOOD)) == [code]


def test_columns_may_have_other_names() -> None:
    columns = Columns(claim="statement", trajectories="trace", label="gold")
    row = SourceRow(1, {"statement": CLAIM, "trace": SEEN, "gold": "REFUTES", "label": "x"})
    reading = read_row(row, columns)
    assert (kept(reading).verdict, reading.source) == (Verdict.REFUTES, "trace")


# --- structured steps ----------------------------------------------------------------------

STEPS: list[dict[str, object]] = [
    {"thought": "Look.", "action": "Search[Ada]", "observation": "Ada wrote it."},
    {"thought": "Yes.", "action": {"name": "Finish", "argument": "SUPPORTS"}, "observation": None},
]


def test_structured_steps_and_evidence_are_read() -> None:
    reading = read(steps=STEPS, evidence=[["Ada", 3], {"page": "Engine", "sentence": 0}])
    assert kept(reading).steps == kept(text(GOOD)).steps
    assert [(e.page, e.sentence) for e in kept(reading).evidence] == [("Ada", 3), ("Engine", 0)]
    assert (reading.findings, reading.source) == ((), "steps")


def test_a_trajectories_column_may_hold_steps_too() -> None:
    assert kept(read(trajectories=STEPS)).steps == kept(text(GOOD)).steps


def test_a_column_that_happens_to_be_called_steps_is_not_read() -> None:
    assert read(trajectories=GOOD, steps=2).source == "trajectories"


def test_unknown_keys_of_a_step_are_reported() -> None:
    reading = read(steps=[STEPS[0] | {"score": 1}, STEPS[1]])
    assert kept(reading)
    assert codes(reading) == ["extra_key"]
    assert "'score'" in reading.findings[0].message


@pytest.mark.parametrize(
    ("steps", "code"),
    [
        ([], "no_steps"),
        (["x"], "bad_step"),
        ([STEPS[0] | {"thought": 3}, STEPS[1]], "bad_step"),
        ([STEPS[0] | {"action": {"name": "Search"}}, STEPS[1]], "bad_step"),
        ([STEPS[0] | {"observation": "x Action 1: y"}, STEPS[1]], "bad_step"),
        ([STEPS[0] | {"observation": b"\xff"}, STEPS[1]], "bad_step"),
        ([STEPS[0] | {"observation": "a\ud800"}, STEPS[1]], "forbidden_character"),
        ([{"thought": "Hm."}, STEPS[1]], "step_without_action"),
        ([STEPS[1], STEPS[0]], "no_verdict"),
        ([STEPS[1], STEPS[1]], "finish_not_last"),
    ],
)
def test_a_row_with_bad_steps_is_refused(steps: list[object], code: str) -> None:
    reading = read(steps=steps)
    assert reading.trajectory is None
    assert codes(reading) == [code]


@pytest.mark.parametrize(
    "evidence",
    [
        3,
        {"page": "Ada"},
        ["Ada"],
        [["Ada"]],
        [["Ada", -1]],
        [["Ada", True]],
        [["", 1]],
        [["Ada", "one"]],
        [["Ada", 1.5]],
        [["Ada", 10**30]],
        [["Ada", "9" * 5_000]],
        [["A\ud800", 1]],
        [[{}, {}, "Ada", 3]],
        [[[[[["Ada", 3]]]]]],
    ],
)
def test_bad_evidence_is_a_warning(evidence: object) -> None:
    reading = read(steps=STEPS, evidence=evidence)
    assert codes(reading) == ["bad_evidence"]
    assert kept(reading).evidence == ()


@pytest.mark.parametrize(
    ("evidence", "read_as"),
    [
        ([[[101, 202, "Elbe", 0]]], [("Elbe", 0)]),
        (
            [[[101, 202, "Elbe", 0], [101, 203, "Rhine", 4]], [[102, 204, "Oder", 1]]],
            [("Elbe", 0), ("Rhine", 4), ("Oder", 1)],
        ),
        ([[[101, None, None, None]]], []),
        ([["101", "202", "Elbe", "0"]], [("Elbe", 0)]),
        ([[["Elbe", 0]], None], [("Elbe", 0)]),
        (["Elbe", 0.0], [("Elbe", 0)]),
        ([{"page": "Elbe", "sentence": "2"}], [("Elbe", 2)]),
    ],
)
def test_evidence_is_read_as_datasets_nest_it(evidence: object, read_as: list[tuple[str, int]]) -> None:
    reading = read(steps=STEPS, evidence=evidence)
    assert [(item.page, item.sentence) for item in kept(reading).evidence] == read_as
    assert codes(reading) == []


def test_good_evidence_stays_if_other_evidence_is_bad() -> None:
    reading = read(steps=STEPS, evidence=[["Elbe", 0], 7, {"page": "Rhine"}])
    assert [item.page for item in kept(reading).evidence] == ["Elbe"]
    assert "2 items" in reading.findings[0].message


@pytest.mark.parametrize("label", ["maybe", "nan", 1, 10**400, float("nan"), True, [], {"x": 1}, "a\ud800"])
def test_a_label_of_another_kind_is_warned_of_and_finish_decides(label: object) -> None:
    reading = read(trajectories=GOOD, label=label)
    assert kept(reading).verdict is Verdict.SUPPORTS
    assert codes(reading) == ["bad_label"]
    reading.findings[0].message.encode()


def test_a_label_before_the_first_step_that_is_none_is_warned_of() -> None:
    reading = read(trajectories="Label: maybe " + GOOD)
    assert kept(reading).verdict is Verdict.SUPPORTS
    assert codes(reading) == ["bad_label"]


def test_a_label_in_a_list_of_one_is_read() -> None:
    assert kept(read(trajectories=SEEN, label=["REFUTES"])).verdict is Verdict.REFUTES
    assert codes(read(trajectories=GOOD, label=["REFUTES"])) == ["verdict_mismatch"]


def test_a_claim_column_of_another_kind_leaves_the_chats_own_claim() -> None:
    reading = chat(("user", CLAIM), ("assistant", GOOD), claim=7)
    assert kept(reading).claim == CLAIM
    assert codes(reading) == ["claim_column_unread"]


def test_evidence_that_is_a_text_is_another_kind_of_column() -> None:
    assert kept(read(trajectories=GOOD, evidence="Ada wrote it.")).evidence == ()


@pytest.mark.parametrize("name", ["<|im_end|>", "<|endoftext|>", "</s>", "[INST]", "<end_of_turn>"])
def test_a_control_token_in_a_row_is_text_and_said_to_be(name: str) -> None:
    thought = text(GOOD.replace("Look.", f"I look at Elbe {name} and then I read on."))
    seen = text(GOOD.replace("Ada wrote it.", f"Ada wrote it.{name}"))
    claim = read(trajectories=GOOD, claim=f"{CLAIM} {name}")
    assert kept(thought).steps[0].thought == f"I look at Elbe {name} and then I read on."
    for reading, where in ((thought, "step 1"), (seen, "step 1"), (claim, "the claim")):
        assert codes(reading) == ["control_token_text"]
        assert f"{where} holds {name!r}" in reading.findings[0].message


@pytest.mark.parametrize("text_", ["a < b and c > d", "if |x| <| y |>", "see [1] and <b>", "<s"])
def test_brackets_that_name_no_control_token_are_not_worth_a_finding(text_: str) -> None:
    assert codes(text(GOOD.replace("Look.", text_))) == []


UNSEEN = ["\u200b", "\ufeff", "\u3164", "\u2800\u00ad\u2060", "\U000e0020 \u034f"]


@pytest.mark.parametrize("unseen", UNSEEN)
def test_an_invisible_text_is_empty(unseen: str) -> None:
    assert codes(read(trajectories=GOOD, claim=unseen)) == ["missing_claim"]
    assert codes(chat(("user", unseen), ("assistant", GOOD))) == ["missing_claim"]
    assert codes(text(unseen)) == ["missing_trajectory"]
    assert codes(text(GOOD.replace("Ada wrote it.", unseen))) == ["empty_observation"]
    assert codes(text(GOOD.replace("Search[Ada]", f"Search[{unseen}]"))) == ["bad_argument"]
    assert codes(text(GOOD.replace("Search[Ada]", unseen))) == ["step_without_action"]
    assert kept(text(GOOD.replace("Look.", unseen))).steps[0].thought == ""
    assert kept(text(GOOD, unseen)).verdict is Verdict.SUPPORTS
    assert kept(chat(("user", CLAIM), ("assistant", GOOD), claim=unseen)).claim == CLAIM


def test_an_invisible_character_between_letters_stays() -> None:
    claim = "می‌خواهم 👩‍🔬 it\u200b is."
    assert kept(read(trajectories=GOOD, claim=claim)).claim == claim


# --- chat ----------------------------------------------------------------------------------


def chat(*messages: tuple[str, object], **fields: object) -> RowResult:
    row = {"messages": [{"role": role, "content": content} for role, content in messages], **fields}
    return read_row(SourceRow(1, row), Columns())


def test_a_chat_is_read_with_its_claim_and_its_observations() -> None:
    reading = chat(
        ("system", "You judge claims."),
        ("user", f"Judge the claim below.\nClaim: {CLAIM}\nBe brief."),
        ("assistant", "Thought 1: Look.\nAction 1: Search[Ada]"),
        ("user", "Ada wrote it."),
        ("assistant", [{"type": "text", "text": "Thought 2: Yes.\nAction 2: Finish[SUPPORTS]"}]),
    )
    assert kept(reading) == kept(text(GOOD))
    assert (reading.findings, reading.source) == ((), "messages")


def test_an_observation_that_names_itself_is_not_named_twice() -> None:
    reading = chat(
        ("user", CLAIM),
        ("assistant", "Thought 1: Look.\nAction 1: Search[Ada]"),
        ("tool", "Observation 1: Ada wrote it."),
        ("assistant", "Thought 2: Yes.\nAction 2: Finish[SUPPORTS]"),
    )
    assert kept(reading) == kept(text(GOOD))


def test_a_chat_of_one_answer_is_read() -> None:
    assert kept(chat(("user", CLAIM), ("assistant", GOOD))) == kept(text(GOOD))


def test_a_chat_may_have_a_claim_and_a_label_of_its_own() -> None:
    reading = chat(("user", "Go."), ("assistant", SEEN), claim=CLAIM, label="REFUTES")
    assert (kept(reading).claim, kept(reading).verdict) == (CLAIM, Verdict.REFUTES)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([("assistant", GOOD)], "missing_claim"),
        ([("user", CLAIM)], "no_steps"),
        ([("user", CLAIM), ("assistant", None)], "bad_messages"),
        ([("user", CLAIM), ("assistant", [{"type": "image"}])], "bad_messages"),
        ([("user", CLAIM), (3, GOOD)], "bad_messages"),
        ([("user", "x\0"), ("assistant", GOOD)], "forbidden_character"),
    ],
)
def test_a_row_with_a_bad_chat_is_refused(messages: list[tuple[str, object]], code: str) -> None:
    assert codes(chat(*messages)) == [code]


ANSWER = ("assistant", GOOD)


@pytest.mark.parametrize(
    ("before", "findings"),
    [
        ([("developer", "Use Search and Finish."), ("user", f"Claim: {CLAIM}")], []),
        ([("System", "Claim: what you get. Use Search."), ("user", f"Claim: {CLAIM}")], []),
        ([("developer", "Use Search and Finish."), ("user", CLAIM)], []),
        ([("system", f"Judge.\nClaim: {CLAIM}")], []),
        ([("user", "Use Search and Finish."), ("user", f"Claim: {CLAIM}")], ["claim_passed_over"]),
        ([("user", f"Claim: {CLAIM}"), ("user", "Be brief.")], ["claim_passed_over"]),
        ([("user", f"An example.\nClaim: Bo sang.\nFinish[REFUTES]\nClaim: {CLAIM}")], ["claim_passed_over"]),
        ([("user", "Claim: Bo sang."), ("user", f"Claim: {CLAIM}")], ["claim_passed_over"]),
        ([("user", f"Claim: {CLAIM}"), ("user", f"Claim: {CLAIM}")], []),
        ([("user", f"**Claim:** {CLAIM}")], []),
        ([("user", f"**Claim**: {CLAIM}")], []),
        ([("user", f"**Claim: {CLAIM}**")], []),
        ([("user", f"### Claim:\n\n{CLAIM}\n\nBe brief.")], []),
        ([("user", f"Claim: **{CLAIM}**")], []),
        ([("user", f"__Claim:__ {CLAIM}")], []),
        ([("user", f"claim: {CLAIM}\nJudge the claim: search first.")], []),
        ([("user", f"CLAIM: {CLAIM}")], []),
    ],
)
def test_the_claim_of_a_chat_is_the_last_that_a_user_names(
    before: list[tuple[str, object]], findings: list[str]
) -> None:
    reading = chat(*before, ANSWER)
    assert kept(reading).claim == CLAIM
    assert codes(reading) == findings


@pytest.mark.parametrize("claim", ["*Ada* wrote a *program*.", "Ada wrote 2 * 3.", "snake_case_ is _it_."])
def test_markdown_within_a_claim_is_its_own(claim: str) -> None:
    assert kept(chat(("user", f"**Claim:** {claim}"), ANSWER)).claim == claim
    assert kept(chat(("user", f"Claim: {claim}"), ANSWER)).claim == claim


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([("user", "Use Search and Finish."), ("user", CLAIM), ANSWER], "messages 1 and 2"),
        ([("system", "Claim: Bo sang."), ("user", CLAIM), ANSWER], "messages 1 and 2"),
        ([("user", f"Claim: Bo sang. Finish[REFUTES]. Claim: {CLAIM}"), ANSWER], "one line names two claims"),
        ([("user", CLAIM), ("assistant", SEEN), ("user", "**Claim:** Bo sang."), ANSWER], "message 3"),
    ],
)
def test_two_claims_in_a_chat_refuse_its_row_and_name_both(messages: list[tuple[str, object]], said: str) -> None:
    reading = chat(*messages)
    assert codes(reading) == ["ambiguous_claim"]
    assert said in reading.findings[0].message


def test_the_claim_column_settles_which_claim_a_chat_is_about() -> None:
    example = ("user", "Claim: Bo sang.")
    assert codes(chat(("user", "Go."), ("user", "Now."), ANSWER, claim=CLAIM)) == []
    assert codes(chat(example, ("user", f"Claim: {CLAIM}"), ANSWER, claim=CLAIM)) == ["claim_passed_over"]
    assert kept(chat(example, ANSWER, claim=CLAIM)).claim == CLAIM
    assert codes(chat(("user", "Go."), ("user", "Now."), ANSWER, claim=7)) == ["claim_column_unread", "ambiguous_claim"]


@pytest.mark.parametrize(
    "turns",
    [
        ["Thought: Look.\nAction: Search[Ada]", "Ada wrote it.", "Thought: Yes.\nAction: Finish[SUPPORTS]"],
        ["Thought: Look. Action: Search[Ada]", "Observation: Ada wrote it.", "Thought: Yes. Action: Finish[SUPPORTS]"],
        ["Thought:\nLook.\n\nAction:\nSearch[Ada]", "Observation:\nAda wrote it.", "Yes. Action: Finish[SUPPORTS]"],
        [
            "**Thought:** Look.\n**Action:** Search[Ada]",
            "**Observation:** Ada wrote it.",
            "Thought: Yes.\nAction: Finish[SUPPORTS]",
        ],
    ],
)
def test_turns_without_numbers_are_read(turns: list[str]) -> None:
    roles = ("assistant", "tool", "assistant")
    reading = chat(("user", CLAIM), *zip(roles, turns, strict=True))
    assert kept(reading).steps[0] == kept(text(GOOD)).steps[0]
    assert str(kept(reading).steps[-1].action) == "Finish[SUPPORTS]"
    assert "markers_numbered" in codes(reading)


def test_a_text_without_numbers_is_read() -> None:
    written = "Thought: Look.\nAction: Search[Ada]\nObservation: Ada wrote it.\nThought: Yes.\nAction: Finish[SUPPORTS]"
    for shape in (written, written.replace("\n", " ")):
        assert kept(text(shape)) == kept(text(GOOD))
        assert codes(text(shape)) == ["markers_numbered"]


@pytest.mark.parametrize("marker", ["**Thought 1:**", "**Thought 1**:", "*Thought 1:*", "### Thought 1:"])
def test_markdown_around_a_marker_is_no_part_of_a_step(marker: str) -> None:
    written = GOOD.replace("Thought 1:", marker).replace("Thought 2:", "\n" + marker.replace("1", "2"))
    reading = text(written)
    assert kept(reading) == kept(text(GOOD))
    assert codes(reading) == ["markup_removed"]


def test_what_an_assistant_says_behind_an_observation_is_no_part_of_it() -> None:
    opening = [("user", CLAIM), ("assistant", "Thought 1: Look.\nAction 1: Search[Ada]"), ("tool", "Ada wrote it.")]
    ended = chat(*opening, ("assistant", "So it is."), label="SUPPORTS")
    assert [step.observation for step in kept(ended).steps] == ["Ada wrote it.", None]
    assert kept(ended).steps[-1].thought == "So it is."
    opened = chat(*opening, ("assistant", "Well.\nThought 2: Yes.\nAction 2: Finish[SUPPORTS]"))
    assert (kept(opened), codes(opened)) == (kept(text(GOOD)), ["preamble_dropped"])


def test_a_system_message_between_steps_is_passed_over_and_said_to_be() -> None:
    reading = chat(
        ("user", CLAIM),
        ("assistant", "Thought 1: Look.\nAction 1: Search[Ada]"),
        ("tool", "Ada wrote it."),
        ("developer", "Hurry."),
        ("assistant", "Thought 2: Yes.\nAction 2: Finish[SUPPORTS]"),
    )
    assert (kept(reading), codes(reading)) == (kept(text(GOOD)), ["message_passed_over"])


# --- anything at all -----------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
_PARTS = st.sampled_from(
    ["Thought 1:", "Action 1:", "Observation 1:", "Label:", "Search[x]", "Finish[SUPPORTS]", "[", "]", "\n", "x"]
)
_TEXT = st.lists(_PARTS | st.text(max_size=4), max_size=12).map(" ".join)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "claim": _JSON | st.just(CLAIM),
            "trajectories": _TEXT | _JSON | st.just(GOOD),
            "label": st.sampled_from(["SUPPORTS", "", None]) | _JSON,
            "steps": _JSON | st.lists(st.dictionaries(st.sampled_from(["thought", "action"]), _TEXT), max_size=2),
            "messages": _JSON,
            "evidence": _JSON,
        },
    )
)
def test_no_row_whatever_raises_and_a_lost_row_says_why(fields: dict[str, object]) -> None:
    reading = read_row(SourceRow(1, fields), Columns())
    refused = [found for found in reading.findings if found.severity is Severity.REFUSED]
    assert len(refused) == (reading.trajectory is None)
    for found in reading.findings:
        assert SEVERITY_BY_CODE[found.code] is found.severity
        found.message.encode()


@given(trajectories(), st.sampled_from([" ", "\n", "\r\n", "\n\n  "]))
def test_white_space_between_steps_makes_no_difference(trajectory: Trajectory, gap: str) -> None:
    written = gap.join(steps_text(trajectory.steps).split("\n"))
    reading = read_row(SourceRow(1, {"claim": trajectory.claim, "trajectories": written}), Columns())
    assert kept(reading).steps == trajectory.steps
