"""A .txt of trajectories, each with its claim before its label or its first step."""

from pathlib import Path

import pytest

from app.domain.claims import Verdict
from app.domain.errors import InvalidError
from tests.ingest.files import STEPS, found, read

ONE_LINE = STEPS.replace("\n", " ")


def claims(folder: Path, content: str) -> list[str]:
    report, kept = read(folder, content.encode(), "episodes.txt")
    assert report.format == "text"
    return [trajectory.claim for trajectory in kept]


@pytest.mark.parametrize(
    "content",
    [
        f"### One. Label: SUPPORTS {ONE_LINE}\n### Two. {ONE_LINE}\n",
        f"One. Label: SUPPORTS {ONE_LINE}\nTwo. {ONE_LINE}",
        f"One. {ONE_LINE}\n\nTwo. {ONE_LINE}\n\n",
        f"### One.\nLabel: SUPPORTS\n{STEPS}\n### Two.\n{STEPS}",
        f"Claim: One.\n{STEPS}\nClaim: Two.\nLabel: SUPPORTS\n{STEPS}",
        f"One.\n\n{STEPS}\n\nTwo.\n\n{STEPS}\n",
        f"One.\n{STEPS}".replace("\nAction", "\n\nAction") + f"\n\nTwo.\n{STEPS}",
    ],
)
def test_where_one_trajectory_ends_the_next_begins(tmp_path: Path, content: str) -> None:
    assert claims(tmp_path, content) == ["One.", "Two."]


def test_a_trajectory_without_an_ending_takes_its_label(tmp_path: Path) -> None:
    content = "### One. Label: REFUTES Thought 1: Look. Action 1: Search[Ada] Observation 1: It. Thought 2: No.]"
    report, kept = read(tmp_path, content.encode(), "readme.txt")
    assert kept[0].verdict is Verdict.REFUTES
    assert kept[0].steps[-1].thought == "No."
    assert report.codes == {"finish_missing_with_label": 1, "label_prefix": 1, "stray_bracket": 1}


def test_each_trajectory_is_named_by_the_line_where_it_begins(tmp_path: Path) -> None:
    content = f"### One.\n{STEPS}\n\n### Two.\nnothing\n\n### Thr\xe9e.\n{STEPS}".encode("latin-1")
    report, _ = read(tmp_path, content + b"\n\n### " + b"x" * 3_000, "a.txt", row_bytes=2_000)
    assert found(report) == [(8, "missing_trajectory"), (11, "bad_utf8"), (18, "line_too_long")]


def test_a_trajectory_needs_a_claim(tmp_path: Path) -> None:
    with pytest.raises(InvalidError, match="missing_claim: 1"):
        read(tmp_path, STEPS.encode(), "a.txt")


def test_the_columns_of_other_formats_do_no_harm(tmp_path: Path) -> None:
    mapping = {"claim": "statement", "trajectories": "trace"}
    assert read(tmp_path, f"One. {STEPS}".encode(), "a.txt", columns=mapping)[0].rows_kept == 1
