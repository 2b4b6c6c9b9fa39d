"""A real job's resident memory on this machine's processor, beside its plan."""

import json

import pytest

from app.domain.architectures import Architecture
from app.domain.attempts import EncodedRow, TrainingFailed, TrainingFinished
from app.domain.memory import MAX_HOLES, Machine, estimate_memory
from tests.conftest import catalogue_model
from tests.training.conftest import OrderFactory
from worker.child import Child
from worker.processor import cpu_here
from worker.training.memory import Heap, peak_resident_bytes, resident_bytes, return_free_memory

SMOLLM2 = catalogue_model("smollm2-135m")
LONGEST, LABELLED = 256, 0.4


def rows() -> list[EncodedRow]:
    """Rows of 240 to 256 tokens: three fill a micro-batch of 768. The last 40 % of each carry a loss."""
    lengths = [LONGEST - 8 * (number % 3) for number in range(12)]
    return [
        EncodedRow(line=number, ids=(5,) * length, trained=((length - round(LABELLED * length), length),))
        for number, length in enumerate(lengths, start=1)
    ]


@pytest.mark.skipif(SMOLLM2 is None, reason="the small model is not here")
@pytest.mark.skipif(not cpu_here().fast_bf16, reason="only processors that compute in bfloat16 were measured")
def test_a_small_job_takes_at_most_what_was_planned_and_no_less_than_four_fifths(make_order: OrderFactory) -> None:
    assert SMOLLM2 is not None
    spec = {"adapter": {"type": "lora", "r": 16}, "trainer": {"effective_batch_size": 6}}
    order = make_order(spec, updates=2, rows=rows(), base=SMOLLM2.path)
    schedule = order.schedule.model_copy(update={"max_tokens": 768})
    child = Child("worker.training")
    try:
        child.begin(order.model_copy(update={"schedule": schedule}))
        while not isinstance(event := child.next(300), TrainingFinished | TrainingFailed):
            assert event is not None
    finally:
        child.kill()
    assert isinstance(event, TrainingFinished)
    sizes = Architecture.from_config(json.loads((SMOLLM2.path / "config.json").read_text()))
    assert sizes is not None
    batch = schedule.get_largest_micro_batch(LONGEST, LABELLED)
    planned = estimate_memory(sizes, order.spec, batch, Machine("cpu", 2), recompute=False, stored=SMOLLM2.bytes)
    assert 0.8 * planned.total <= event.metrics["peak_memory_bytes"] <= planned.total


def test_the_peak_is_this_processs_own_and_at_least_what_is_resident_now() -> None:
    assert resident_bytes() <= peak_resident_bytes()


def test_free_pages_of_the_heap_go_back_to_the_system() -> None:
    """Small blocks fill the heap, and a last one stays at its top."""
    blocks = [bytearray(100_000) for _ in range(1_000)]
    last = bytearray(100_000)

    full = resident_bytes()
    blocks.clear()
    return_free_memory()
    assert resident_bytes() < full - 50_000_000
    assert last


def leave_holes(count: int) -> list[bytearray]:
    blocks = [bytearray(50_000) for _ in range(count)]
    return blocks[::100]  # one of a hundred stays, between holes


def test_holes_are_returned_once_the_heap_has_grown_by_their_limit() -> None:
    heap = Heap(limit=0)
    heap.trim_if_grown()
    heap.trim_if_grown()
    start = resident_bytes()
    few = leave_holes(MAX_HOLES // 4 // 50_000)
    heap.trim_if_grown()
    assert resident_bytes() > start + MAX_HOLES // 5
    many = leave_holes(3 * MAX_HOLES // 2 // 50_000)
    assert resident_bytes() > start + MAX_HOLES
    heap.trim_if_grown()
    assert resident_bytes() < start + MAX_HOLES // 4
    assert few
    assert many


def test_holes_stay_up_to_the_planned_limit() -> None:
    return_free_memory()
    start = resident_bytes()
    heap = Heap(limit=start + 3 * MAX_HOLES)
    below = leave_holes(2 * MAX_HOLES // 50_000)
    heap.trim_if_grown()
    assert resident_bytes() > start + MAX_HOLES
    above = leave_holes(4 * MAX_HOLES // 50_000)
    heap.trim_if_grown()
    assert resident_bytes() < start + MAX_HOLES // 2
    assert below
    assert above
