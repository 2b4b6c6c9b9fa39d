"""The default base model of `veritune up`: fetched if need be, replaced where it cannot be."""

from pathlib import Path
from typing import Any

import pytest

from app.cli import models
from app.cli.errors import CommandError
from app.composition import Services, compose
from app.domain.base_models import BaseModelDescription
from app.domain.model_catalogue import DEFAULT_BASE_MODEL, SMALL_BASE_MODEL
from app.settings import Settings


def described(tiny_cache: Path, name: str) -> BaseModelDescription:
    found = BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text())
    return found.model_copy(update={"name": name})


@pytest.mark.parametrize(
    ("asked", "listed", "reachable", "taken", "fetched"),
    [
        (None, [], [DEFAULT_BASE_MODEL], DEFAULT_BASE_MODEL, [DEFAULT_BASE_MODEL]),
        (None, [], [SMALL_BASE_MODEL], SMALL_BASE_MODEL, [DEFAULT_BASE_MODEL, SMALL_BASE_MODEL]),
        (None, [], [], None, [DEFAULT_BASE_MODEL, SMALL_BASE_MODEL]),
        (None, [SMALL_BASE_MODEL], [], SMALL_BASE_MODEL, [DEFAULT_BASE_MODEL]),
        (None, [SMALL_BASE_MODEL], [DEFAULT_BASE_MODEL], DEFAULT_BASE_MODEL, [DEFAULT_BASE_MODEL]),
        (None, ["mine"], [], DEFAULT_BASE_MODEL, []),
        (SMALL_BASE_MODEL, [DEFAULT_BASE_MODEL], [SMALL_BASE_MODEL], SMALL_BASE_MODEL, [SMALL_BASE_MODEL]),
        (SMALL_BASE_MODEL, ["mine"], [], SMALL_BASE_MODEL, [SMALL_BASE_MODEL]),
        ("mine", ["mine"], [], "mine", []),
        ("unknown", [], [], None, ["unknown"]),
    ],
)
def test_the_default_base_model(
    settings: Settings,
    services: Services,
    tiny_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str | None,
    listed: list[str],
    reachable: list[str],
    taken: str | None,
    fetched: list[str],
) -> None:
    values: dict[str, Any] = settings.model_dump(exclude={"default_base_model"}, exclude_unset=True)
    if asked is not None:
        values["default_base_model"] = asked
    composed = compose(Settings(**values))
    with composed.database.write() as unit:
        for row in unit.base_models.list_base_models():
            unit.session.delete(row)
    for name in listed:
        composed.base_models.register(described(tiny_cache, name))
    tried: list[str] = []

    def fetch(_services: Services, name: str) -> BaseModelDescription:
        tried.append(name)
        if name not in reachable:
            raise CommandError(f"{name} cannot be downloaded")
        return described(tiny_cache, name)

    monkeypatch.setattr(models, "fetch", fetch)
    said: list[str] = []
    if taken is None:
        with pytest.raises(CommandError, match="cannot be downloaded"):
            models.ensure_default(composed, said.append)
    else:
        assert models.ensure_default(composed, said.append) == taken
    assert tried == fetched
    assert bool(said) is bool(fetched)
    composed.close()
