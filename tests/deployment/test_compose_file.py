"""What docker-compose.yml promises: a valid file, private services, secrets that must be set, shared volumes."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psycopg
import pytest

from app.cli.broker import server_program
from app.settings import Settings
from tests.deployment.compose import FILE, SECRETS, MissingVariable, Service, read_services
from tests.postgres import PostgresServer

OURS = ("api", "trainer", "runner", "inference", "migrate")
PROGRAMS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    return read_services(SECRETS)


def test_the_file_is_a_valid_compose_file() -> None:
    check = [str(PROGRAMS / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(FILE)]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_services_are_the_deployments(services: dict[str, Service]) -> None:
    assert set(services) == {*OURS, "redis", "postgres"}


@pytest.mark.parametrize("secret", SECRETS)
def test_nothing_starts_without_its_secrets(secret: str) -> None:
    with pytest.raises(MissingVariable, match=secret):
        read_services({name: value for name, value in SECRETS.items() if name != secret})


def test_only_the_api_is_published_and_only_on_this_machine(services: dict[str, Service]) -> None:
    published = {name: service.document["ports"] for name, service in services.items() if "ports" in service.document}
    assert published == {"api": ["127.0.0.1:8000:8000"]}


def test_redis_database_and_inference_reach_no_other_network(services: dict[str, Service]) -> None:
    for name in ("redis", "postgres", "inference", "runner", "migrate"):
        assert services[name].document["networks"] == ["private"]


def test_everything_that_stays_up_has_a_health_check_and_comes_back(services: dict[str, Service]) -> None:
    for name, service in services.items():
        assert service.document["init"] is True
        if name != "migrate":
            assert service.healthcheck
            assert service.document["restart"] == "unless-stopped"


def test_ours_run_without_privileges_behind_the_migration(services: dict[str, Service]) -> None:
    for name in OURS:
        document = services[name].document
        assert document["user"] == "10001:10001"
        assert document["cap_drop"] == ["ALL"]
        if name == "migrate":
            assert document["restart"] == "no"
        else:
            assert document["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_trainer_and_inference_get_the_gpu_and_the_image_with_torch(services: dict[str, Service]) -> None:
    for name in OURS:
        wanted = "worker" if name in ("trainer", "inference") else "api"
        assert services[name].document["build"]["target"] == wanted
        assert ("deploy" in services[name].document) == (wanted == "worker")
    (device,) = services["trainer"].document["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_trainer_and_inference_know_that_they_share_a_device(services: dict[str, Service]) -> None:
    """Containers have host names of their own; the ledger goes by this one."""
    names = {services[name].environment.get("VERITUNE_DEVICE_NAME") for name in ("trainer", "inference")}
    assert names == {"gpu-node"}


def test_the_trainer_has_a_minute_for_its_checkpoint(services: dict[str, Service]) -> None:
    assert services["trainer"].document["stop_grace_period"] == "60s"


def test_blobs_and_cache_are_shared_and_lie_where_the_settings_say(services: dict[str, Service]) -> None:
    for name in ("api", "trainer", "runner", "inference"):
        mounted = dict(volume.split(":") for volume in services[name].document["volumes"])
        environment = services[name].environment
        assert environment["VERITUNE_STORAGE_URL"] == f"file://{mounted['blobs']}"
        assert environment["VERITUNE_CACHE"] == mounted["cache"]


def test_every_variable_is_a_setting(services: dict[str, Service]) -> None:
    for name in OURS:
        for variable in services[name].environment:
            assert variable.removeprefix("VERITUNE_").lower() in Settings.model_fields


def test_the_pinned_versions_are_the_tested_ones(services: dict[str, Service], postgres: PostgresServer) -> None:
    with psycopg.connect(postgres.url) as connection:
        row = connection.execute("SHOW server_version").fetchone()
    assert row is not None
    assert services["postgres"].document["image"] == f"postgres:{row[0]}-bookworm"
    told = subprocess.run([server_program(), "--version"], capture_output=True, text=True, check=True)
    assert f"v={services['redis'].document['image'].split(':')[1]} " in told.stdout
    assert services["api"].document["image"] == f"veritune-api:{version('veritune')}"
