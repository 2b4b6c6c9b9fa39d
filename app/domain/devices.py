"""Devices: the machines that workers report, and kinds of GPU cards that a plan can be made for."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from app.domain.frozen import Frozen
from app.domain.ledger import Reservation
from app.domain.memory import Machine


class DeviceDescription(Frozen):
    """A worker's report of its host. `bytes`: memory for models. `capability`: CUDA compute capability, None on a CPU.

    `bfloat16`: whether the CPU computes fast in bfloat16. `tokens_per_second`: digest of a served base → training speed
    of the last job over it on this device.
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
        """The device in the terms of the memory estimate. `worker.precision` chooses the same number formats."""
        is_16_bit = self.bfloat16 if self.capability is None else self.capability >= (7, 0)
        return Machine(self.type, 2 if is_16_bit else 4)


class NamedDevice(DeviceDescription):
    """A device that a plan can be made for: reported by a worker, or a kind of card."""

    name: str

    @property
    def host(self) -> str:
        """The machine's name.

        A worker's name is HOST/QUEUES; all workers and inference on one host share its device.
        """
        return self.name.rpartition("/")[0] or self.name


class Device(NamedDevice):
    """A device as the API returns it. `online`: its worker reported within the last minute. `reservations`: the
    tenants' current reservations; listed with the worker that trains there."""

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
"""Kinds of cards by name, with the memory that the driver leaves free."""
