"""A dataset's parts in plans: counted apart, drawn by seed and row, or as a column says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services
from app.domain.attempts import EncodedRow
from app.domain.errors import InvalidError
from app.domain.splits import SplitName
from app.services.plans import Prepared
from tests.conftest import dataset_jsonl

ROWS = 40
Prepare = Callable[..., Prepared]


def upload(services: Services, folder: Path, name: str, parts: list[object] | None = None) -> None:
    """A dataset of forty rows, with a column `split` where `parts` are given."""
    rows = [json.loads(line) for line in dataset_jsonl(ROWS).splitlines()]
    for row, part in zip(rows, parts or [], strict=False):
        row["split"] = part
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    services.datasets.create(path, path.name, None, name, {})


@pytest.fixture
def prepare(services: Services, tmp_path: Path) -> Prepare:
    upload(services, tmp_path, "rows")
    upload(services, tmp_path, "parted", [number % 4 and number % 4 - 1 for number in range(ROWS)])

    def one(dataset: str = "rows", split: dict[str, Any] | None = None, **spec: Any) -> Prepared:
        preprocessing = {"preprocessing": {"split": split}} if split else {}
        return services.plans.prepare({"dataset": dataset} | preprocessing | spec)

    return one


def parts(services: Services, prepared: Prepared) -> dict[int, SplitName]:
    lines = services.blobs.get_bytes(prepared.rows).splitlines()
    rows = [EncodedRow.model_validate_json(line) for line in lines]
    return {row.line: row.part for row in rows}


def test_every_row_is_trained_on_by_default(services: Services, prepare: Prepare) -> None:
    plan = prepare("parted").plan
    assert (plan.rows, plan.rows_trained, plan.rows_validation, plan.rows_test) == (40, 40, 0, 0)
    assert set(parts(services, prepare("parted")).values()) == {SplitName.TRAIN}


def test_a_random_split_is_drawn_by_seed_and_row(services: Services, prepare: Prepare) -> None:
    split = {"probabilities": [0.6, 0.2, 0.2]}
    one, again, other = (parts(services, prepare(split=split, seed=seed)) for seed in (1, 1, 2))
    assert one == again != other
    assert set(one.values()) == set(SplitName)


def test_a_fixed_split_follows_the_column(services: Services, prepare: Prepare) -> None:
    found = parts(services, prepare("parted", {"type": "fixed"}))
    assert found == {
        n + 1: (SplitName.TRAIN, SplitName.TRAIN, SplitName.VALIDATION, SplitName.TEST)[n % 4] for n in range(ROWS)
    }


def test_only_training_rows_are_scheduled(prepare: Prepare) -> None:
    whole, parted = prepare("parted"), prepare("parted", {"type": "fixed"}, trainer={"effective_batch_size": 8})
    plan = parted.plan
    assert (plan.rows, plan.rows_trained, plan.rows_validation, plan.rows_test) == (40, 20, 10, 10)
    assert (parted.schedule.rows, parted.schedule.updates_per_epoch) == (20, 3)
    assert plan.lengths.count == 20
    assert plan.tokens_per_epoch < 0.6 * whole.plan.tokens_per_epoch
    assert parted.summary.longest == whole.summary.longest


@pytest.mark.parametrize(("every", "evaluated"), [(0, [3, 6, 7]), (2, [2, 4, 6, 7])])
def test_evaluations_come_at_epochs_ends_or_with_checkpoints(
    prepare: Prepare, every: int, evaluated: list[int]
) -> None:
    trainer = {"effective_batch_size": 8, "train_steps": 7, "steps_per_checkpoint": every}
    schedule = prepare("parted", {"type": "fixed"}, trainer=trainer).schedule
    assert [update for update in range(8) if schedule.evaluates_after(update)] == evaluated
    never = prepare("parted", trainer=trainer).schedule
    assert not any(never.evaluates_after(update) for update in range(9))


def refusal(prepare: Prepare, *arguments: Any, **spec: Any) -> tuple[str, str]:
    """(where, what) of a spec that is refused for one reason."""
    with pytest.raises(InvalidError) as caught:
        prepare(*arguments, **spec)
    (problem,) = caught.value.problems
    assert problem.hint
    return ".".join(map(str, problem.loc)), problem.message


@pytest.mark.parametrize("column", [None, "split", "fold"])
def test_a_fixed_split_needs_its_column(prepare: Prepare, column: str | None) -> None:
    place, message = refusal(prepare, "rows", {"type": "fixed", "column": column})
    assert place == "preprocessing.split.column"
    assert message == f"a fixed split by {column or 'split'!r}: the dataset has no such column"


def test_a_fixed_split_by_another_column_than_the_datasets(prepare: Prepare) -> None:
    message = refusal(prepare, "parted", {"type": "fixed", "column": "fold"})[1]
    assert message == "a fixed split by 'fold': the dataset's column is 'split'"


def test_a_fixed_split_needs_a_part_of_every_row(services: Services, prepare: Prepare, tmp_path: Path) -> None:
    upload(services, tmp_path, "some", [0, 1, "dev"])
    message = refusal(prepare, "some", {"type": "fixed"})[1]
    assert message == "38 of the dataset's 40 rows name no part in 'split'"


def test_something_must_be_left_to_train_on(services: Services, prepare: Prepare, tmp_path: Path) -> None:
    upload(services, tmp_path, "held", [1] * ROWS)
    place, message = refusal(prepare, "held", {"type": "fixed"})
    assert (place, message) == ("preprocessing.split", "no row is left to train on (0 train, 40 validation, 0 test)")


def test_early_stopping_needs_validation_rows(prepare: Prepare) -> None:
    place, message = refusal(prepare, trainer={"early_stop": 2})
    assert (place, message) == (
        "trainer.early_stop",
        "there is no validation row to stop by (40 train, 0 validation, 0 test)",
    )
    prepare("parted", {"type": "fixed"}, trainer={"early_stop": 2})
    for never in (-1, 0):
        prepare(trainer={"early_stop": never})


def test_an_empty_split_is_a_warning(prepare: Prepare) -> None:
    plan = prepare(split={"probabilities": [0.999, 0, 0.001]}).plan
    assert plan.warnings == ("no row fell into the test part, whose share is 0.001",)
