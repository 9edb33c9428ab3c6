"""Where the model goes, and what is measured there."""

import numpy as np
import pytest

from glm4v_batch.errors import PlacementError
from glm4v_batch.meters import HostMeter, meter_for
from glm4v_batch.placement import find_devices, place
from glm4v_batch.types import Device

GIB = 1 << 30
SMALL, LARGE = Device(0, "small", 24 * GIB, 10 * GIB), Device(1, "large", 24 * GIB, 23 * GIB)


def test_the_device_with_the_most_free_memory_is_chosen() -> None:
    placement = place([SMALL, LARGE], 5 * GIB, 0.9)

    (replica,) = placement.replicas
    assert replica.devices == (LARGE,)
    assert replica.device_map == {"": "cuda:1"}
    assert "freest of 2 GPUs" in placement.reason


def test_weights_that_do_not_fit_are_refused_with_the_numbers() -> None:
    with pytest.raises(PlacementError, match=r"needs 21\.00 GiB.*cuda:1 \(large\) has 20\.70 GiB"):
        place([SMALL, LARGE], 21 * GIB, 0.9)


def test_the_cpu_is_found_where_it_is_asked_for() -> None:
    (device,) = find_devices("cpu")

    assert device.torch_name == "cpu"
    assert 0 < device.free_bytes <= device.total_bytes
    assert isinstance(meter_for(device), HostMeter)


def test_the_host_meter_sees_a_peak_that_is_gone_again() -> None:
    meter = HostMeter()
    (before,) = meter.held_bytes()

    with meter.watch():
        np.ones(200 << 20, np.uint8)

    (peak,) = meter.peak_bytes()
    (limit,) = meter.limit_bytes()
    assert before + (190 << 20) < peak < before + (400 << 20)
    assert limit > peak
    with meter.watch():
        pass
    assert meter.peak_bytes()[0] < peak - (100 << 20)
