"""This host's processor: its vendor and instruction sets, read from Linux."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Cpu:
    """A processor by its maker and its instruction sets, as Linux names them."""

    vendor: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def fast_bf16(self) -> bool:
        """Whether bfloat16 products beat float32 ones.

        With AMX they do by far. With AVX512_BF16 alone they do on AMD; Intel issues one such product every other
        cycle against two float32 ones a cycle: 80 against 147 GFLOP/s a core were measured.
        """
        return "amx_bf16" in self.flags or ("avx512_bf16" in self.flags and self.vendor == "AuthenticAMD")


def read_cpu(cpuinfo: str) -> Cpu:
    """The first processor of a /proc/cpuinfo text."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return Cpu(facts.get("vendor_id", ""), frozenset(facts.get("flags", "").split()))


def cpu_here() -> Cpu:
    """This machine's, as Linux describes it; elsewhere one of which nothing is known."""
    cpuinfo = Path("/proc/cpuinfo")
    return read_cpu(cpuinfo.read_text(encoding="utf-8")) if cpuinfo.exists() else Cpu()
