"""The deployment's settings, from environment variables (`VERITUNE_*`). A job's settings are in its spec."""

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

from app.domain.model_catalogue import DEFAULT_BASE_MODEL
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
"""Each address setting → the URL schemes that it accepts."""

_LONGEST_SOCKET_PATH = 100  # the kernel's limit is 108 bytes, NUL included


class Settings(BaseSettings):
    """Each field is read from the environment variable `VERITUNE_` + its name in upper case."""

    model_config = SettingsConfigDict(
        env_prefix="VERITUNE_",
        frozen=True,
        extra="ignore",
        hide_input_in_errors=True,  # an error would show the input of all fields, the API key included
    )

    home: Path = Field(default=Path("~/.veritune"), description="Directory of all embedded state.")
    cache: Path | None = Field(
        default=None, description="Directory of weights and downloads; default is `cache` under home."
    )
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

    host: str = Field(default="127.0.0.1", description="Host that the API binds.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port that the API binds.")
    api_key: SecretStr | None = Field(
        default=None, description="Bearer key of the API; required if host is not loopback."
    )
    api_key_file: Path | None = Field(default=None, description="File that contains the bearer key.")
    allowed_hosts: str = Field(
        default="",
        description="Accepts requests that name one of these hosts in Host or Origin, in addition to the bind host. "
        "Host names without a port, comma-separated; default is none. With none, and a bind host that is not "
        "loopback, Host is not checked.",
    )

    inference_host: str = Field(default="127.0.0.1", description="Host that the inference server binds.")
    inference_port: int = Field(default=8001, ge=1, le=65535, description="Port that the inference server binds.")
    inference_url: str | None = Field(
        default=None,
        description="URL of a server with OpenAI's completions protocol; default is the embedded inference server.",
    )
    inference_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Number format of the engine; auto chooses by the device."
    )
    inference_max_batch: int = Field(
        default=16, ge=1, le=256, description="Most sequences in one decode batch; further ones wait."
    )
    inference_secret: SecretStr | None = Field(
        default=None, description="Shared secret of the API and the inference server."
    )

    default_base_model: str = Field(
        default=DEFAULT_BASE_MODEL, description="Base model of a job whose spec names none."
    )
    max_upload_bytes: int = Field(default=1 << 30, ge=1, description="Largest upload, in bytes.")
    max_json_bytes: int = Field(default=1 << 20, ge=1_024, description="Largest JSON request body, in bytes.")
    prediction_slots: int = Field(
        default=32,
        ge=1,
        le=1_000,
        description="Limits how many prediction requests one API process runs at once; default is 32 requests. "
        "A batch is one request. One model gets at most three quarters of them. A request over the limit gets 429.",
    )
    max_sequence_length: int = Field(
        default=2_048, ge=64, description="Upper limit of the default sequence length of a job, in tokens."
    )
    lease_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Lease of an attempt: another attempt may start after so many seconds without a heartbeat.",
    )
    poll_seconds: float = Field(
        default=2.0, gt=0, description="Seconds between two polls of a worker that hears no doorbell."
    )
    device_policy: Literal["auto", "yield", "exclusive"] = Field(
        default="auto",
        description="Decides whether inference runs while a job trains. auto, the default: if both fit the device. "
        "yield: it is suspended. exclusive: it is suspended, and jobs train one at a time.",
    )
    inference_memory: int | None = Field(
        default=None,
        ge=1,
        description="Bytes of the device that inference may take; default is half.",
    )
    warm_start: bool = Field(
        default=True,
        description="Keep an idle training process ready. A job then starts 4 s sooner; the process takes 0.5 GB.",
    )
    checkpoint_ttl_hours: float = Field(
        default=24.0, ge=0, description="Hours until the checkpoints of an ended job are deleted."
    )
    worker_queues: str = Field(default="gpu,cpu", description="Queues that a worker serves, comma-separated.")
    device_name: str | None = Field(
        default=None,
        description="This host's name in GET /devices. Trainer and inference of one name share a device.",
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Format of the logs.")

    @field_validator(*SCHEMES)
    @classmethod
    def _has_known_scheme(cls, url: str | None, info: ValidationInfo) -> str | None:
        known = SCHEMES[str(info.field_name)]
        if not url:
            return url
        if url.partition("://")[0] not in known or "://" not in url:
            raise ValueError(f"an address begins with one of {', '.join(f'{name}://' for name in known)}")
        try:
            port = urlsplit(url).port
        except ValueError:  # its message may contain a part of the password
            port = 0
        if port == 0:
            raise ValueError("its port is not a number from 1 to 65535; write / and # in a password as %2F and %23")
        return url

    @field_validator("worker_queues")
    @classmethod
    def _known_queues(cls, names: str) -> str:
        known = sorted(set(QUEUES.values()))
        unknown = [name for name in _split_list(names) if name not in known]
        if unknown or not _split_list(names):
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
        """The bearer key from the variable, else from the file. None: the API requires no key."""
        text = self.api_key.get_secret_value().strip() if self.api_key else ""
        if not text and self.api_key_file:
            text = _read_key_file(self.api_key_file)
        if not (text.isascii() and text.isprintable()):
            raise ValueError(
                "VERITUNE_API_KEY contains characters that an HTTP header cannot carry; use printable ASCII"
            )
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
        """Directory of sockets: under home, or in the temporary directory if that path is too long for a socket."""
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
        """The API's URL for processes on this machine."""
        host = EVERY_ADDRESS.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    @cached_property
    def inference(self) -> str:
        return (self.inference_url or f"http://127.0.0.1:{self.inference_port}").rstrip("/")

    @cached_property
    def queues(self) -> tuple[str, ...]:
        return _split_list(self.worker_queues)

    @cached_property
    def host_name(self) -> str:
        return self.device_name or socket.gethostname()

    @cached_property
    def worker_name(self) -> str:
        """Name of this host's worker in GET /devices."""
        return f"{self.host_name}/{'+'.join(self.queues)}"


def read_settings() -> Settings:
    """Reads the settings at a process's start. Exits with one line that names each invalid variable and why."""
    try:
        return Settings()
    except ValidationError as error:
        errors = "; ".join(_describe_error(item["loc"], item["msg"]) for item in error.errors(include_input=False))
    sys.exit(f"veritune: {errors}")


def _describe_error(loc: tuple[int | str, ...], message: str) -> str:
    """Puts the variable's name before a message about one field. A message about several fields names them itself."""
    variable = "".join(f"VERITUNE_{str(field).upper()}: " for field in loc[:1])
    return variable + message.removeprefix("Value error, ")


def _split_list(listed: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in listed.split(",") if word.strip())


def _read_key_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"VERITUNE_API_KEY_FILE {path} cannot be read: {error}") from None
    if not text:
        raise ValueError(f"VERITUNE_API_KEY_FILE {path} is empty")
    return text
