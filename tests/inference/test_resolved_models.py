"""Digest → model, asked once for many, again after a failure; and what is said meanwhile."""

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from app.domain.errors import UnavailableError
from tests.inference.conftest import ENGINE, Server, Shelf, serving
from worker.inference.sampling_params import ServedModel
from worker.inference.server.completion_service import ServerSettings
from worker.inference.server.model_resolver import StaticResolver
from worker.inference.server.resolved_models import ResolvedModels


class Shelves(StaticResolver):
    """Of "lost" the database is away, and "late" is broken when it is asked for first."""

    def __init__(self, models: dict[str, ServedModel], expected: Sequence[str] = ()) -> None:
        super().__init__(models, expected)
        self.asked: Counter[str] = Counter()

    def resolve(self, digest: str) -> ServedModel:
        self.asked[digest] += 1
        if digest == "lost":
            raise UnavailableError("the database is away")
        model = super().resolve(digest)
        broken = digest == "late" and self.asked[digest] == 1
        return model.model_copy(update={"adapter_path": "/nowhere"}) if broken else model


@pytest.fixture(scope="module")
def shelves(shelf: Shelf) -> Iterator[Server]:
    table = {**shelf.table(), "late": shelf.served("late", shelf.one)}
    with serving(table, ServerSettings(engine=ENGINE), resolver=Shelves) as running:
        running.wait_until_ready()
        yield running


def test_a_model_that_cannot_be_looked_up_now_is_a_503(shelves: Server) -> None:
    answer = shelves.ask(model="lost")

    assert answer.status_code == 503
    assert answer.json()["error"]["type"] == "ServiceUnavailableError"
    assert int(answer.headers["Retry-After"]) >= 1


def test_a_model_that_the_engine_refused_is_resolved_anew(shelves: Server) -> None:
    assert shelves.ask(model="late").status_code == 422
    assert shelves.ids(model="late", max_tokens=4) == shelves.ids(model="one", max_tokens=4)


def test_a_crowd_at_one_digest_has_it_resolved_once(shelf: Shelf) -> None:
    resolver, gate = Shelves(shelf.table()), threading.Event()

    def resolve(digest: str) -> ServedModel:
        gate.wait()
        return resolver.resolve(digest)

    async def crowd() -> list[ServedModel]:
        catalogue = ResolvedModels(resolve)
        asked = [asyncio.create_task(catalogue.resolve("one")) for _ in range(50)]
        await asyncio.sleep(0)
        asked.pop().cancel()  # the others still get it
        gate.set()
        return [*await asyncio.gather(*asked), await catalogue.resolve("one")]

    assert asyncio.run(crowd()) == [shelf.table()["one"]] * 50
    assert resolver.asked["one"] == 1


def test_a_failure_is_told_to_all_who_wait_and_not_remembered(shelf: Shelf) -> None:
    resolver = Shelves(shelf.table())

    async def crowd() -> list[ServedModel | BaseException]:
        catalogue = ResolvedModels(resolver.resolve)
        together = await asyncio.gather(*(catalogue.resolve("lost") for _ in range(3)), return_exceptions=True)
        return [*together, *await asyncio.gather(catalogue.resolve("lost"), return_exceptions=True)]

    assert [type(answer) for answer in asyncio.run(crowd())] == [UnavailableError] * 4
    assert resolver.asked["lost"] == 2
