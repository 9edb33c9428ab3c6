"""What is measured on a device."""

import time

import numpy as np

from glm4v_batch.meters import HostMeter


def test_the_host_meter_sees_a_peak_that_is_gone_again() -> None:
    meter = HostMeter()
    (before,) = meter.held_bytes()

    with meter.watch():
        held = np.ones(200 << 20, np.uint8)
        # The meter looks now and then.
        time.sleep(0.3)
        del held

    (peak,) = meter.peak_bytes()
    (limit,) = meter.limit_bytes()
    assert before + (190 << 20) < peak < before + (400 << 20)
    assert limit > peak
    with meter.watch():
        pass
    assert meter.peak_bytes()[0] < peak - (100 << 20)
