"""The environment variables of processes that own tensors."""

import pytest

from worker.environment import TENSORS, for_tensors


def test_children_get_the_variables_that_make_tensors_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TENSORS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VERITUNE_HOME", "/somewhere")
    assert for_tensors().items() >= {**TENSORS, "VERITUNE_HOME": "/somewhere"}.items()


def test_the_operators_own_variables_have_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    assert for_tensors()["GOMP_SPINCOUNT"] == "0"
