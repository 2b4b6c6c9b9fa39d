"""The deployment's settings: environment variables (`VERITUNE_*`) → `Settings`. The job's own are in its spec."""

import hashlib
import socket
import sys
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.queue.base import QUEUES

LOOPBACK = ("127.0.0.1", "localhost", "::1")
EVERY_ADDRESS = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}
"""Hosts to listen on that stand for all addresses, and the one of them that this machine reaches itself at."""

SCHEMES = {
    "database_url": ("sqlite", "postgresql", "postgresql+psycopg"),
    "redis_url": ("redis", "rediss", "redis+socket"),
    "storage_url": ("file", "s3", "gs", "az", "memory"),
    "inference_url": ("http", "https"),
}
"""What an address may begin with."""

_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 108 bytes, NUL included


class Settings(BaseSettings):
    """Every field is an environment variable in upper case behind `VERITUNE_`."""

    model_config = SettingsConfigDict(
        env_prefix="VERITUNE_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # an error about one field would show the others, the key among them
    )

    home: Path = Field(default=Path("~/.veritune"), description="Directory of all embedded state.")
    cache: Path | None = Field(default=None, description="Weights and downloads; default is `cache` under home.")
    database_url: str | None = Field(
        default=None, description="SQLAlchemy URL (sqlite://, postgresql://); default is SQLite under home."
    )
    redis_url: str | None = Field(
        default=None,
        description="Broker URL (redis://, rediss://, redis+socket://); default is a socket that `veritune up` serves.",
    )
    storage_url: str | None = Field(
        default=None, description="file://, s3://, gs://, az:// or memory://; default is under home."
    )

    host: str = Field(default="127.0.0.1", description="Where the API listens.")
    port: int = Field(default=8000, ge=0, le=65535, description="The API's port.")
    api_key: SecretStr | None = Field(default=None, description="Bearer key; required off loopback.")
    api_key_file: Path | None = Field(default=None, description="A file that holds the bearer key.")
    allowed_hosts: str = Field(
        default="",
        description="Further hosts, comma-separated, that a request may name in Host or come from in Origin; the bind "
        "host always may.",
    )

    inference_host: str = Field(default="127.0.0.1", description="Where the inference front listens.")
    inference_port: int = Field(default=8001, ge=1, le=65535, description="The inference front's port.")
    inference_url: str | None = Field(
        default=None, description="An OpenAI-completions server; default is the embedded front."
    )
    inference_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of the engine; auto follows the device."
    )
    inference_max_batch: int = Field(
        default=16, ge=1, le=256, description="Sequences that the engine answers at once; others wait."
    )
    inference_secret: SecretStr | None = Field(default=None, description="Shared secret of API and inference.")

    default_base_model: str = Field(default="smollm2-135m", description="The base model of a spec without one.")
    max_upload_bytes: int = Field(default=1 << 30, ge=1, description="Largest upload.")
    max_json_bytes: int = Field(default=1 << 20, ge=1_024, description="Largest JSON body.")
    prediction_slots: int = Field(
        default=32,
        ge=1,
        le=1_000,
        description="Predictions, or batches of them, that an API process takes at once, a quarter of them kept from "
        "any one model; more get 429.",
    )
    max_sequence_length: int = Field(
        default=2_048, ge=64, description="Cap on the sequence length a spec gets by default."
    )
    lease_seconds: float = Field(
        default=30.0, gt=0, description="How long an attempt holds its job without a heartbeat."
    )
    poll_seconds: float = Field(default=2.0, gt=0, description="How often a worker looks for work without a doorbell.")
    device_policy: Literal["auto", "yield", "exclusive"] = Field(
        default="auto",
        description="Whether inference stays while a job trains: auto, where both fit the device; yield, never; "
        "exclusive, never, and one job at a time.",
    )
    inference_memory: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of the device that inference may take; default is half.",
    )
    warm_start: bool = Field(
        default=True,
        description="Keep a training process ready while there is no job: one starts 4 s sooner, for 0.5 GB.",
    )
    checkpoint_ttl_hours: float = Field(
        default=24.0, ge=0, description="How long the checkpoints of a job stay once it has ended."
    )
    worker_queues: str = Field(default="gpu,cpu", description="Queues a worker serves, comma-separated.")
    device_name: str | None = Field(
        default=None,
        description="This host's name in GET /devices. Trainer and inference of one name share a device.",
    )
    log_format: Literal["text", "json"] = Field(default="text", description="How processes write their logs.")

    @field_validator(*SCHEMES)
    @classmethod
    def _an_address(cls, url: str | None, info: ValidationInfo) -> str | None:
        known = SCHEMES[str(info.field_name)]
        if not url:
            return url
        if url.partition("://")[0] not in known or "://" not in url:
            raise ValueError(f"an address begins with one of {', '.join(f'{name}://' for name in known)}")
        try:
            port = urlsplit(url).port
        except ValueError:  # whose words may hold a part of the password
            port = 0
        if port == 0:
            raise ValueError("its port is no number from 1 to 65535; a password's / and # are written %2F and %23")
        return url

    @field_validator("worker_queues")
    @classmethod
    def _known_queues(cls, names: str) -> str:
        known = sorted(set(QUEUES.values()))
        unknown = [name for name in _words(names) if name not in known]
        if unknown or not _words(names):
            raise ValueError(f"names {', '.join(unknown) or 'no queue'}; known are: {', '.join(known)}")
        return names

    @model_validator(mode="after")
    def _key_off_loopback(self) -> Self:
        if self.key is None and self.host not in LOOPBACK:
            raise ValueError(
                f"host {self.host} is not loopback: set VERITUNE_API_KEY or VERITUNE_API_KEY_FILE to guard it"
            )
        return self

    @model_validator(mode="after")
    def _secret_off_loopback(self) -> Self:
        if self.inference_secret is None and self.inference_host not in LOOPBACK:
            raise ValueError(
                f"inference_host {self.inference_host} is not loopback: set VERITUNE_INFERENCE_SECRET to guard it"
            )
        return self

    @property
    def key(self) -> SecretStr | None:
        """The bearer key, from the variable or, where that is empty, the file; None: no key is asked for."""
        text = self.api_key.get_secret_value().strip() if self.api_key else ""
        if not text and self.api_key_file:
            text = _key_of(self.api_key_file)
        if not (text.isascii() and text.isprintable()):
            raise ValueError("VERITUNE_API_KEY holds characters that no HTTP header can carry; use printable ASCII")
        return SecretStr(text) if text else None

    @cached_property
    def home_path(self) -> Path:
        return self.home.expanduser().resolve()

    @cached_property
    def cache_path(self) -> Path:
        return self.cache.expanduser().resolve() if self.cache else self.home_path / "cache"

    @cached_property
    def work_path(self) -> Path:
        return self.home_path / "work"

    @cached_property
    def run_path(self) -> Path:
        """Sockets live here: under home, or in the temporary directory when that path would be too long."""
        run = self.home_path / "run"
        if len(str(run / "redis.sock")) <= _LONGEST_SOCKET_PATH:
            return run
        name = hashlib.sha256(str(self.home_path).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"veritune-{name}"

    @cached_property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.home_path / 'veritune.db'}"

    @cached_property
    def broker(self) -> str:
        return self.redis_url or f"redis+socket://{self.run_path / 'redis.sock'}"

    @cached_property
    def storage(self) -> str:
        return self.storage_url or f"file://{self.home_path / 'blobs'}"

    @cached_property
    def api_url(self) -> str:
        """Where processes of this machine reach the API."""
        host = EVERY_ADDRESS.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @cached_property
    def inference(self) -> str:
        return (self.inference_url or f"http://127.0.0.1:{self.inference_port}").rstrip("/")

    @cached_property
    def queues(self) -> tuple[str, ...]:
        return _words(self.worker_queues)

    @cached_property
    def host_name(self) -> str:
        return self.device_name or socket.gethostname()

    @cached_property
    def worker_name(self) -> str:
        """What this host's worker of these queues is called in GET /devices."""
        return f"{self.host_name}/{'+'.join(self.queues)}"


def read_settings() -> Settings:
    """What the environment says, for a process's start. Raises SystemExit: what is refused, and why, in one line."""
    try:
        return Settings()
    except ValidationError as error:
        told = "; ".join(_told(item["loc"], item["msg"]) for item in error.errors(include_input=False))
    sys.exit(f"veritune: {told}")


def _told(place: tuple[int | str, ...], message: str) -> str:
    """A message of one field does not name it; one of several fields (no place) does."""
    variable = "".join(f"VERITUNE_{str(field).upper()}: " for field in place[:1])
    return variable + message.removeprefix("Value error, ")


def _words(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def _key_of(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"VERITUNE_API_KEY_FILE {path} cannot be read: {error}") from None
    if not text:
        raise ValueError(f"VERITUNE_API_KEY_FILE {path} is empty")
    return text
