"""Places of adapters: filled once, laid out for the kernel once they stay, given back once less would do."""

from collections.abc import Callable

import pytest
import torch

from worker.inference.errors import OutOfMemory
from worker.inference.model.adapter_slots import (
    PACK_AFTER_STEPS,
    SHRINK_AFTER_CAPTURED_STEPS,
    SHRINK_AFTER_STEPS,
    AdapterSlots,
)
from worker.inference.model.lora import LayerLora, LoraBatch, LoraPair, PackedLayerLora
from worker.processor import cpu_here

WIDTHS = [(32, 64), (32, 32), (32, 96), (48, 32)]
LAYERS = 2


def adapter(seed: int, rank: int, dtype: torch.dtype = torch.float32) -> list[LayerLora]:
    """Beside every product of every layer, at this rank."""
    draw = torch.Generator().manual_seed(seed)

    def lora(widths: tuple[int, int]) -> LoraPair:
        down, up = widths
        drawn = torch.randn(rank, down + up, generator=draw).to(dtype)
        return LoraPair(drawn[:, :down].contiguous(), drawn[:, down:].contiguous(), rank)

    return [LayerLora(*map(lora, WIDTHS)) for _ in range(LAYERS)]


def stack(dtype: torch.dtype = torch.float32, *, steady: bool = False) -> AdapterSlots:
    return AdapterSlots(LAYERS, WIDTHS, torch.zeros(1, dtype=dtype), steady=steady)


def added(mix: LoraBatch | None, x: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's first product gets from the adapters: x [rows, 32] → [rows, 64]."""
    assert mix is not None
    found = []
    for layer in mix.layers:
        assert layer.qkv is not None
        down = layer.qkv.down(x)
        if mix.other_adapter_mask is not None:
            down.view(*mix.other_adapter_mask.shape[:2], -1).masked_fill_(mix.other_adapter_mask, 0)
        found.append(layer.qkv.add_up(x.new_zeros(len(x), 64), down))
    return found


@pytest.mark.skipif(not cpu_here().fast_bf16, reason="only bfloat16 of the processor's own has another layout")
def test_places_that_stay_are_laid_out_for_the_kernel_and_give_the_same_bits() -> None:
    held = stack(torch.bfloat16)
    adapters = {str(n): adapter(n, 1 + 2 * n, torch.bfloat16) for n in range(4)}
    x = torch.randn(4, 32).bfloat16()
    first = held.select(list(adapters), adapters)
    plain = held.bytes
    for _ in range(PACK_AFTER_STEPS):
        last = held.select(list(adapters), adapters)
    assert held.bytes == 2 * plain
    assert first is not None
    assert isinstance(first.layers[0], LayerLora)
    assert last is not None
    assert isinstance(last.layers[0], PackedLayerLora)
    for one, other in zip(added(first, x), added(last, x), strict=True):
        assert torch.equal(one, other)


def test_what_overflows_in_one_adapter_does_not_reach_the_rows_of_another() -> None:
    held = stack()
    adapters = {"sound": adapter(1, 4), "wild": adapter(2, 4)}
    for layer in adapters["wild"]:
        assert layer.qkv is not None
        layer.qkv.lora_A.fill_(3e38)
    x = torch.ones(2, 32)
    alone = added(held.select(["sound", "sound"], adapters), x)

    for mixed, own in zip(added(held.select(["sound", "wild"], adapters), x), alone, strict=True):
        torch.testing.assert_close(mixed[0], own[0])
        assert not mixed[1].isfinite().all()


@pytest.mark.skipif(not cpu_here().fast_bf16, reason="only bfloat16 of the processor's own has another layout")
def test_whoever_takes_a_place_is_seen_in_the_kernels_layout_too() -> None:
    held = stack(torch.bfloat16)
    adapters = {str(n): adapter(n, 4, torch.bfloat16) for n in range(3)}
    x = torch.randn(2, 32).bfloat16()
    for _ in range(PACK_AFTER_STEPS + 1):
        held.select(["0", "1"], adapters)
    for _ in range(PACK_AFTER_STEPS + 1):
        mixed = held.select(["2", "1"], adapters)
    alone = [added(LoraBatch(adapters[name]), x[row : row + 1]) for row, name in enumerate("21")]
    for layer, rows in enumerate(added(mixed, x)):
        assert torch.equal(rows, torch.cat([own[layer] for own in alone]))


def test_one_wide_adapter_does_not_widen_all_places_for_good() -> None:
    held = stack()
    adapters = {"wide": adapter(0, 64), "a": adapter(1, 4), "b": adapter(2, 4)}
    held.select(["a", "b"], adapters)
    narrow = held.bytes
    held.select(["wide", "a", "b", "a"], adapters)
    assert held.bytes > 20 * narrow
    for _ in range(SHRINK_AFTER_STEPS):
        held.select(["a", "b"], adapters)
    assert held.bytes > 20 * narrow, "gone before it was sure that nobody needs it"
    held.select(["a", "b"], adapters)
    assert held.bytes == narrow


def test_few_adapters_soon_read_few_places() -> None:
    held = stack()
    adapters = {str(n): adapter(n, 4) for n in range(8)}
    held.select(list(adapters), adapters)
    for _ in range(SHRINK_AFTER_STEPS + 1):
        last = held.select(["6", "7"], adapters)
    assert last is not None
    assert last.other_adapter_mask is not None
    assert last.other_adapter_mask.shape[1] == 2
    x = torch.randn(2, 32)
    for layer, rows in enumerate(added(last, x)):
        wanted = torch.cat([added(LoraBatch(adapters[name]), x[row : row + 1])[layer] for row, name in enumerate("67")])
        assert torch.allclose(rows, wanted, atol=1e-4)


def test_who_was_needed_least_recently_gives_up_its_place() -> None:
    held = stack()
    adapters = {str(n): adapter(n, 4) for n in range(5)}
    held.select(["0", "1", "2", "3"], adapters)
    held.select(["3", "0", "2", None], adapters)
    held.select(["4", "3", None, None], adapters)
    assert set(held._slots) == {"0", "2", "3", "4"}


def test_places_for_which_there_is_no_memory_leave_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    places, mixed = stack(), {"a": adapter(1, 2), "b": adapter(2, 2)}
    with monkeypatch.context() as patch:
        patch.setattr(AdapterSlots, "_empty", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
        with pytest.raises(torch.OutOfMemoryError):
            places.select(["a", "b"], mixed)
    assert places.bytes == 0
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    for found, wanted in zip(
        added(places.select(["a", "b"], mixed), x), added(stack().select(["a", "b"], mixed), x), strict=True
    ):
        torch.testing.assert_close(found, wanted)
        assert found.any()


def test_steady_places_become_fewer_only_once_that_is_worth_new_recordings() -> None:
    held = stack(steady=True)
    adapters = {str(n): adapter(n, 4) for n in range(4)}
    generation, many = places_of(held.select(list(adapters), adapters))
    for _ in range(SHRINK_AFTER_CAPTURED_STEPS):
        assert places_of(held.select(["3"], adapters))[0] is generation
    moved, one = places_of(held.select(["3"], adapters))
    assert moved is not generation
    assert (many, one) == (4, 1)


def places_of(mix: LoraBatch | None) -> tuple[object, int]:
    assert mix is not None
    assert mix.slots is not None
    return mix.slots


@pytest.mark.parametrize("steady", [False, True])
def test_a_wide_adapter_does_not_widen_the_places_that_nobody_needs(steady: bool) -> None:
    held = stack(steady=steady)
    adapters = {str(n): adapter(n, 4) for n in range(16)} | {"wide": adapter(16, 80)}
    held.select(list(adapters)[:16], adapters)
    narrow = held.bytes
    held.select(["wide", None], adapters)
    assert held.bytes < 2 * narrow
    held.select(list(adapters)[:16], adapters)
    assert held.bytes == narrow


def growth(held: AdapterSlots, rows: list[str | None], adapters: dict[str, list[LayerLora]]) -> int:
    """The bytes that a reservation for these rows asks room for. It is refused, and changes nothing."""
    asked = []

    def refuse(needed: Callable[[], int]) -> None:
        asked.append(needed())
        raise OutOfMemory

    before = held.bytes
    with pytest.raises(OutOfMemory):
        held.reserve(rows, adapters, refuse)
    assert held.bytes == before
    return asked[0]


@pytest.mark.parametrize("steady", [False, True])
def test_who_had_a_place_keeps_one_where_that_takes_little(steady: bool) -> None:
    held = stack(steady=steady)
    adapters = {str(n): adapter(n, 4) for n in range(4)} | {"wide": adapter(4, 8)}
    held.select(["0", "1", "2", "3"], adapters)
    generation, _ = places_of(held.select(["wide", "0"], adapters))
    again, _ = places_of(held.select(["0", "1", "2", "3"], adapters))
    assert again is generation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_places_will_take_is_known_before(dtype: torch.dtype) -> None:
    held = stack(dtype)
    adapters = {str(n): adapter(n, 1 + n, dtype) for n in range(9)}
    batches: list[list[str | None]] = [["0", "1"], ["2", None], list(adapters), ["8", "7", None], ["1"], [None]]
    for rows in batches:
        before, foreseen = held.bytes, growth(held, rows, adapters)
        for _ in range(PACK_AFTER_STEPS + 1):
            held.select(rows, adapters)
        assert held.bytes <= before + foreseen, rows
        if dtype is torch.float32 and held.bytes > before:
            assert held.bytes == before + foreseen, rows


def test_one_alone_is_computed_in_shapes_that_do_not_depend_on_others() -> None:
    held = stack(steady=True)
    adapters = {"own": adapter(0, 4), "wide": adapter(1, 32)}
    x = torch.randn(1, 32)
    first = held.select(["own"], adapters, deterministic=True)
    held.select(["wide", "own"], adapters)
    second = held.select(["own"], adapters, deterministic=True)
    for mix in (first, second):
        assert mix is not None
        assert mix.slots is None
        assert mix.other_adapter_mask is None
        assert [layer.qkv.lora_A.shape[0] for layer in mix.layers if isinstance(layer.qkv, LoraPair)] == [4] * LAYERS
        for found, wanted in zip(added(mix, x), added(LoraBatch(adapters["own"]), x), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("steady", [False, True])
def test_all_that_is_read_comes_to_the_device(steady: bool) -> None:
    """Adapters lie in the host's memory. The other device has no numbers here, but tensors that know where they are."""
    held = AdapterSlots(LAYERS, WIDTHS, torch.zeros(1, device="meta"), steady=steady)
    adapters = {str(n): adapter(n, 4) for n in range(3)}
    size = sum(lora.nbytes for layer in adapters["0"] for lora in layer if lora)
    for rows, places in ((["0", "2", None], 2), (["1"], 1)):
        mix = held.select(rows, adapters)
        assert mix is not None
        parts = [part for layer in mix.layers for lora in layer if isinstance(lora, LoraPair) for part in lora[:2]]
        assert {part.device.type for part in parts} == {"meta"}
        assert mix.slots is not None
        assert mix.slots[1] == places
    assert held.bytes == 2 * size
    assert {
        out.device.type
        for out in added(held.select(["1"], adapters, deterministic=True), torch.zeros(1, 32, device="meta"))
    } == {"meta"}
    assert held.bytes == 2 * size


def test_what_was_promised_to_a_crowd_is_free_once_it_has_left() -> None:
    held = stack()
    adapters = {str(n): adapter(n, 4) for n in range(8)}
    held.reserve(list(adapters), adapters, lambda _: None)
    crowd = held.bytes
    assert growth(held, ["0", "1"], adapters) == 0
    held.reserve(["0", "1"], adapters, lambda _: None)
    assert held.bytes == crowd // 4
    held.select(["0", "1"], adapters)
    assert held.bytes == crowd // 4
    held.free()
    assert held.bytes == 0
