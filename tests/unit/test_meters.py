"""What is measured on a device."""

import gc
import mmap

from glm4v_batch.meters import HostMeter

_SIZE = 200 << 20


def test_the_host_meter_sees_a_peak_that_is_gone_again() -> None:
    gc.collect()  # what it would let go of meanwhile would be missing from the peak
    meter = HostMeter()
    (before,) = meter.held_bytes()

    # Pages of the kernel's own: an allocator may have so much in hand already, and take no more.
    with meter.watch(), mmap.mmap(-1, _SIZE) as pages:
        for page in range(0, _SIZE, mmap.PAGESIZE):
            pages[page] = 1

    (peak,) = meter.peak_bytes()
    (limit,) = meter.limit_bytes()
    assert before + _SIZE // 2 < peak < before + 2 * _SIZE
    assert limit > peak
    with meter.watch():
        pass
    assert meter.peak_bytes()[0] < peak - _SIZE // 2
