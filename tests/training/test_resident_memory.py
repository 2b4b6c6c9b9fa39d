"""A training process's resident memory."""

from pathlib import Path

from worker.training.memory import peak_resident_bytes, return_free_memory


def test_the_peak_is_this_processs_own_and_at_least_what_is_resident_now() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    assert resident <= peak_resident_bytes()


def test_free_pages_of_the_heap_go_back_to_the_system() -> None:
    """Small blocks fill the heap, and a last one stays at its top."""
    blocks = [bytearray(100_000) for _ in range(1_000)]
    last = bytearray(100_000)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    full = resident()
    blocks.clear()
    return_free_memory()
    assert resident() < full - 50_000_000
    assert last
