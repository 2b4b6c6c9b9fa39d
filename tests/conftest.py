"""What tests share: a deployment of their own over a tiny base model, in a private directory."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings

import worker  # noqa: F401  before anything imports bitsandbytes, of which it keeps the advice from the output
from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import BaseModelDescription
from app.domain.model_catalogue import FETCHABLE_MODELS
from app.queue import MemoryDoorbell
from app.settings import Settings

# The machine is shared: how long one example takes says nothing about the code.
hypothesis_settings.register_profile("veritune", deadline=None)
hypothesis_settings.load_profile("veritune")

pytest_plugins = ["tests.postgres"]

# A run that is told to end takes the processes along that its fixtures started.
signal.signal(signal.SIGTERM, lambda *_: pytest.exit("told to end", returncode=143))

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Real data beside the checkout, where there is some."""

MODEL_CACHE = Path(os.environ.get("VERITUNE_CACHE", ROOT / ".cache" / "veritune"))
"""The models of this checkout. A user may have added any to it, so look one up by what it is."""

needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data is not here")


def catalogue_model(name: str) -> BaseModelDescription | None:
    """The catalogue's model in `MODEL_CACHE`; None when it was not fetched. Another model may have the same name."""
    paths = sorted(MODEL_CACHE.glob("models/*/description.json"))
    found = (BaseModelDescription.model_validate_json(path.read_bytes()) for path in paths)
    return next((one for one in found if (one.name, one.source) == (name, FETCHABLE_MODELS[name])), None)


ROWS = [
    ("The Rhine flows into the North Sea.", "SUPPORTS", "Rhine", "The river flows into the North Sea."),
    ("The Rhine flows into the Black Sea.", "REFUTES", "Rhine", "The river flows into the North Sea."),
    ("The Volga is older than the Rhine.", "NOT ENOUGH INFO", "Volga", "The Volga is a broad river."),
    ("The Volga is a broad river.", "SUPPORTS", "Volga", "The Volga is a broad river."),
]


def trajectory_text(label: str, page: str, seen: str) -> str:
    """A one-search trajectory in the user's notation."""
    return (
        f"Thought 1: I should look up {page}.\nAction 1: Search[{page}]\nObservation 1: {seen}\n"
        f"Thought 2: The page tells enough.\nAction 2: Finish[{label}]"
    )


def dataset_jsonl(rows: int = len(ROWS)) -> bytes:
    """A small dataset in the user's own columns; every row's claim is its own."""
    lines = []
    for number in range(rows):
        claim, label, page, seen = ROWS[number % len(ROWS)]
        unique = claim if number < len(ROWS) else f"{claim[:-1]}, as known for {number} years."
        lines.append(json.dumps({"claim": unique, "trajectories": trajectory_text(label, page, seen), "label": label}))
    return "\n".join(lines).encode()


def corpus_jsonl() -> bytes:
    pages = [
        {"title": "Rhine", "sentences": ["The Rhine carries trade.", "The river flows into the North Sea."]},
        {"title": "Volga", "sentences": ["The Volga is a broad river.", "It flows into the Caspian Sea."]},
    ]
    return "\n".join(json.dumps(page) for page in pages).encode()


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model cache that holds the tiny base model."""
    from tests.tiny import make_tiny_model  # not by the process that only hands out the tests: torch takes seconds

    cache = tmp_path_factory.mktemp("cache")
    source = make_tiny_model(tmp_path_factory.mktemp("tiny"))
    command = [sys.executable, "-m", "worker.models", "add", "tiny", str(source), "--cache", str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    (cache / "tiny.json").write_text(done.stdout.strip().splitlines()[-1])
    return cache


@pytest.fixture
def database_url() -> str | None:
    """Where the deployment keeps its rows; None is SQLite under its home. A directory of tests may say otherwise."""
    return None


@pytest.fixture
def settings(tmp_path: Path, tiny_cache: Path, database_url: str | None) -> Settings:
    return Settings(
        home=tmp_path / "home",
        cache=tiny_cache,
        database_url=database_url,
        default_base_model="tiny",
        poll_seconds=0.1,
        lease_seconds=5.0,
    )


@pytest.fixture
def doorbell() -> MemoryDoorbell:
    return MemoryDoorbell()


@pytest.fixture
def services(settings: Settings, doorbell: MemoryDoorbell, tiny_cache: Path) -> Iterator[Services]:
    """A whole deployment in this process but for the GPU side: real SQLite, real blobs, a doorbell in memory."""
    migrate(settings.database)
    composed = compose(settings, doorbell=doorbell)
    described = BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text())
    composed.base_models.register(described)
    yield composed
    composed.close()


@pytest.fixture
def upload(tmp_path: Path, services: Services) -> Path:
    """A dataset file on disk, as the API hands it on."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset_jsonl())
    return path
