"""A real inference server on a real port, with a real engine process, over a tiny base and two adapters."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from app.generation.transport import ExclusiveTransport
from tests.tiny import make_tiny_adapter, make_tiny_model
from tests.waiting import until
from worker.inference.ipc import EngineSettings
from worker.inference.sampling_params import ServedModel
from worker.inference.server.app import create_inference_app
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.device_reservation import DeviceReservation
from worker.inference.server.model_resolver import StaticResolver

NF4 = {"bits": 4, "type": "nf4", "double": True}
ENGINE = EngineSettings(dtype="float32", threads=1)
PROMPT = [70, 90, 110, 130, 150, 170]


@dataclass(frozen=True)
class TinyModels:
    """A tiny base and two adapters over it, on disk."""

    base: Path
    one: Path
    two: Path

    def served(self, digest: str, adapter: Path | None = None, **more: Any) -> ServedModel:
        """The base, or the base with an adapter, under a digest."""
        path = None if adapter is None else str(adapter)
        fields = {"max_model_len": 512, "base_digest": "base", **more}
        return ServedModel(digest=digest, base_path=str(self.base), adapter_path=path, **fields)

    def by_digest(self) -> dict[str, ServedModel]:
        """The usual digests: the base, both adapters over it, and the NF4 base with an adapter."""
        return {
            "base": self.served("base"),
            "one": self.served("one", self.one),
            "two": self.served("two", self.two),
            "nf4": self.served("nf4", base_digest="nf4", quantization=NF4),
        }


class CompletionsClient:
    """A client of the completions protocol, with a default model and a default prompt of six ids."""

    def __init__(self, client: httpx.Client, model: str, prompt: list[int]) -> None:
        self.client = client
        self.model = model
        self.prompt = prompt

    def ask(self, **body: Any) -> httpx.Response:
        """POST a completions request, by default greedy over the default prompt, with token ids."""
        defaults = {"model": self.model, "prompt": self.prompt, "temperature": 0, "return_token_ids": True}
        return self.client.post("/v1/completions", json={**defaults, **body})

    def choice(self, **body: Any) -> dict[str, Any]:
        """The only choice of a response that must be a 200."""
        response = self.ask(**body)
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice

    def ids(self, **body: Any) -> list[int]:
        """The token ids of the completion."""
        ids: list[int] = self.choice(**body)["token_ids"]
        return ids


class Server(CompletionsClient):
    """A running server and a client of it."""

    def __init__(self, url: str, app: Any) -> None:
        transport = ExclusiveTransport(connections=500, idle_seconds=2)  # threads of a test share the client
        super().__init__(httpx.Client(base_url=url, timeout=120, transport=transport), "base", PROMPT)
        self.service = app.state.service

    def metric(self, name: str) -> float:
        """The value of an unlabelled metric now."""
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith(name + " "):
                return float(line.split()[1])
        raise AssertionError(f"no metric {name}")

    def stable_metrics(self, *names: str) -> list[float]:
        """Metrics, once they no longer change: the engine reports them a moment after it answers."""
        while True:
            before = [self.metric(name) for name in names]
            time.sleep(0.3)
            if before == [self.metric(name) for name in names]:
                return before

    def wait_until_ready(self) -> None:
        """Wait for the engine."""
        until(lambda: self.client.get("/health").status_code == 200)


@contextlib.contextmanager
def serving(
    models: dict[str, ServedModel],
    settings: ServerSettings,
    reservation: DeviceReservation | None = None,
    expected: Sequence[str] = (),
    resolver: Callable[[dict[str, ServedModel], Sequence[str]], StaticResolver] = StaticResolver,
) -> Iterator[Server]:
    """Run a server in a thread; its engine process ends with it."""
    app = create_inference_app(resolver(models, expected), settings, reservation)
    # asyncio sets TCP_NODELAY only where the protocol is named; without it answers take 40 ms more.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        running = Server(f"http://127.0.0.1:{port}", app)
        try:
            until(lambda: server.started)
            yield running
        finally:
            running.client.close()
            server.should_exit = True
            thread.join(timeout=20)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    """The tiny base and two adapters, made once."""
    folder = tmp_path_factory.mktemp("tiny")
    base = make_tiny_model(folder / "base")
    one = make_tiny_adapter(base, folder / "one", seed=1)
    two = make_tiny_adapter(base, folder / "two", seed=2, r=2)
    return TinyModels(base, one, two)


@pytest.fixture(scope="session")
def server(tiny: TinyModels) -> Iterator[Server]:
    """One server with a ready engine, for all tests that leave it as they found it."""
    with serving(tiny.by_digest(), ServerSettings(engine=ENGINE)) as running:
        running.wait_until_ready()
        yield running
