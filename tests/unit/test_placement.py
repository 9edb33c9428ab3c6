"""Where the copies of the model go, why, and what is said where they cannot go anywhere."""

import re
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4v_batch.device_map import is_within, spots_of
from glm4v_batch.errors import JobError, PlacementError
from glm4v_batch.job import DeviceSettings
from glm4v_batch.memory import MemoryModel
from glm4v_batch.needs import ModelNeeds
from glm4v_batch.packing import batch_of
from glm4v_batch.placement import expected_batch_size, place, priors, shares, standing_bytes
from glm4v_batch.types import BatchShape, Device, Placement, Replica, RequestSize, Spot
from tests.cards import GIB, TYPICAL, WORST, cpu, glm_41v, gpu, gpus, needs_of

LARGE = needs_of(layers=46, layer_bytes=4 * GIB, blocks=24)
"""As heavy as GLM-4.5V: 190 GiB."""


def placed(
    devices: list[Device], needs: ModelNeeds | None = None, *, host: Device | None = None, **layout: Any
) -> Placement:
    return place(devices, needs or glm_41v(), DeviceSettings(**layout), WORST, TYPICAL, host)


def refusal(devices: list[Device], needs: ModelNeeds | None = None, **layout: Any) -> PlacementError:
    with pytest.raises(PlacementError) as caught:
        placed(devices, needs, **layout)
    return caught.value


def indices(placement: Placement) -> list[list[int | None]]:
    return [[device.index for device in replica.devices] for replica in placement.replicas]


def peaks(replica: Replica, needs: ModelNeeds, shape: BatchShape) -> tuple[int, ...]:
    return MemoryModel(standing_bytes(replica, needs), priors(replica, needs)).predict(shape)


# One copy or several


def test_a_card_that_holds_the_model_gets_a_copy_for_itself() -> None:
    placement = placed(gpus(24, 24, 24, 24))

    assert indices(placement) == [[0], [1], [2], [3]]
    assert all(replica.device_map == {"": 0} for replica in placement.replicas)
    assert placement.reason == (
        "4 replicas, one per GPU: 19.17 GiB of weights and the largest request (1.65 GiB) fit on each"
    )


def test_the_fewest_cards_that_hold_a_copy_share_it() -> None:
    placement = placed(gpus(80, 80, 80, 80, 80, 80), LARGE)

    assert indices(placement) == [[0, 1, 2], [3, 4, 5]]
    assert "2 replicas over 3 GPUs each, balanced by predicted peaks: layers" in placement.reason


def test_cards_left_over_join_copies_that_are_spread_anyway() -> None:
    placement = placed(gpus(80, 80, 80, 80, 80, 80, 80, 80), LARGE)

    assert indices(placement) == [[0, 1, 2, 6], [3, 4, 5, 7]]
    assert not placement.idle


def test_a_card_too_small_for_a_copy_is_idle_beside_cards_that_hold_one_each() -> None:
    placement = placed(gpus(8, 24, 24))

    assert indices(placement) == [[1], [2]]
    assert [device.index for device in placement.idle] == [0]
    assert placement.reason.endswith("; GPU 0 idle, without room for another replica")


def test_cards_of_different_sizes_are_grouped_from_the_largest() -> None:
    placement = placed(gpus(12, 80, 16))

    assert indices(placement) == [[1], [0, 2]]
    assert placement.reason.startswith("2 replicas (1 on 1 GPU, 1 on 2 GPUs), balanced")


def test_what_others_hold_and_the_jobs_limit_count() -> None:
    held_by_others = placed([gpu(0, 24, free=12), gpu(1, 24)])
    limited = placed([gpu(0, 80, limit=12), gpu(1, 80, limit=24)])

    assert indices(held_by_others) == indices(limited) == [[1]]


def test_the_cpu_gets_one_copy() -> None:
    placement = placed([cpu(free=32)])

    (replica,) = placement.replicas
    assert replica.devices[0].index is None
    assert replica.device_map == {"": 0}
    assert placement.reason.startswith("1 replica, on the CPU: 19.17 GiB of weights")


# Layouts of the job


def test_replicas_takes_every_card_or_none() -> None:
    error = refusal(gpus(24, 24, 12), layout="replicas")

    assert "does not fit on GPU 2" in str(error)
    assert "leave devices.layout and devices.gpus_per_replica at auto" in error.hint


def test_as_many_cards_share_a_copy_as_the_job_says() -> None:
    placement = placed(gpus(24, 24, 24, 24), layout="replicas", gpus_per_replica=2)

    assert indices(placement) == [[0, 1], [2, 3]]


def test_cards_that_no_full_group_is_left_for_are_idle_only_in_auto() -> None:
    placement = placed(gpus(24, 24, 24), gpus_per_replica=2)
    error = refusal(gpus(24, 24, 24), layout="balanced", gpus_per_replica=2)

    assert indices(placement) == [[0, 1]]
    assert "GPU 2 idle" in placement.reason
    assert "devices.gpus_per_replica is 2, and 3 GPUs cannot be divided so" in str(error)


def test_more_cards_per_copy_than_there_are_is_refused() -> None:
    assert "is 4, and 3 GPUs" in str(refusal(gpus(24, 24, 24), gpus_per_replica=4))


@pytest.mark.parametrize("gib", [12, 16])
def test_balanced_fills_all_cards_alike_where_accelerate_balances_weights_alone(gib: int) -> None:
    needs, devices = glm_41v(), gpus(gib, gib, gib, gib)
    theirs = balanced_by_accelerate(needs, devices)

    placement = placed(devices, layout="balanced")

    (ours,) = placement.replicas
    batch_sizes = [expected_batch_size(replica, needs, TYPICAL, 0.92) for replica in (ours, theirs)]
    our_peaks, their_peaks = (
        peaks(replica, needs, batch_of(TYPICAL, size))
        for replica, size in zip((ours, theirs), batch_sizes, strict=True)
    )
    assert len(ours.devices) == 4
    assert max(our_peaks) < 1.05 * min(our_peaks)
    assert max(their_peaks) > 1.12 * min(their_peaks)
    assert batch_sizes[0] > 1.1 * batch_sizes[1]
    assert "1 replica over 4 GPUs, balanced by predicted peaks: layers" in placement.reason
    assert sum(share.layers * 40 for share in shares(ours, needs)[:1]) <= 2


def balanced_by_accelerate(needs: ModelNeeds, devices: list[Device]) -> Replica:
    """What `device_map: balanced` of transformers makes of GLM-4.1V-9B."""
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    from tests.families import full_size_model

    model = full_size_model("glm4v")
    classes = list(model._no_split_modules)
    free = {device.index: int(0.9 * device.free_bytes) for device in devices}
    memory = get_balanced_memory(model, max_memory=free, no_split_module_classes=classes)
    theirs = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=classes)
    # They may part the merger, which has no blocks; here it lies where its first part does.
    spots: dict[str, Spot] = {
        module.name: next(
            s for key, s in theirs.items() if is_within(module.name, key) or is_within(key, module.name)
        )
        for module in needs.modules
    }
    held = [sum(m.weight_bytes for m in needs.modules if spots[m.name] == d.index) for d in devices]
    return Replica(tuple(devices), spots, tuple(held))


def test_balanced_low_0_leaves_the_first_card_as_empty_as_possible() -> None:
    roomy = placed(gpus(24, 24, 24), layout="balanced_low_0")
    tight = placed(gpus(12, 10, 10), layout="balanced_low_0")

    assert indices(roomy) == [[1, 2]]
    assert "GPU 0 idle" in roomy.reason
    (replica,) = tight.replicas
    assert len(replica.devices) == 3
    assert replica.weight_bytes[0] < min(replica.weight_bytes[1:])


def test_sequential_fills_the_cards_in_their_order() -> None:
    placement = placed(gpus(12, 24, 24), layout="sequential")

    (replica,) = placement.replicas
    assert [device.index for device in replica.devices] == [0, 1]
    first = replica.devices[0].usable_bytes
    assert peaks(replica, glm_41v(), batch_of(WORST))[0] > 0.95 * 0.92 * first
    assert "filled one after the other" in placement.reason


def test_a_map_of_the_job_is_followed_and_counted_from_where_the_model_begins() -> None:
    layout = {"model.visual": 3, "model.language_model": 1, "lm_head": 3}

    placement = placed(gpus(24, 24, 24, 24), layout=layout)

    (replica,) = placement.replicas
    assert [device.index for device in replica.devices] == [3, 1]
    assert replica.device_map == {"model.visual": 0, "model.language_model": 1, "lm_head": 0}
    assert sum(replica.weight_bytes) == glm_41v().weight_bytes
    assert [device.index for device in placement.idle] == [0, 2]
    assert "as devices.layout says" in placement.reason


def test_a_map_that_is_wrong_is_the_jobs_mistake() -> None:
    with pytest.raises(JobError, match="GPU 4, which is not among those chosen"):
        placed(gpus(24, 24), layout={"model.visual": 4, "model.language_model": 0, "lm_head": 1})


def test_a_map_that_overfills_a_card_is_refused_with_what_it_would_take() -> None:
    error = refusal(gpus(12, 24), layout={"model.visual": 1, "model.language_model": 0, "lm_head": 1})

    assert "leaves a GPU without room" in str(error)
    assert "GPU 0 (NVIDIA RTX): 12.00 GiB; may hold 10.57 GiB" in str(error)
    assert "would take 17.7" in str(error)


@pytest.mark.parametrize("layout", [{"layout": "balanced"}, {"gpus_per_replica": 2}, {"layout": {"": 0}}])
def test_layouts_of_gpus_are_refused_on_the_cpu(layout: dict[str, Any]) -> None:
    assert "runs on the CPU" in str(refusal([cpu(free=32)], **layout))


# Offloading


def test_layers_without_room_go_to_host_memory_from_the_end_if_the_job_allows_it() -> None:
    needs = glm_41v()

    placement = placed(gpus(12), offload="cpu", host=cpu(free=64))

    (replica,) = placement.replicas
    spots = spots_of(replica.device_map, needs)
    away = [module.layer for module in needs.modules if spots[module.name] == "cpu"]
    assert away == list(range(40 - len(away), 40))
    assert 8 * GIB < replica.offloaded_bytes < 12 * GIB
    assert replica.offloaded_bytes + sum(replica.weight_bytes) == needs.weight_bytes
    assert peaks(replica, needs, batch_of(WORST))[0] <= 0.92 * 12 * GIB
    assert (
        "GiB of weights lie in host memory and are fetched for every token, which is slow" in placement.reason
    )


def test_nothing_is_offloaded_that_has_room() -> None:
    placement = placed(gpus(12, 12, 12), offload="cpu", host=cpu(free=64))

    assert [replica.offloaded_bytes for replica in placement.replicas] == [0]


def test_the_disk_takes_what_host_memory_would_not() -> None:
    error = refusal(gpus(12), offload="cpu", host=cpu(free=8))
    placement = placed(gpus(12), offload="disk", host=cpu(free=8))

    assert "does not fit on GPU 0" in str(error)
    assert "on the disk" in placement.reason


def test_copies_share_the_host_memory_that_they_offload_to() -> None:
    placement = placed(gpus(12, 12), layout="replicas", offload="cpu", host=cpu(free=24))
    error = refusal(gpus(12, 12), layout="replicas", offload="cpu", host=cpu(free=16))

    assert [replica.offloaded_bytes > 8 * GIB for replica in placement.replicas] == [True, True]
    assert "does not fit on GPU 0" in str(error)


def test_a_map_cannot_put_more_into_host_memory_than_there_is_room_for() -> None:
    layout = {"model.visual": 0, "model.language_model": "cpu", "lm_head": 0}

    error = refusal(gpus(24), layout=layout, host=cpu(free=8))

    assert "puts 16.35 GiB of weights into host memory, which has room for 7.36 GiB" in str(error)


def test_the_first_device_runs_what_lies_elsewhere_and_keeps_its_cache() -> None:
    needs = glm_41v()

    (replica,) = placed(gpus(12), offload="disk").replicas

    (share,) = shares(replica, needs)
    assert share.layers == 1
    assert standing_bytes(replica, needs)[0] > replica.weight_bytes[0]


# Shares


def test_each_device_has_its_share_of_the_work() -> None:
    needs = glm_41v()
    layout = {"model.visual": 1, "model.language_model": 0, "lm_head": 1}

    (replica,) = placed(gpus(24, 24), layout=layout).replicas

    first, second = shares(replica, needs)
    assert (first.takes_inputs, first.has_vision, first.layers, first.has_head) == (True, True, 0, True)
    assert (second.takes_inputs, second.has_vision, second.layers, second.has_head) == (
        False,
        False,
        1,
        False,
    )


# Refusals


def test_a_model_without_room_is_refused_with_all_numbers() -> None:
    error = refusal([gpu(0, 24, free=20, limit=10), gpu(1, 24, free=6)])

    assert str(error).startswith(
        "The model does not fit on GPUs 0 and 1: it takes 19.17 GiB for its weights, and beside them "
        "1.65 GiB for the largest request (6,250 prompt tokens, 24,576 patches, 128 new tokens)."
    )
    assert (
        "  GPU 0 (NVIDIA RTX): 24.00 GiB, 4.00 GiB of it held by others, limited to 10.00 GiB; "
        "may hold 9.20 GiB (devices.memory_fraction: 0.92)"
    ) in str(error)


@pytest.mark.parametrize(
    ("devices", "remedy"),
    [
        (gpus(80, 80), "use 3 GPUs with 80.00 GiB free each"),
        ([gpu(index, 80, limit=60) for index in range(3)], "raise devices.memory_limit_gib"),
        ([gpu(index, 80, free=60) for index in range(3)], "free the memory that others hold"),
        (gpus(80, 80), "use a version of the model in 8 bits"),
        (gpus(80, 80), "set devices.offload: cpu, which is much slower"),
    ],
)
def test_a_refusal_says_what_would_do(devices: list[Device], remedy: str) -> None:
    assert remedy in refusal(devices, LARGE).hint


def test_a_smaller_limit_of_pixels_is_computed_and_would_do() -> None:
    needs = glm_41v()
    devices = gpus(22)
    pixels = int(refusal(devices).hint.split("lower images.max_pixels to ")[1].split(";")[0])

    tokens = pixels // needs.pixels_per_token
    smaller = RequestSize(WORST.prompt_tokens - 6144 + tokens, 4 * tokens, WORST.new_tokens)
    placement = place(devices, needs, DeviceSettings(), smaller, TYPICAL)

    assert 1_000_000 < pixels < 4_800_000
    assert len(placement.replicas) == 1


def test_bfloat16_is_proposed_where_float32_is_what_has_no_room() -> None:
    needs = needs_of(layers=40, layer_bytes=800 << 20, bytes_per_value=4)

    assert "set model.dtype: bfloat16" in refusal(gpus(24), needs).hint


def test_a_quantised_model_is_not_told_to_be_quantised() -> None:
    needs = needs_of(layers=46, layer_bytes=4 * GIB, quantization_config={"quant_method": "fp8"})

    assert "8 bits" not in refusal(gpus(80, 80), needs).hint


# Batches


def test_the_expected_batch_is_the_largest_that_the_engines_own_model_lets_in() -> None:
    needs = glm_41v()
    (replica,) = placed(gpus(24)).replicas

    size = expected_batch_size(replica, needs, TYPICAL, 0.92)

    memory = MemoryModel(replica.weight_bytes, priors(replica, needs))
    memory.trust = 1.0
    budget = [int(0.92 * replica.devices[0].usable_bytes)]
    assert memory.fits(batch_of(TYPICAL, size), budget)
    assert not memory.fits(batch_of(TYPICAL, size + 1), budget)


def test_laying_94_layers_over_8_cards_takes_no_time_to_speak_of() -> None:
    needs = needs_of(layers=94, layer_bytes=2 * GIB, blocks=24)

    started = time.process_time()
    placement = placed(gpus(*[40] * 8), needs)

    assert time.process_time() - started < 20  # to try every way would take longer than anyone has
    assert len(placement.replicas) == 1


@settings(max_examples=60)
@given(
    cards=st.lists(st.integers(0, 48), min_size=1, max_size=8),
    layers=st.integers(1, 12),
    layer_bytes=st.integers(1 << 20, 4 * GIB),
    layout=st.sampled_from(["auto", "replicas", "balanced", "balanced_low_0", "sequential"]),
)
def test_what_is_placed_has_room_and_shares_no_card(
    cards: list[int], layers: int, layer_bytes: int, layout: str
) -> None:
    needs, devices = needs_of(layers=layers, layer_bytes=layer_bytes), gpus(*cards)
    try:
        placement = placed(devices, needs, layout=layout)
    except PlacementError:
        return

    used = [device for replica in placement.replicas for device in replica.devices]
    assert sorted([*used, *placement.idle], key=devices.index) == devices
    for replica in placement.replicas:
        spots = spots_of(replica.device_map, needs)
        assert list(spots.values()) == sorted(spots.values(), key=str)
        assert sum(replica.weight_bytes) == needs.weight_bytes
        for device, peak in zip(replica.devices, peaks(replica, needs, batch_of(WORST)), strict=True):
            assert peak <= 0.92 * device.free_bytes


# Mixed cards and odd settings


@pytest.mark.parametrize(
    ("gib", "num_replicas"),
    [((24, 24, 16, 16), 2), ((24, 24, 24, 16, 16, 16), 3), ((32, 24, 24, 12, 12), 3)],
)
def test_large_cards_are_grouped_with_small_ones_so_that_more_copies_fit(
    gib: tuple[float, ...], num_replicas: int
) -> None:
    placement = place(gpus(*gib), needs_of(layers=60), DeviceSettings(), WORST, TYPICAL)

    assert len(placement.replicas) == num_replicas
    used = [device.index for replica in placement.replicas for device in replica.devices]
    assert len(used) == len(set(used))


def test_auto_with_a_group_size_leaves_out_groups_without_room() -> None:
    placement = placed(gpus(24, 24, 8), gpus_per_replica=1)

    assert [replica.devices[0].index for replica in placement.replicas] == [0, 1]
    assert [device.index for device in placement.idle] == [2]


def test_settings_for_gpus_are_refused_on_the_cpu() -> None:
    assert "are for GPUs, and the model runs on the CPU" in str(refusal([cpu(free=64)], offload="cpu"))
    limited = replace(cpu(free=64), limit_bytes=1 << 30)
    assert "are for GPUs, and the model runs on the CPU" in str(refusal([limited]))


def test_one_copy_is_never_laid_over_mig_devices() -> None:
    slices = [replace(device, uuid=f"MIG-{device.index}") for device in gpus(12, 12, 12)]

    assert "several MIG devices" in str(refusal(slices, layout="balanced"))
    assert "several MIG devices" in str(refusal(slices))
    assert indices(placed([replace(slices[0], uuid="MIG-0"), *gpus(0, 24)[1:]])) == [[1]]


def test_advice_for_groups_names_the_setting_of_groups_and_helps() -> None:
    hint = refusal(gpus(12, 12), layout="replicas").hint

    assert "use 3 GPUs with 12.00 GiB free each and set devices.gpus_per_replica: 3" in hint
    assert placed(gpus(12, 12, 12), layout="replicas", gpus_per_replica=3).replicas


def test_the_pixel_limit_is_no_remedy_for_several_images() -> None:
    four = RequestSize(4 * WORST.prompt_tokens, 4 * WORST.visual_patches, WORST.new_tokens)

    with pytest.raises(PlacementError) as caught:
        place(gpus(24), glm_41v(), DeviceSettings(), four, TYPICAL, image_patches=WORST.visual_patches)

    assert "images.max_pixels" not in caught.value.hint


def test_advice_tells_of_a_limit_that_must_rise_too_and_of_a_low_fraction() -> None:
    crowded = [gpu(0, 24, free=10, limit=16)]

    assert "free the memory that others hold and raise devices.memory_limit_gib" in refusal(crowded).hint
    assert "raise devices.memory_fraction to 0.95" in refusal([gpu(0, 24, free=23)]).hint
    assert "raise devices.memory_fraction to 0.92" in refusal(gpus(24), memory_fraction=0.8).hint


def test_host_memory_without_room_is_told_and_the_disk_advised() -> None:
    error = refusal(gpus(8), offload="cpu", host=cpu(free=8))

    assert "host memory: room for 7.36 GiB of offloaded weights" in str(error)
    assert "set devices.offload: disk" in error.hint
    assert placed(gpus(8), offload="disk", host=cpu(free=8)).replicas


def test_mig_devices_are_no_part_of_a_group() -> None:
    devices = [replace(gpu(0, 12), uuid="MIG-0"), replace(gpu(1, 12), uuid="MIG-1"), *gpus(0, 0, 16, 16)[2:]]

    assert indices(placed(devices)) == indices(placed(devices, gpus_per_replica=2)) == [[2, 3]]
    assert indices(placed(devices[:2], offload="disk")) == [[0], [1]]


def test_advice_is_for_all_groups_and_not_for_the_first_that_fails() -> None:
    error = refusal([gpu(0, 24, free=20), gpu(1, 12)], layout="replicas")

    assert "does not fit on GPU 0" in str(error)
    assert "free the memory" not in error.hint


def test_answers_that_take_the_room_are_advised_to_be_shorter() -> None:
    long = replace(WORST, new_tokens=120_000)
    with pytest.raises(PlacementError) as caught:
        place(gpus(24), glm_41v(), DeviceSettings(), long, TYPICAL)

    enough = int(caught.value.hint.split("lower generation.max_new_tokens to ")[1].split(";")[0])
    assert place(gpus(24), glm_41v(), DeviceSettings(), replace(long, new_tokens=enough), TYPICAL).replicas


def test_auto_is_advised_in_place_of_a_map_only_where_it_has_room() -> None:
    layout = {"": 0}

    assert "leave devices.layout at auto" in refusal(gpus(12, 24), layout=layout).hint
    assert "auto" not in refusal(gpus(12, 4), layout=layout).hint


def test_what_a_request_is_said_to_need_does_not_fit_where_it_is_refused() -> None:
    """The margin of predictions counts as need, or a refusal would contradict itself."""
    needs = glm_41v()
    gib = next(size / 100 for size in range(2400, 2200, -1) if not _fits(size / 100, needs))

    error = refusal([gpu(0, gib)], needs)

    said = re.findall(
        r"takes ([\d.]+) GiB .* them ([\d.]+) GiB .*may hold ([\d.]+) GiB", str(error), re.DOTALL
    )
    ((weights, request, budget),) = said
    assert float(weights) + float(request) >= float(budget)


def _fits(gib: float, needs: ModelNeeds) -> bool:
    try:
        return bool(placed([gpu(0, gib)], needs).replicas)
    except PlacementError:
        return False


@settings(max_examples=60, deadline=None)
@given(
    cards=st.lists(st.tuples(st.sampled_from([4, 8, 12, 16]), st.integers(0, 8)), min_size=1, max_size=4),
    limit=st.sampled_from([None, 3, 7]),
    fraction=st.sampled_from([0.5, 0.92]),
    new_tokens=st.sampled_from([128, 60_000]),
    layout=st.sampled_from(["auto", "replicas", "balanced"]),
    group=st.sampled_from(["auto", 1, 2]),
)
def test_every_advice_of_a_refusal_helps(
    cards: list[tuple[int, int]], limit: int | None, fraction: float, new_tokens: int, layout: Any, group: Any
) -> None:
    devices = [gpu(n, size, free=max(0, size - held), limit=limit) for n, (size, held) in enumerate(cards)]
    worst = replace(WORST, new_tokens=new_tokens)
    wishes = DeviceSettings(layout=layout, gpus_per_replica=group, memory_fraction=fraction)
    host = cpu(free=8)
    try:
        place(devices, SMALL, wishes, worst, TYPICAL, host)
    except PlacementError as error:
        hint = error.hint
    else:
        return

    for advice in _advised(hint):
        changed = _heeding(advice, devices, wishes, worst)
        assert changed is None or place(changed[0], SMALL, changed[1], changed[2], TYPICAL, host).replicas, (
            advice
        )


SMALL = needs_of(layers=20)
"""10 GiB."""


def _advised(hint: str) -> list[str]:
    if "would do: " not in hint:
        return []
    advice, _, caution = hint.partition("would do: ")[2].partition(". ")
    assert bool(caution) == any(word in advice for word in ("images.", "generation.", "dtype", "a version"))
    return advice.rstrip(".").replace("; or ", "; ").split("; ")


def _heeding(
    advice: str, devices: list[Device], wishes: DeviceSettings, worst: RequestSize
) -> tuple[list[Device], DeviceSettings, RequestSize] | None:
    """Devices, settings and largest request once *advice* is followed; None where the model is to change."""
    unlimited = [replace(device, limit_bytes=None) for device in devices]
    number = int((re.findall(r"\b\d+\b", advice) or [0])[-1])
    if advice == "raise devices.memory_limit_gib":
        return unlimited, wishes, worst
    if advice.startswith("free the memory"):
        kept = unlimited if "memory_limit_gib" in advice else devices
        return [replace(device, free_bytes=device.total_bytes) for device in kept], wishes, worst
    if advice.startswith("raise devices.memory_fraction"):
        return devices, wishes.model_copy(update={"memory_fraction": float(advice.split()[-1])}), worst
    if advice.startswith("leave devices.layout"):
        return devices, wishes.model_copy(update={"layout": "auto", "gpus_per_replica": "auto"}), worst
    if advice.startswith("use a version"):
        return None
    if advice.startswith("use "):
        best = max(devices, key=lambda device: device.usable_bytes)
        count = int(advice.split()[1])
        group = {"gpus_per_replica": count} if "gpus_per_replica" in advice else {}
        return [replace(best, index=index) for index in range(count)], wishes.model_copy(update=group), worst
    if advice.startswith("lower images.max_pixels"):
        tokens = number // SMALL.pixels_per_token
        fewer = 6144 - tokens
        smaller = replace(
            worst, prompt_tokens=worst.prompt_tokens - fewer, visual_patches=worst.visual_patches - 4 * fewer
        )
        return devices, wishes, smaller
    if advice.startswith("lower generation.max_new_tokens"):
        return devices, wishes, replace(worst, new_tokens=number)
    place_name = advice.split(": ")[1].split(",")[0]
    return devices, wishes.model_copy(update={"offload": place_name}), worst
