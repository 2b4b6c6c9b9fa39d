"""The exact account of the real files: what was kept, repaired, warned and refused."""

from pathlib import Path

from app.domain.claims import Verdict
from app.domain.datasets import DatasetReport
from app.ingest import ingest
from tests.conftest import SHARED, needs_shared_data

pytestmark = needs_shared_data


def report(name: str, out: Path) -> DatasetReport:
    return ingest(SHARED / name, name, None, out).report


def outcome(account: DatasetReport) -> dict[str, int]:
    return {
        "read": account.rows_read,
        "kept": account.rows_kept,
        "repaired": account.rows_repaired,
        "warned": account.rows_warned,
        "refused": account.rows_refused,
    }


def test_the_users_csv(tmp_path: Path) -> None:
    account = report("react_fever_270.csv", tmp_path)
    assert account.format == "csv"
    assert outcome(account) == {"read": 270, "kept": 268, "repaired": 1, "warned": 2, "refused": 0}
    assert account.codes == {"duplicate": 2, "newline_folded": 1}
    assert account.labels == {Verdict.SUPPORTS: 128, Verdict.REFUTES: 87, Verdict.NOT_ENOUGH_INFO: 53}
    assert account.steps == {2: 223, 3: 28, 4: 10, 5: 3, 6: 2, 7: 2}
    assert account.findings_left_out == 0


def test_the_same_run_with_its_failures(tmp_path: Path) -> None:
    """500 episodes: 270 right ones (2 of them repeated), 221 that finished with another verdict, 9 without Finish.

    Of the 9, 7 stop behind an observation and take their label; one calls `Finish` five times over (line 4), one
    looks pages up `on different website` (line 116). 491 of the 500 end in the environment's own last word.
    """
    account = report("react_fever_500.jsonl", tmp_path)
    assert account.format == "jsonl"
    assert outcome(account) == {"read": 500, "kept": 275, "repaired": 275, "warned": 2, "refused": 223}
    assert account.codes == {
        "duplicate": 2,
        "episode_tail": 491,
        "extra_column": 2,
        "finish_missing_with_label": 8,
        "finish_not_last": 1,
        "newline_folded": 3,
        "unknown_action": 1,
        "verdict_mismatch": 221,
    }
    assert account.labels == {Verdict.SUPPORTS: 129, Verdict.REFUTES: 89, Verdict.NOT_ENOUGH_INFO: 57}
    assert account.steps == {2: 223, 3: 28, 4: 10, 5: 3, 6: 2, 7: 2, 8: 7}
    by_code = {found.code: found.line for found in account.findings if found.severity == "refused"}
    assert (by_code["finish_not_last"], by_code["unknown_action"]) == (4, 116)
    assert len(account.findings) + account.findings_left_out == sum(account.codes.values())


def test_the_trajectory_of_the_users_readme(tmp_path: Path) -> None:
    account = report("readme_example.txt", tmp_path)
    assert account.format == "text"
    assert outcome(account) == {"read": 1, "kept": 1, "repaired": 1, "warned": 0, "refused": 0}
    assert account.codes == {"finish_missing_with_label": 1, "label_prefix": 1, "stray_bracket": 1}
    assert account.labels[Verdict.SUPPORTS] == 1
