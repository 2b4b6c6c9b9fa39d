"""Devices: the machines that workers report, and what is known of their pace."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DeviceDescription(BaseModel):
    """What a worker says of its host. `bytes` is the memory a model may use; `capability` is CUDA's, or None."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["cpu", "gpu"]
    model: str
    bytes: int
    capability: tuple[int, int] | None = None
    cores: int
    queues: tuple[str, ...]
    tokens_per_second: dict[str, float] = Field(default_factory=dict)


class Device(DeviceDescription):
    """A device as the API shows it. `online`: heard of within the last minute."""

    name: str
    last_seen: datetime
    online: bool
