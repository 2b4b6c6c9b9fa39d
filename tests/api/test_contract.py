"""Requests generated from the OpenAPI document: no response is a 5xx, and every response is documented."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

from app.composition import Services, compose
from app.db.migrating import migrate
from app.domain.base_models import BaseModelDescription
from app.generation import ScriptedGenerator
from app.main import create_app
from app.queue import MemoryDoorbell
from app.settings import Settings
from tests.api.conftest import CPU, lease, listening, make_adapter, post_file, reads_the_page
from tests.conftest import corpus_jsonl, dataset_jsonl

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of the libraries that schemathesis imports
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

CHECKS = [
    not_a_server_error,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.status_code_conformance,
    checks.unsupported_method,
]
EXAMPLES = int(os.environ.get("VERITUNE_TEST_EXAMPLES", "5"))
"""Requests for each route; a long run takes more."""


SCHEMA: Any = schemathesis.openapi.from_dict(create_app(compose(Settings(home=Path("unused")))).openapi())


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_cache: Path) -> Iterator[tuple[str, Services]]:
    """A running server whose resources are named `demo`, as in the document's examples."""
    folder = tmp_path_factory.mktemp("contract")
    chosen = Settings(home=folder / "home", cache=tiny_cache, default_base_model="tiny")
    migrate(chosen.database)
    first = compose(chosen, doorbell=MemoryDoorbell())
    first.base_models.register(BaseModelDescription.model_validate_json((tiny_cache / "tiny.json").read_text()))
    tokens = first.base_models.tokenization(first.base_models.get(None))
    served = compose(chosen, doorbell=MemoryDoorbell(), generator=ScriptedGenerator(tokens, reads_the_page))
    with listening(served) as client:
        post_file(client, "/corpora", corpus_jsonl(), "pages.jsonl", name="demo")
        post_file(client, "/datasets", dataset_jsonl(), name="demo")
        client.post("/jobs", json={"dataset": "demo", "name": "demo"})
        make_adapter(served, lease(served), folder / "adapter", "demo")
        yield str(client.base_url), served


@SCHEMA.parametrize()  # type: ignore[untyped-decorator]  # the library types it as Any
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 100,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_every_answer_is_a_documented_one(case: Any, running: tuple[str, Services]) -> None:
    url, services = running
    services.devices.report("host", CPU)  # so that /health/ready has no reason for a 503
    case.call_and_validate(base_url=url, checks=CHECKS)
