"""The HTTP API over a whole deployment in this process, with a scripted model in place of inference."""

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from sqlalchemy import func, select
from starlette.testclient import TestClient

from app.composition import Services, compose
from app.db.base import Base
from app.db.migrating import migrate
from app.domain.adapters import CONFIG_FILE, WEIGHTS_FILE, AdapterKind, Manifest, ManifestBase
from app.domain.attempts import CheckpointWritten, UpdateMetrics
from app.domain.base_models import BaseModelDescription
from app.domain.devices import DeviceDescription
from app.domain.jobs import Lease
from app.domain.react import ReactFormat
from app.domain.specs import TrainSpec
from app.domain.tuning_methods import servable_by
from app.generation import GenerationRequest, ScriptedGenerator
from app.generation.transport import ExclusiveTransport
from app.main import create_app
from app.queue import MemoryDoorbell
from app.settings import Settings
from tests.conftest import corpus_jsonl, dataset_jsonl
from tests.waiting import until

HOST = "http://127.0.0.1"
MEMBERS = {"type", "title", "status", "detail", "instance", "code", "errors"}
RHINE = "The Rhine flows into the North Sea."
CPU = DeviceDescription(type="cpu", model="a cpu", bytes=1 << 33, cores=2, queues=("gpu", "cpu"))


def reads_the_page(prompt: str, request: GenerationRequest) -> str:
    """A scripted model that searches for the page that the claim names, and then finishes."""
    named = re.search(r"Claim: The (\w+)", prompt)
    page = named.group(1) if named else "Nothing"
    number = prompt.count("Thought ")
    if prompt.endswith(f"Thought {number}:"):
        return f" I look up {page}.\n" if number == 1 else " The page tells enough.\n"
    if prompt.endswith(":"):
        return " Search[" if number == 1 else " Finish["
    return f"{page}]" if number == 1 else "SUPPORTS]"


@pytest.fixture
def served(services: Services, doorbell: MemoryDoorbell) -> Iterator[Services]:
    """The deployment with the scripted model."""
    tokens = services.base_models.tokenization(services.base_models.get(None))
    generator = ScriptedGenerator(tokens, reads_the_page)
    composed = compose(services.settings, doorbell=doorbell, generator=generator)
    yield composed
    composed.close()


@pytest.fixture
def client(served: Services) -> Iterator[TestClient]:
    """A client that gets a 500 for an unexpected error, as over HTTP."""
    with TestClient(create_app(served), base_url=HOST, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session")
def readonly_deployment(
    tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path
) -> Iterator[tuple[TestClient, Services]]:
    """A deployment with a dataset named `rows`. It stores nothing more, because every test request is refused."""
    home = tmp_path_factory.mktemp("readonly") / "home"
    settings = Settings(home=home, cache=tiny_cache, default_base_model="tiny")
    migrate(settings.database)
    composed = compose(settings, doorbell=MemoryDoorbell())
    composed.base_models.register(BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text()))
    with TestClient(create_app(composed), base_url=HOST, raise_server_exceptions=False) as client:
        assert post_file(client, "/datasets", dataset_jsonl(), name="rows").status_code == 201
        assert (
            client.post("/jobs/plan", json={"dataset": "rows"}).status_code == 200
        )  # encodes the rows and caches them
        yield client, composed


@pytest.fixture
def readonly_client(readonly_deployment: tuple[TestClient, Services]) -> Iterator[TestClient]:
    """A client whose requests must store nothing."""
    client, composed = readonly_deployment
    with nothing_left(composed):
        yield client


@contextmanager
def listening(services: Services) -> Iterator[httpx.Client]:
    """A client of a real server on a free port of this host."""
    config = uvicorn.Config(create_app(services), log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        try:
            until(lambda: server.started)
            transport = ExclusiveTransport(connections=20, idle_seconds=2)  # threads of a test share the client
            with httpx.Client(base_url=url, timeout=20, transport=transport) as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def server(served: Services) -> Iterator[httpx.Client]:
    with listening(served) as client:
        yield client


Answer = httpx.Response | Any


def problem(response: Answer, status: int, code: str | None = None) -> dict[str, Any]:
    """Return the problem document of a refusal. Checks RFC 9457's members and the code: no trace, no HTML."""
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert set(document) == MEMBERS
    assert document["status"] == status
    assert document["type"] == f"urn:veritune:problem:{document['code']}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"].startswith("/")
    assert "Traceback" not in response.text
    for error in document["errors"]:
        assert set(error) == {"loc", "message", "hint"}
        assert error["message"]
    if code is not None:
        assert document["code"] == code, document
    return document


def places(document: dict[str, Any]) -> list[str]:
    """The `loc` of each error, dotted."""
    return [".".join(map(str, error["loc"])) for error in document["errors"]]


def traces(services: Services) -> dict[str, int]:
    """What is stored: the number of rows of each table, blobs, scratch files of uploads."""
    with services.database.read() as unit:
        found = {
            table.name: int(unit.session.scalar(select(func.count()).select_from(table)) or 0)
            for table in Base.metadata.sorted_tables
        }
    home = services.settings.home_path
    for folder in ("blobs", "work"):
        found[folder] = sum(path.is_file() for path in (home / folder).rglob("*"))
    corpora = services.settings.cache_path / "corpora"
    found["builds"] = sum(1 for _ in corpora.glob(".build-*"))
    return found


@contextmanager
def nothing_left(services: Services) -> Iterator[None]:
    """Check that the block stores nothing."""
    before = traces(services)
    yield
    assert traces(services) == before


def post_file(client: Any, route: str, content: bytes, filename: str = "rows.jsonl", **fields: str) -> Any:
    return client.post(route, files={"file": (filename, content)}, data=fields)


def walk(client: Any, route: str, limit: int, key: str = "id") -> list[Any]:
    """The `key` of every item of a list, page by page."""
    found: list[Any] = []
    params: dict[str, Any] = {"limit": limit}
    while True:
        page = client.get(route, params=params).json()
        assert len(page["data"]) <= limit
        found += [item[key] for item in page["data"]]
        if not page["has_more"]:
            return found
        params["after"] = found[-1]


@pytest.fixture
def dataset(client: TestClient) -> str:
    """The id of a small dataset named `rows`."""
    made = post_file(client, "/datasets", dataset_jsonl(), name="rows")
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


@pytest.fixture
def corpus(client: TestClient) -> str:
    """The id of a corpus of two pages, which is the default."""
    made = post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl", name="pages")
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


@pytest.fixture
def job(client: TestClient, dataset: str) -> str:
    """The id of a waiting job."""
    made = client.post("/jobs", json={"dataset": dataset})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


def lease(services: Services) -> Lease:
    """Lease the next job, as a worker does."""
    taken = services.attempts.lease(("train",), "worker")
    assert taken is not None
    return taken.lease


def metric(update: int, loss: float | None = 1.5) -> UpdateMetrics:
    return UpdateMetrics(
        update=update,
        total_updates=25,
        epoch=update / 10,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=0.5,
        tokens=10,
        labelled_tokens=4,
        tokens_per_second=100.0,
        seconds=0.1,
    )


def manifest_of(services: Services, lease: Lease) -> Manifest:
    """A manifest for the adapter of a leased job."""
    job = services.jobs.get(lease.job_id)
    assert isinstance(job.spec, TrainSpec)
    base = services.base_models.get(job.spec.base_model)
    kind: AdapterKind = "full" if job.spec.adapter is None else "peft"
    return Manifest(
        job_id=lease.job_id,
        kind=kind,
        base=ManifestBase(name=base.name, revision="1", digest=base.digest),
        quantization=job.spec.quantization and job.spec.quantization.model_dump(),
        spec=job.spec.model_dump(mode="json"),
        dataset_digest=services.datasets.get(job.spec.dataset).digest,
        dataset_rows=4,
        protected_share=0.0,
        format=ReactFormat().model_dump(mode="json"),
        max_sequence_length=512,
        seed=42,
        metrics={"loss": 1.0},
        packages={},
        code_revision="test",
        servable_by=servable_by(job.spec.adapter),
        created_at=datetime.now(UTC),
    )


def write_adapter(directory: Path, name: str, kind: AdapterKind = "peft") -> Path:
    directory.mkdir(parents=True)
    (directory / WEIGHTS_FILE[kind]).write_bytes(b"weights of " + name.encode())
    (directory / CONFIG_FILE[kind]).write_text('{"peft_type": "LORA", "r": 16}')
    return directory


def make_adapter(services: Services, lease: Lease, directory: Path, name: str) -> str:
    """Publish an adapter for a leased job, as the supervisor does at the end. Returns its id."""
    manifest = manifest_of(services, lease)
    published = services.adapters.publish(lease, name, write_adapter(directory, name, manifest.kind), manifest)
    assert published is not None
    return published


def make_checkpoint(services: Services, lease: Lease, directory: Path, update: int, loss: float | None = None) -> None:
    """Store a publishable checkpoint of a leased job."""
    written = CheckpointWritten(
        update=update,
        path=write_adapter(directory, f"update {update}"),
        digest=str(update % 10) * 64,
        validation_loss=loss,
    )
    manifest = manifest_of(services, lease).model_copy(update={"metrics": {"updates": update}})
    services.attempts.checkpoint(lease, written, manifest)


@pytest.fixture
def adapter(client: TestClient, served: Services, job: str, tmp_path: Path) -> str:
    """The id of an adapter that the job published and that is the default."""
    return make_adapter(served, lease(served), tmp_path / "adapter", "first")
