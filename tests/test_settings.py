"""The deployment's settings: what the environment may say, and the key that guards a deployment off loopback."""

import re
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from app.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def _no_settings_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in Settings.model_fields:
        monkeypatch.delenv(f"VERITUNE_{field.upper()}", raising=False)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_text("  the key of the file\n")
    return path


def test_everything_has_a_default() -> None:
    settings = Settings()
    assert (settings.host, settings.port, settings.key) == ("127.0.0.1", 8000, None)
    assert settings.home_path == Path("~/.veritune").expanduser().resolve()
    assert settings.inference == "http://127.0.0.1:8001"
    assert settings.default_base_model == "qwen2.5-coder-0.5b-instruct"


def test_every_field_is_an_environment_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VERITUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("VERITUNE_PORT", "9000")
    monkeypatch.setenv("VERITUNE_PREDICTION_SLOTS", "4")
    settings = Settings()
    assert (settings.home_path, settings.port, settings.prediction_slots) == (tmp_path / "home", 9000, 4)


def test_state_lies_under_one_directory(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    home = settings.home_path
    assert (settings.cache_path, settings.work_path) == (home / "cache", home / "work")
    assert settings.database == f"sqlite:///{home / 'veritune.db'}"
    assert settings.storage == f"file://{home / 'blobs'}"
    assert settings.broker == f"redis+socket://{settings.run_path / 'redis.sock'}"


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("localhost", "http://localhost:8000"),
        ("::1", "http://[::1]:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("192.0.2.1", "http://192.0.2.1:8000"),
    ],
)
def test_where_the_api_is_reached_from_its_own_machine(host: str, url: str) -> None:
    assert Settings(host=host, api_key=SecretStr("a key")).api_url == url


def test_the_scaled_form_swaps_settings_only() -> None:
    settings = Settings(
        database_url="postgresql://db/veritune",
        redis_url="redis://redis:6379/0",
        storage_url="s3://bucket/veritune",
        inference_url="http://inference:8001/",
    )
    assert settings.database == "postgresql://db/veritune"
    assert settings.broker == "redis://redis:6379/0"
    assert settings.storage == "s3://bucket/veritune"
    assert settings.inference == "http://inference:8001"


def test_a_long_home_has_its_sockets_elsewhere(tmp_path: Path) -> None:
    long = Settings(home=tmp_path / ("h" * 100))
    assert len(str(long.run_path / "redis.sock")) <= 100
    assert not long.run_path.is_relative_to(long.home_path)
    assert long.run_path == Settings(home=tmp_path / ("h" * 100)).run_path
    assert long.run_path != Settings(home=tmp_path / ("i" * 100)).run_path


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "api", ""])
def test_off_loopback_a_key_is_required(host: str) -> None:
    with pytest.raises(ValidationError, match="VERITUNE_API_KEY"):
        Settings(host=host)
    assert Settings.model_validate({"host": host, "api_key": "a key"}).key is not None


def test_off_loopback_inference_has_a_secret() -> None:
    with pytest.raises(ValidationError, match="VERITUNE_INFERENCE_SECRET"):
        Settings(inference_host="0.0.0.0")
    assert Settings.model_validate({"inference_host": "0.0.0.0", "inference_secret": "a secret"}).inference_secret


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_on_loopback_none_is(host: str) -> None:
    assert Settings(host=host).key is None


def test_a_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERITUNE_API_KEY", "a key")
    monkeypatch.setenv("VERITUNE_HOST", "0.0.0.0")
    key = Settings().key
    assert key is not None
    assert key.get_secret_value() == "a key"


def test_a_key_in_a_file(key_file: Path) -> None:
    key = Settings(host="0.0.0.0", api_key_file=key_file).key
    assert key is not None
    assert key.get_secret_value() == "the key of the file"


def test_the_variable_goes_before_the_file(key_file: Path) -> None:
    key = Settings.model_validate({"api_key": "a key", "api_key_file": key_file}).key
    assert key is not None
    assert key.get_secret_value() == "a key"


def test_an_empty_variable_leaves_the_word_to_the_file(key_file: Path) -> None:
    """Compose files pass `VERITUNE_API_KEY` on even when it is not set."""
    key = Settings.model_validate({"api_key": "", "api_key_file": key_file}).key
    assert key is not None
    assert key.get_secret_value() == "the key of the file"


def test_an_empty_variable_is_no_key() -> None:
    assert Settings.model_validate({"api_key": ""}).key is None
    with pytest.raises(ValidationError, match="VERITUNE_API_KEY"):
        Settings.model_validate({"api_key": "", "host": "0.0.0.0"})


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("content", [b"", b" \n", None, b"\xff\xfe"], ids=["empty", "blank", "missing", "not utf-8"])
def test_a_key_file_without_a_key_stops_the_start(tmp_path: Path, host: str, content: bytes | None) -> None:
    """Also on loopback: whoever names a file means to be guarded."""
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValidationError, match="VERITUNE_API_KEY_FILE"):
        Settings(host=host, api_key_file=path)


def test_a_key_that_no_header_can_carry_stops_the_start() -> None:
    for key in ("two\nlines", "nul\0", "a key with an é"):
        with pytest.raises(ValidationError, match="VERITUNE_API_KEY") as caught:
            Settings.model_validate({"api_key": key})
        assert key not in str(caught.value)


def test_secrets_do_not_show(key_file: Path) -> None:
    settings = Settings.model_validate(
        {"api_key": "a key", "api_key_file": key_file, "inference_secret": "another secret"}
    )
    shown = f"{settings!r} {settings} {settings.model_dump_json()} {settings.key!r}"
    assert "a key" not in shown
    assert "another secret" not in shown


@pytest.mark.parametrize(
    ("field", "value"),
    [("port", 70_000), ("port", -1), ("max_upload_bytes", 0), ("max_json_bytes", 10), ("prediction_slots", 0),
     ("lease_seconds", 0), ("poll_seconds", -1), ("max_sequence_length", 1), ("log_format", "xml")],
)  # fmt: skip
def test_values_that_cannot_work(field: str, value: object) -> None:
    with pytest.raises(ValidationError, match=field):
        Settings.model_validate({field: value})


@pytest.mark.parametrize(
    ("field", "url", "reason"),
    [("database_url", "veritune.db", "begins with one of sqlite://"), ("database_url", "mysql://db/x", "postgresql://"),
     ("database_url", "postgresql+asyncpg://db/x", "begins"), ("redis_url", "localhost", "redis://"),
     ("storage_url", "/var/blobs", "file://"), ("inference_url", "inference:8001", "http://"),
     ("inference_url", "http://inference:http", "its port"), ("redis_url", "redis://redis:0", "its port")],
)  # fmt: skip
def test_an_address_that_leads_nowhere(field: str, url: str, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Settings.model_validate({field: url})


def test_a_refused_address_does_not_show_its_password() -> None:
    with pytest.raises(ValidationError, match="as %2F and %23") as caught:
        Settings(database_url="postgresql://someone:pass/word#1@db/veritune")
    assert not {"pass", "word"} & set(re.findall(r"[a-z]+", str(caught.value).replace("password's", "")))


def test_what_is_refused_is_told_by_its_variables_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PORT", "eighty"), ("INFERENCE_MAX_BATCH", "0")):
        monkeypatch.setenv(f"VERITUNE_{name}", value)
    with pytest.raises(SystemExit) as caught:
        read_settings()
    told = str(caught.value)
    assert told.startswith("veritune: VERITUNE_PORT: ")
    assert "; VERITUNE_INFERENCE_MAX_BATCH: " in told
    assert "\n" not in told


def test_a_rule_of_several_settings_names_them_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERITUNE_HOST", "0.0.0.0")
    with pytest.raises(SystemExit, match=r"^veritune: host 0\.0\.0\.0 is not loopback: set VERITUNE_API_KEY"):
        read_settings()


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1  # type: ignore[misc]


def test_queues_are_a_list() -> None:
    assert Settings(worker_queues=" gpu, ,cpu ").queues == ("gpu", "cpu")


@pytest.mark.parametrize(("queues", "named"), [("gpuu", "gpuu"), ("gpu,tpu", "tpu"), (" ,", "no queue")])
def test_a_queue_that_nobody_rings_is_refused_by_name(queues: str, named: str) -> None:
    with pytest.raises(ValidationError, match=f"names {named}; known are: cpu, gpu"):
        Settings(worker_queues=queues)
