"""Devices: the machines that workers report, what is known of their pace, and cards that a plan may be asked for."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from app.domain.frozen import Frozen
from app.domain.ledger import Reservation
from app.domain.memory import Machine


class DeviceDescription(Frozen):
    """What a worker says of its host. `bytes` is the memory a model may use; `capability` is CUDA's, or None.

    `bfloat16`: whether a CPU is fast in it. `tokens_per_second`: digest of a served base → what a job over it last
    had here.
    """

    type: Literal["cpu", "gpu"]
    model: str
    bytes: int
    capability: tuple[int, int] | None = None
    bfloat16: bool = False
    cores: int
    queues: tuple[str, ...]
    tokens_per_second: dict[str, float] = Field(default_factory=dict)

    @property
    def machine(self) -> Machine:
        """As the memory model sees it; the formats are those of `worker.precision`."""
        narrow = self.bfloat16 if self.capability is None else self.capability >= (7, 0)
        return Machine(self.type, 2 if narrow else 4)


class NamedDevice(DeviceDescription):
    """A device that a plan can be made for: one that a worker reported, or a card by its kind."""

    name: str

    @property
    def host(self) -> str:
        """The machine, which all its workers and inference share: a worker's name is HOST/QUEUES."""
        return self.name.rpartition("/")[0] or self.name


class Device(NamedDevice):
    """A device as the API shows it. `online`: heard of within the last minute. `reservations`: who has how much of it
    now; shown with the worker that trains there."""

    last_seen: datetime
    online: bool
    reservations: tuple[Reservation, ...] = ()


def _card(name: str, model: str, gibibytes: float, capability: tuple[int, int]) -> NamedDevice:
    size = int(gibibytes * 2**30)
    return NamedDevice(name=name, type="gpu", model=model, bytes=size, capability=capability, cores=1, queues=())


CARDS: dict[str, NamedDevice] = {
    card.name: card
    for card in (
        _card("t4", "NVIDIA T4", 14.5, (7, 5)),
        _card("a10", "NVIDIA A10", 22.0, (8, 6)),
        _card("l4", "NVIDIA L4", 22.0, (8, 9)),
        _card("a100-40", "NVIDIA A100, 40 GB", 39.4, (8, 0)),
        _card("h100", "NVIDIA H100, 80 GB", 79.1, (9, 0)),
    )
}
"""Cards by kind, each with what a driver leaves of its memory."""
