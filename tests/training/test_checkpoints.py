"""Checkpoints are whole and hashed. A truncated one is skipped for the one before."""

from pathlib import Path

import pytest
import torch

from worker.training.checkpoints import (
    Progress,
    TornCheckpointError,
    TrainingState,
    find_complete_checkpoint,
    list_checkpoints,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)


def saved(update: int) -> TrainingState:
    return TrainingState(
        identity="work",
        progress=Progress(update=update, applied=update, loss=1.5),
        weights={"a": torch.full((3,), float(update))},
        optimizer={"step": torch.tensor(float(update)), "exp_avg": torch.ones(3)},
        ranks={},
        generators={"cpu": torch.get_rng_state()},
        scaler={"scale": 4_096.0},
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path, digest = write_checkpoint(tmp_path, saved(30))
    assert path == tmp_path / "update-000030"
    assert verify_checkpoint(path) == digest
    found = read_checkpoint(path)
    assert (found.identity, found.progress, found.scaler) == ("work", saved(30).progress, {"scale": 4_096.0})
    assert torch.equal(found.weights["a"], torch.full((3,), 30.0))
    assert torch.equal(found.optimizer["step"], torch.tensor(30.0))
    assert torch.equal(found.generators["cpu"], torch.get_rng_state())


def test_earlier_ones_stay_until_they_are_stored(tmp_path: Path) -> None:
    for update in (10, 20, 30):
        write_checkpoint(tmp_path, saved(update))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["update-000030", "update-000020", "update-000010"]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith("partial")] == []


def test_the_same_update_can_be_written_again(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, saved(10))
    path, digest = write_checkpoint(tmp_path, saved(10))
    assert verify_checkpoint(path) == digest


def cut_off(directory: Path) -> None:
    whole = (directory / "weights.safetensors").read_bytes()
    (directory / "weights.safetensors").write_bytes(whole[:-1])


def lose_a_file(directory: Path) -> None:
    (directory / "state.json").unlink()


def lose_the_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def garble_the_manifest(directory: Path) -> None:
    (directory / "manifest.json").write_text("[]")


TEARS = [cut_off, lose_a_file, lose_the_manifest, garble_the_manifest]


@pytest.mark.parametrize("tear", TEARS)
def test_a_torn_checkpoint_is_skipped_for_the_one_before(tmp_path: Path, tear: object) -> None:
    older, _ = write_checkpoint(tmp_path, saved(10))
    newer, _ = write_checkpoint(tmp_path, saved(20))
    assert callable(tear)
    tear(newer)
    with pytest.raises(TornCheckpointError, match="update-000020"):
        verify_checkpoint(newer)
    found, torn = find_complete_checkpoint(newer)
    assert found == older
    assert len(torn) == 1


def test_without_a_sound_checkpoint_none_is_found(tmp_path: Path) -> None:
    only, _ = write_checkpoint(tmp_path, saved(10))
    cut_off(only)
    assert find_complete_checkpoint(only)[0] is None
