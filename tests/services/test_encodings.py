"""A dataset's rows as token ids: encoded once, deleted with the dataset, and never incomplete."""

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from obstore.store import from_url
from sqlalchemy import select, update

from app.composition import Services
from app.db.tables import DatasetRow, EncodingRow
from app.domain.attempts import EncodedRow
from app.domain.encoding import Encoder
from app.domain.errors import NotFoundError, StorageError
from app.domain.react import ReactFormat
from app.domain.specs import TrainSpec
from app.domain.splits import SplitName
from app.services.encodings import Encodings
from app.storage import Blobs
from app.storage.blobs import Blob
from tests.conftest import dataset_jsonl

SPEC = {"dataset": "rows"}


def blob_path(services: Services, digest: str) -> Path:
    return services.settings.home_path / "blobs" / "sha256" / digest[:2] / digest


def blobs_of(services: Services) -> set[str]:
    return {path.name for path in (services.settings.home_path / "blobs").rglob("*") if path.is_file()}


def read_encoded(services: Services, digest: str) -> list[EncodedRow]:
    return [EncodedRow.model_validate_json(line) for line in blob_path(services, digest).read_bytes().splitlines()]


def rows_of(services: Services) -> list[EncodingRow]:
    with services.database.read() as unit:
        return list(unit.session.scalars(select(EncodingRow)))


def upload(services: Services, folder: Path, name: str, content: bytes) -> str:
    path = folder / f"{name}.jsonl"
    path.write_bytes(content)
    return services.datasets.create(path, path.name, None, name, {})[0].digest


@pytest.fixture(autouse=True)
def before(services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The blobs before there was any dataset. No test leaves a temporary file."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield blobs_of(services)
    assert list(folder.iterdir()) == []


@pytest.fixture
def dataset(services: Services, tmp_path: Path, before: set[str]) -> str:
    """The digest of a dataset named `rows`."""
    return upload(services, tmp_path, "rows", dataset_jsonl())


def encode(services: Services, encodings: Encodings, dataset: str, encoder: Encoder) -> str:
    spec = TrainSpec.model_validate(SPEC)
    tokenizer = services.base_models.get(None).tokenizer
    with services.database.read() as unit:
        row = unit.session.scalars(select(DatasetRow).where(DatasetRow.digest == dataset)).one()
    return encodings.get_or_encode(row, spec, tokenizer, 512, lambda: encoder)[0]


@pytest.fixture
def encoder(services: Services) -> Encoder:
    return services.base_models.encoder(services.base_models.get(None), ReactFormat())


def test_the_same_rows_are_encoded_once(services: Services, dataset: str) -> None:
    first = services.plans.prepare(SPEC)
    again = services.plans.prepare(SPEC)
    other = services.plans.prepare(SPEC | {"trainer": {"verdict_branch": 1.0}})
    assert first.rows == again.rows
    assert other.rows != first.rows
    assert other.summary.branches == other.summary.trained == 4


def test_of_a_verdict_row_only_the_verdict_is_learned(services: Services, dataset: str, encoder: Encoder) -> None:
    """Validation rows stay whole, and so do those of the other share."""
    split = {"preprocessing": {"split": {"probabilities": [0.5, 0.5, 0]}}}
    whole, short = (
        services.plans.prepare(SPEC | split | {"seed": 1, "trainer": {"verdict_branch": 0, "verdict_rows": share}})
        for share in (0.0, 1.0)
    )
    pairs = list(zip(read_encoded(services, whole.rows), read_encoded(services, short.rows), strict=True))
    assert {row.part for row, _ in pairs} == {SplitName.TRAIN, SplitName.VALIDATION}
    for row, reduced in pairs:
        if row.part is SplitName.VALIDATION:
            assert reduced == row
            continue
        assert reduced.verdict is not None
        assert row.verdict is not None
        assert reduced.trained == ((reduced.verdict, len(reduced.ids)),)
        assert reduced.ids[reduced.verdict :] == row.ids[row.verdict :]
        assert len(reduced.ids) < len(row.ids)
    assert (whole.summary.verdict_rows, short.summary.verdict_rows) == (0, short.summary.trained)


def test_deleting_a_dataset_deletes_its_encodings(services: Services, dataset: str, before: set[str]) -> None:
    made = {services.plans.prepare(SPEC | {"trainer": {"verdict_branch": share}}).rows for share in (0.0, 1.0)}
    assert made < blobs_of(services)
    services.datasets.delete("rows")
    assert rows_of(services) == []
    assert blobs_of(services) == before


def test_a_blob_that_two_datasets_share_is_deleted_with_the_last(
    services: Services, tmp_path: Path, before: set[str]
) -> None:
    step = {"thought": "I know.", "action": "Finish[SUPPORTS]", "observation": None}
    plain = {"claim": "The Rhine is long.", "label": "SUPPORTS", "steps": [step]}
    for name, evidence in (("rows", []), ("same", [["Rhine", 1]])):
        upload(services, tmp_path, name, json.dumps(plain | {"evidence": evidence}).encode())
    shared = services.plans.prepare({"dataset": "rows"}).rows
    assert services.plans.prepare({"dataset": "same"}).rows == shared

    services.datasets.delete("rows")
    assert services.blobs.exists(shared)
    assert [row.blob for row in rows_of(services)] == [shared]
    services.datasets.delete("same")
    assert blobs_of(services) == before


def test_an_aborted_encoding_leaves_nothing(services: Services, dataset: str) -> None:
    path = blob_path(services, dataset)
    path.write_bytes(path.read_bytes()[:-100])
    stored = blobs_of(services)
    with pytest.raises(ValueError, match="Unterminated string"):
        services.plans.prepare(SPEC)
    assert (rows_of(services), blobs_of(services)) == ([], stored)


def test_a_store_that_fails_leaves_nothing_permanently(services: Services, dataset: str, before: set[str]) -> None:
    path = blob_path(services, services.plans.prepare(SPEC).rows)
    path.unlink()
    (path / "in the way").mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be stored"):
        services.plans.prepare(SPEC)
    shutil.rmtree(path)
    assert services.blobs.exists(services.plans.prepare(SPEC).rows)
    services.datasets.delete("rows")
    assert blobs_of(services) == before


def test_a_dataset_deleted_while_it_is_encoded_leaves_nothing(
    services: Services, dataset: str, encoder: Encoder, before: set[str]
) -> None:
    def deletes(text: str) -> Sequence[int]:
        if "rows" in [row.name for row in services.datasets.list_datasets(None, 10)[0]]:
            services.datasets.delete("rows")
        return encoder.tokens.encode(text)

    slow = Encoder(replace(encoder.tokens, encode=deletes), encoder.form)
    with pytest.raises(NotFoundError, match="was deleted while"):
        encode(services, Encodings(services.database, services.blobs), dataset, slow)
    assert (rows_of(services), blobs_of(services)) == ([], before)


def test_a_dataset_deleted_while_its_ids_are_stored_leaves_nothing(
    services: Services, dataset: str, encoder: Encoder, before: set[str]
) -> None:
    class Late(Blobs):
        """Stores what it is given only after the dataset is gone."""

        def put_file(self, path: Path) -> Blob:
            services.datasets.delete("rows")
            return super().put_file(path)

    late = Late(from_url(services.settings.storage))
    with pytest.raises(NotFoundError, match="was deleted while"):
        encode(services, Encodings(services.database, late), dataset, encoder)
    assert (rows_of(services), blobs_of(services)) == ([], before)


def test_an_encoding_without_a_dataset_gets_its_dataset(services: Services, dataset: str, before: set[str]) -> None:
    rows = services.plans.prepare(SPEC).rows
    with services.database.write() as unit:
        unit.session.execute(update(EncodingRow).values(dataset=None))
    assert services.plans.prepare(SPEC).rows == rows
    services.datasets.delete("rows")
    assert blobs_of(services) == before
