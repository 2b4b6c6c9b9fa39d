"""Which rows an update takes and how they share micro-batches."""

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.domain.attempts import EncodedBranch, EncodedRow
from app.domain.plans import Schedule
from tests.training.conftest import make_rows
from worker.training.batches import (
    Label,
    batches_of_update,
    collate,
    pack_micro_batches,
    read_rows,
    rows_of_update,
    shifted_labels,
)
from worker.training.errors import TrainingError
from worker.training.packing import batch_attention_mask

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


def schedule(rows: int, per_update: int) -> Schedule:
    per_epoch = -(-rows // per_update)
    return Schedule(
        rows=rows,
        updates=3 * per_epoch,
        updates_per_epoch=per_epoch,
        rows_per_update=per_update,
        max_rows=None,
        max_tokens=128,
        warmup_updates=0,
        checkpoint_every=10,
    )


@given(rows=st.integers(1, 90), per_update=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_each_epoch_takes_every_row_once(rows: int, per_update: int, seed: int) -> None:
    plan = schedule(rows, min(rows, per_update))
    for epoch in range(3):
        first = epoch * plan.updates_per_epoch + 1
        updates = range(first, first + plan.updates_per_epoch)
        taken = [row for update in updates for row in rows_of_update(update, plan, seed)]
        assert sorted(taken) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    plan = schedule(40, 40)
    orders = [tuple(rows_of_update(update, plan, seed)) for update in (1, 2) for seed in (1, 2)]
    assert len(set(orders)) == 4
    assert rows_of_update(2, plan, 1) == rows_of_update(2, plan, 1)


@given(lengths=LENGTHS, max_rows=st.none() | st.integers(1, 9), max_tokens=st.integers(1, 1_000))
def test_micro_batches_hold_everything_within_the_bounds(
    lengths: list[int], max_rows: int | None, max_tokens: int
) -> None:
    groups = pack_micro_batches(lengths, max_rows, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or sum(lengths[index] for index in group) <= max_tokens
        assert max_rows is None or len(group) <= max_rows


@given(lengths=LENGTHS, max_tokens=st.integers(300, 2_000))
def test_micro_batches_are_few_and_the_longest_row_comes_first(lengths: list[int], max_tokens: int) -> None:
    groups = pack_micro_batches(lengths, None, max_tokens)
    assert groups[0][0] == lengths.index(max(lengths))
    # Groups that were half empty on average would have been fewer.
    assert len(groups) == 1 or sum(lengths) > len(groups) * max_tokens / 2


@pytest.mark.parametrize(
    ("lengths", "max_rows", "totals"),
    [
        ([30, 30, 20, 20], None, [50, 50]),  # first fit alone: 80 and 20
        ([60, 10, 10, 10, 10], None, [60, 40]),
        ([30, 20, 10, 10, 10], 3, [40, 40]),
        ([95, 5, 5], None, [95, 10]),  # longer than the bound: it stands alone
    ],
)
def test_micro_batches_of_an_update_are_even(lengths: list[int], max_rows: int | None, totals: list[int]) -> None:
    groups = pack_micro_batches(lengths, max_rows, 90)
    assert [sum(lengths[index] for index in group) for group in groups] == totals


def test_the_order_of_a_large_dataset_is_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle, drawn = random.Random.shuffle, []

    def counted(generator: random.Random, rows: list[int]) -> None:
        drawn.append(len(rows))
        shuffle(generator, rows)

    monkeypatch.setattr(random.Random, "shuffle", counted)
    for update in range(1, 41):
        rows_of_update(update, schedule(8_000, 16), 77)
    assert drawn == [8_000]


def test_rows_are_packed_with_positions_of_their_own() -> None:
    short = EncodedRow(line=1, ids=(10, 11, 12), trained=((0, 2),))
    own = EncodedBranch(at=2, ids=(30, 31), trained=((0, 1), (1, 2)))
    long = EncodedRow(line=2, ids=(20, 21, 22, 23, 24), trained=((1, 2), (4, 5)), branch=own)
    batch = collate([short, long])
    assert batch.ids.tolist() == [10, 11, 12, 20, 21, 22, 23, 24, 30, 31]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 2, 3]
    assert batch.targets.tolist() == [11, 21, 24, 30, 31]
    assert batch.ids[batch.predictors].tolist() == [10, 20, 23, 21, 30]
    assert [(row.tokens.start, row.tokens.stop) for row in batch.rows] == [(0, 3), (3, 10)]
    assert (batch.tokens, batch.labelled) == (10, 5)


def test_a_token_attends_to_its_own_row_and_a_branch_not_to_the_tokens_after_its_fork() -> None:
    own = EncodedBranch(at=1, ids=(30, 31), trained=((0, 2),))
    row = EncodedRow(line=2, ids=(20, 21, 22), trained=(), branch=own)
    rows = collate([EncodedRow(line=1, ids=(10, 11), trained=()), row]).rows
    seen = batch_attention_mask(rows, torch.device("cpu")).int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 1, 0, 0],
        [0, 0, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 1, 1],
    ]


def test_the_verdicts_of_a_row_and_of_its_branch_are_marked() -> None:
    own = EncodedBranch(at=2, ids=(30, 31, 32), trained=((1, 3),), verdict=1)
    row = EncodedRow(line=1, ids=(10, 11, 12, 13), trained=((2, 4),), verdict=3, branch=own)
    batch = collate([row, row.model_copy(update={"verdict": None, "branch": None})], verdict_weight=5)
    assert batch.targets.tolist() == [12, 13, 31, 32, 12, 13]
    assert batch.targets[batch.branch_verdicts].tolist() == [31]
    assert (batch.loss_weights.tolist(), batch.total_weight) == ([1, 5, 5, 1, 1, 1], 14)


def test_the_first_token_of_a_row_is_never_a_label() -> None:
    assert shifted_labels(EncodedRow(line=1, ids=(1, 2, 3), trained=((0, 3),))) == [Label(0, 2), Label(1, 3)]


@given(update=st.integers(1, 9))
def test_an_update_holds_all_of_its_rows(update: int) -> None:
    rows = make_rows(10)
    plan = schedule(10, 4)
    batches = batches_of_update(rows, update, plan, 7)
    chosen = [rows[index] for index in rows_of_update(update, plan, 7)]
    assert sum(batch.tokens for batch in batches) == sum(len(row.all_ids) for row in chosen)
    assert sum(batch.labelled for batch in batches) == sum(len(shifted_labels(row)) for row in chosen)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (EncodedRow(line=3, ids=(1, 400), trained=((1, 2),)), "vocabulary_mismatch"),
        (EncodedRow(line=3, ids=(1,), trained=((0, 1),)), "no_labelled_tokens"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path: Path, row: EncodedRow, code: str) -> None:
    (tmp_path / "rows").write_text(row.model_dump_json() + "\n")
    with pytest.raises(TrainingError, match="line 3") as refused:
        read_rows(tmp_path / "rows", vocab_size=400)
    assert refused.value.code == code


@pytest.mark.parametrize(("text", "code"), [("", "no_rows"), ("{", "bad_rows")])
def test_lines_that_are_not_rows_are_refused(tmp_path: Path, text: str, code: str) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(TrainingError) as refused:
        read_rows(tmp_path / "rows", vocab_size=400)
    assert refused.value.code == code
