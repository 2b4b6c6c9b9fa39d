"""The canonical row, its exact inverse, and the table of codes."""

import json

import pytest
from hypothesis import given
from pydantic import ValidationError

from app.domain.datasets import (
    CODE_MEANINGS,
    SEVERITY_BY_CODE,
    Severity,
    build_finding,
    canonical_line,
    read_canonical,
)
from app.domain.splits import SplitName
from app.domain.trajectories import Action, ActionName, Evidence, Step, Trajectory
from tests.domain.strategies import trajectories

EXAMPLE = Trajectory(
    claim="Zoë wrote it.",
    steps=(
        Step(thought="Hm.", action=Action(name=ActionName.SEARCH, argument="Zoë"), observation='She "wrote" it.'),
        Step(thought="", action=Action(name=ActionName.FINISH, argument="NOT ENOUGH INFO")),
    ),
    evidence=(Evidence(page="Zoë", sentence=0),),
)


def test_a_canonical_line_is_compact_sorted_utf8_json() -> None:
    assert canonical_line(EXAMPLE).decode() == (
        '{"claim":"Zoë wrote it.","evidence":[["Zoë",0]],"label":"NOT ENOUGH INFO","steps":['
        '{"action":"Search[Zoë]","observation":"She \\"wrote\\" it.","thought":"Hm."},'
        '{"action":"Finish[NOT ENOUGH INFO]","observation":null,"thought":""}]}\n'
    )


def test_only_a_row_with_a_split_says_so() -> None:
    """Datasets without one keep their digests."""
    assert b"split" not in canonical_line(EXAMPLE)
    line = canonical_line(EXAMPLE.model_copy(update={"split": SplitName.TEST}))
    assert line.endswith(b'"split":"test","steps":' + canonical_line(EXAMPLE).split(b'"steps":')[1])
    assert read_canonical(line).split is SplitName.TEST


@given(trajectories())
def test_a_canonical_line_is_read_back_exactly(trajectory: Trajectory) -> None:
    line = canonical_line(trajectory)
    assert line.count(b"\n") == 1
    assert read_canonical(line) == trajectory
    assert canonical_line(read_canonical(line)) == line


def test_a_line_whose_label_is_not_its_verdict_was_not_written_here() -> None:
    row = json.loads(canonical_line(EXAMPLE)) | {"label": "SUPPORTS"}
    with pytest.raises(ValueError, match="SUPPORTS"):
        read_canonical(json.dumps(row).encode())


@pytest.mark.parametrize("line", [b"", b"{}", b"[]", b'{"claim": "x"}'])
def test_a_line_of_another_kind_is_an_error(line: bytes) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        read_canonical(line)


def test_every_code_has_one_severity_and_one_meaning() -> None:
    assert SEVERITY_BY_CODE.keys() == CODE_MEANINGS.keys()
    assert build_finding(3, "bad_utf8", "x").severity is Severity.REFUSED
    assert SEVERITY_BY_CODE["duplicate"] is Severity.WARNED
    assert SEVERITY_BY_CODE["episode_tail"] is Severity.REPAIRED
    with pytest.raises(KeyError):
        build_finding(3, "no_such_code", "x")


def test_a_finding_is_frozen() -> None:
    with pytest.raises(ValidationError):
        build_finding(3, "bad_utf8", "x").line = 4  # type: ignore[misc]
