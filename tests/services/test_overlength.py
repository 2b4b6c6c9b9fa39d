"""What the over-length policy does to each row, with real tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from app.composition import Services
from app.domain.attempts import EncodedRow
from app.domain.datasets import read_canonical
from app.domain.errors import InvalidError
from tests.conftest import SHARED, catalogue_model, needs_shared_data, trajectory_text

LIMIT = 256
SMOLLM2 = catalogue_model("smollm2-135m")
SHORT: dict[str, Any] = {"preprocessing": {"global_max_sequence_length": LIMIT}}


def upload(services: Services, path: Path, name: str) -> str:
    return services.datasets.create(path, path.name, None, name, {})[0].digest


@pytest.fixture
def long_rows(services: Services, tmp_path: Path) -> str:
    """The name of a dataset of 150 rows, every one longer than the limit."""
    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for row in range(150):
            seen = " ".join(f"The river passes through town number {town}." for town in range(40))
            text = trajectory_text("SUPPORTS", "Rhine", seen)
            file.write(json.dumps({"claim": f"It is {row} miles long.", "trajectories": text}) + "\n")
    upload(services, path, "long")
    return "long"


def test_the_counts_are_exact_and_all_rows_can_be_listed(services: Services, long_rows: str) -> None:
    spec = {"dataset": long_rows, **SHORT}
    plan = services.jobs.plan(spec)
    assert (plan.rows_trimmed, len(plan.overlength)) == (150, 100)
    assert [note.line for note in services.jobs.plan(spec, every_row=True).overlength] == list(range(1, 151))


def test_labelled_tokens_that_go_with_an_observation_are_counted(services: Services, long_rows: str) -> None:
    blind = services.jobs.plan({"dataset": long_rows, **SHORT}).overlength[0]
    learned = services.jobs.plan({"dataset": long_rows, **SHORT, "trainer": {"train_on_observations": True}})
    assert blind.labelled_tokens_lost == 0
    assert learned.overlength[0].labelled_tokens_lost == blind.tokens - blind.kept_tokens > 0


@needs_shared_data
@pytest.mark.skipif(SMOLLM2 is None, reason="the small model is not here")
def test_the_users_csv_at_256_tokens_names_every_shortened_row_and_keeps_every_verdict(services: Services) -> None:
    assert SMOLLM2 is not None
    services.base_models.register(SMOLLM2)
    lines = services.blobs.get_bytes(upload(services, SHARED / "react_fever_270.csv", "users")).splitlines()
    spec = {"dataset": "users", "base_model": "smollm2-135m", "trainer": {"verdict_branch": 0}, **SHORT}
    prepared = services.plans.prepare(spec)
    notes = {note.line: note for note in services.jobs.plan(spec, every_row=True).overlength}
    content = services.blobs.get_bytes(prepared.rows).splitlines()
    rows = {row.line: row for row in map(EncodedRow.model_validate_json, content)}
    encoder = services.base_models.encoder(prepared.base, prepared.spec.format())

    assert (prepared.summary.rows, prepared.summary.trimmed, prepared.summary.dropped) == (268, len(notes) - 11, 11)
    for line, canonical in enumerate(lines, start=1):
        trajectory = read_canonical(canonical)
        whole = encoder.encode(encoder.form.render_trajectory(trajectory))
        note, row = notes.get(line), rows.get(line)
        if row is None:
            assert note is not None
            assert (note.action, note.tokens, note.labelled_tokens_lost) == ("dropped", len(whole.ids), whole.labelled)
            continue
        assert len(row.ids) <= LIMIT
        assert (note is None) == (row.ids == whole.ids)
        assert note is None or (note.tokens, note.kept_tokens) == (len(whole.ids), len(row.ids))
        last = row.trained[-1]
        assert f"Finish[{trajectory.verdict.value}]" in encoder.tokens.decode(row.ids[last[0] : last[1]])


@pytest.mark.parametrize("policy", ["trim_observations", "drop"])
def test_where_no_row_fits_the_job_is_refused(services: Services, tmp_path: Path, policy: str) -> None:
    """What is too long here is a thought, which nothing may shorten."""
    text = trajectory_text("SUPPORTS", "Rhine", "It is.").replace("tells enough", "tells enough " * 60)
    path = tmp_path / "thoughts.jsonl"
    path.write_text(json.dumps({"claim": "It is long.", "trajectories": text}))
    upload(services, path, "thoughts")
    spec = {"dataset": "thoughts", "preprocessing": {"global_max_sequence_length": 64, "overlength": policy}}
    with pytest.raises(InvalidError, match="no row fits 64 tokens") as refused:
        services.jobs.submit(spec)
    assert refused.value.code == "no_row_fits"


def test_the_policy_refuse_names_the_rows(services: Services, long_rows: str) -> None:
    spec = {"dataset": long_rows, "preprocessing": {"global_max_sequence_length": LIMIT, "overlength": "refuse"}}
    with pytest.raises(InvalidError, match="150 rows are longer than 256 tokens") as refused:
        services.jobs.submit(spec)
    assert refused.value.code == "rows_too_long"
    assert refused.value.problems[0].loc == ("dataset", "rows", 1)
