"""Digest → model: looked up once for concurrent requests, and again after a failure, which is a 503."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from app.domain.errors import UnavailableError
from tests.inference.conftest import ENGINE, Server, TinyModels, serving
from worker.inference.sampling_params import ServedModel
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.model_resolver import StaticResolver
from worker.inference.server.resolved_models import ResolvedModels


class UnreliableResolver(StaticResolver):
    """Raises UnavailableError for "lost", and returns a broken model at the first lookup of "late"."""

    def __init__(self, models: dict[str, ServedModel], expected: Sequence[str] = ()) -> None:
        super().__init__(models, expected)
        self.lookups: Counter[str] = Counter()

    def resolve(self, digest: str) -> ServedModel:
        self.lookups[digest] += 1
        if digest == "lost":
            raise UnavailableError("the database is away")
        model = super().resolve(digest)
        broken = digest == "late" and self.lookups[digest] == 1
        return model.model_copy(update={"adapter_path": "/nowhere"}) if broken else model


@pytest.fixture(scope="module")
def server(tiny: TinyModels) -> Iterator[Server]:
    table = {**tiny.by_digest(), "late": tiny.served("late", tiny.one)}
    with serving(table, ServerSettings(engine=ENGINE), resolver=UnreliableResolver) as running:
        running.wait_until_ready()
        yield running


def test_a_model_that_cannot_be_looked_up_now_is_a_503(server: Server) -> None:
    answer = server.ask(model="lost")

    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_model_that_the_engine_refused_is_resolved_anew(server: Server) -> None:
    assert server.ask(model="late").status_code == 422
    assert server.ids(model="late", max_tokens=4) == server.ids(model="one", max_tokens=4)


def test_concurrent_requests_for_one_digest_resolve_it_once(tiny: TinyModels) -> None:
    resolver, gate = UnreliableResolver(tiny.by_digest()), threading.Event()

    def resolve(digest: str) -> ServedModel:
        gate.wait()
        return resolver.resolve(digest)

    async def concurrent() -> list[ServedModel]:
        catalogue = ResolvedModels(resolve)
        asked = [asyncio.create_task(catalogue.resolve("one")) for _ in range(50)]
        await asyncio.sleep(0)
        asked.pop().cancel()  # the others still get it
        gate.set()
        return [*await asyncio.gather(*asked), await catalogue.resolve("one")]

    assert asyncio.run(concurrent()) == [tiny.by_digest()["one"]] * 50
    assert resolver.lookups["one"] == 1


def test_a_failure_reaches_all_waiting_requests_and_is_not_cached(tiny: TinyModels) -> None:
    resolver = UnreliableResolver(tiny.by_digest())

    async def concurrent() -> list[ServedModel | BaseException]:
        catalogue = ResolvedModels(resolver.resolve)
        together = await asyncio.gather(*(catalogue.resolve("lost") for _ in range(3)), return_exceptions=True)
        return [*together, *await asyncio.gather(catalogue.resolve("lost"), return_exceptions=True)]

    assert [type(answer) for answer in asyncio.run(concurrent())] == [UnavailableError] * 4
    assert resolver.lookups["lost"] == 2
