"""Which devices a run has, and how it learns that without touching CUDA."""
# ruff: noqa: N802, N815 - the fake has the names of NVML

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm4v_batch import devices as devices_module
from glm4v_batch.devices import (
    DeviceMonitor,
    DeviceUse,
    Gpu,
    MemorySize,
    ask_torch,
    cuda_visible_devices,
    find_devices,
    host_memory,
    let_segments_grow,
    visible_gpus,
)
from glm4v_batch.errors import PlacementError
from glm4v_batch.types import Device

GIB = 1 << 30
UUIDS = ("GPU-11aa-0000", "GPU-11bb-0000", "GPU-22cc-0000", "GPU-33dd-0000")
GPUS = tuple(Gpu(card, uuid, uuid, f"card {card}", 24 * GIB, 23 * GIB) for card, uuid in enumerate(UUIDS))
SLICES = tuple(
    Gpu(card, UUIDS[card], f"MIG-{card}{place}ee", "MIG 1g.10gb", 10 * GIB, 9 * GIB)
    for card in (0, 1)
    for place in (0, 1)
)
CPU = Device(None, "CPU", 64 * GIB, 60 * GIB)
FAKE_TORCH = """
from types import SimpleNamespace
version = SimpleNamespace(cuda={cuda!r})
class cuda:
    device_count = staticmethod(lambda: {count})
    @staticmethod
    def get_device_properties(index):
        if index == 2:
            raise RuntimeError("CUDA error: device busy\\nCompile with TORCH_USE_CUDA_DSA")
        return SimpleNamespace(name={name!r}, uuid="11aa-%04d" % index)
    @staticmethod
    def mem_get_info(index):
        return (20 << 30, 24 << 30)
"""


@pytest.fixture(autouse=True)
def dev(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of device files, in which no GPU driver has put any."""
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "null").touch()
    monkeypatch.setattr(devices_module, "_DEV", folder)
    return folder


@pytest.fixture(autouse=True)
def _no_user_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "HIP_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)


@dataclass
class Card:
    """A card or a MIG device as the fake driver knows it; *error* is what each question about it meets."""

    uuid: str
    name: str = "H100"
    total_bytes: int = 80 * GIB
    reserved_bytes: int = GIB
    free_bytes: int = 78 * GIB
    busy_percent: int | None = 40
    mig_devices: Sequence["Card"] | None = None
    knows_memory: bool = True
    error: Exception | None = None


@dataclass
class FakeNvml:
    """The part of pynvml that is used, over *cards*; *init_error* is what opening it meets."""

    cards: Sequence[Card]
    init_error: Exception | None = None
    knows_reserved: bool = True
    num_open: int = field(default=0, init=False)

    nvmlMemory_v2 = pynvml.nvmlMemory_v2
    NVMLError = pynvml.NVMLError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("NVMLError_"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def nvmlInit(self) -> None:
        if self.init_error is not None:
            raise self.init_error
        self.num_open += 1

    def nvmlShutdown(self) -> None:
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:
        assert self.num_open > 0
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        return self._card(self.cards[index])

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Card:
        return self._card(next(card for card in self.cards if card.uuid == uuid))

    def nvmlDeviceGetUUID(self, card: Card) -> str:
        return self._card(card).uuid

    def nvmlDeviceGetName(self, card: Card) -> str:
        return self._card(card).name

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if self._card(card).mig_devices is None:
            raise pynvml.NVMLError_NotSupported
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        devices = card.mig_devices or ()
        if index >= len(devices):
            raise pynvml.NVMLError_NotFound
        return devices[index]

    def nvmlDeviceGetMemoryInfo(self, card: Card, version: int | None = None) -> Any:
        if not self._card(card).knows_memory:
            raise pynvml.NVMLError_NotSupported
        if version is None:
            return SimpleNamespace(total=card.total_bytes, free=card.free_bytes)
        if not self.knows_reserved:
            raise pynvml.NVMLError_FunctionNotFound
        return SimpleNamespace(total=card.total_bytes, reserved=card.reserved_bytes, free=card.free_bytes)

    def nvmlDeviceGetUtilizationRates(self, card: Card) -> Any:
        if self._card(card).busy_percent is None:
            raise pynvml.NVMLError_NotSupported
        return SimpleNamespace(gpu=card.busy_percent)

    def _card(self, card: Card) -> Card:
        assert self.num_open > 0
        if card.error is not None:
            raise card.error
        return card


UseNvml = Callable[..., FakeNvml]


@pytest.fixture
def install_torch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Puts a torch in place of the real one: `install_torch(cuda="13.0", hip=None, count=2)`."""

    def install(*, cuda: str | None, hip: str | None = None, count: int = 0, name: str = "A100") -> None:
        (tmp_path / "torch").mkdir()
        version = f"cuda: Optional[str] = {cuda!r}\nhip: Optional[str] = {hip!r}\n"
        (tmp_path / "torch" / "version.py").write_text(version)
        (tmp_path / "torch" / "__init__.py").write_text(FAKE_TORCH.format(cuda=cuda, count=count, name=name))
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.fixture
def use_nvml(monkeypatch: pytest.MonkeyPatch, install_torch: Callable[..., None]) -> UseNvml:
    """Puts a fake in place of NVML, beside a torch that is built for CUDA: `use_nvml(cards)`."""

    def use(cards: Sequence[Card], *, torch_sees: int = 0, **behaviour: Any) -> FakeNvml:
        install_torch(cuda="13.0", count=torch_sees)
        nvml = FakeNvml(cards, **behaviour)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return use


def test_the_cpu_is_found_where_it_is_asked_for() -> None:
    (device,) = find_devices("cpu", limit_bytes=4 * GIB)

    assert device.index is None
    assert 0 < device.free_bytes <= device.total_bytes
    assert device.limit_bytes == 4 * GIB


def test_the_cpu_is_found_without_asking_any_driver(use_nvml: UseNvml) -> None:
    use_nvml([Card("GPU-1")], init_error=pynvml.NVMLError_Unknown())

    (device,) = find_devices("cpu")

    assert device.index is None


def test_looking_for_devices_does_not_import_torch(install_torch: Callable[..., None]) -> None:
    install_torch(cuda="13.0")
    script = """
import sys
from glm4v_batch.devices import find_devices
find_devices("all")
sys.exit("torch" in sys.modules)
"""

    finding = subprocess.run([sys.executable, "-c", script], check=False, env=_environment())

    assert finding.returncode == 0


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_gpus_are_what_the_driver_tells_without_what_it_keeps_for_itself(use_nvml: UseNvml) -> None:
    nvml = use_nvml([Card("GPU-1"), Card("GPU-2", "H200", 141 * GIB, 2 * GIB, 100 * GIB)])

    devices = find_devices("all", limit_bytes=24 * GIB)

    assert devices == (
        Device(0, "H100", 79 * GIB, 78 * GIB, "GPU-1", 24 * GIB),
        Device(1, "H200", 139 * GIB, 100 * GIB, "GPU-2", 24 * GIB),
    )
    assert nvml.num_open == 0


def test_a_driver_that_does_not_tell_what_it_keeps_counts_it_as_memory(use_nvml: UseNvml) -> None:
    use_nvml([Card("GPU-1")], knows_reserved=False)

    (device,) = find_devices("all")

    assert (device.total_bytes, device.free_bytes) == (80 * GIB, 78 * GIB)


def test_gpus_come_in_the_order_in_which_they_are_asked_for(use_nvml: UseNvml) -> None:
    use_nvml([Card("GPU-1"), Card("GPU-2"), Card("GPU-3")])

    devices = find_devices([2, 0])

    assert [(device.index, device.uuid) for device in devices] == [(2, "GPU-3"), (0, "GPU-1")]


def test_gpus_are_numbered_among_those_that_are_visible(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml([Card("GPU-1"), Card("GPU-2"), Card("GPU-3")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1")

    (device,) = find_devices([0])

    assert (device.index, device.uuid) == (0, "GPU-3")


def test_the_mig_devices_of_a_card_come_in_its_place(use_nvml: UseNvml) -> None:
    parts = [Card("MIG-a", "MIG 3g.40gb", 40 * GIB, 0, 39 * GIB), Card("MIG-b", "MIG 3g.40gb")]
    use_nvml([Card("GPU-1", mig_devices=parts), Card("GPU-2")])

    devices = find_devices("all")

    assert [(device.index, device.uuid) for device in devices] == [(0, "MIG-a"), (1, "MIG-b"), (2, "GPU-2")]
    assert devices[0].free_bytes == 39 * GIB


def test_a_gpu_that_is_not_there_is_refused(use_nvml: UseNvml) -> None:
    use_nvml([Card("GPU-1"), Card("GPU-2")])

    with pytest.raises(PlacementError, match=r"names GPU 5, but the GPUs here are 0 to 1\.") as refused:
        find_devices([1, 5])

    assert refused.value.hint == "Run 'nvidia-smi' to see what the driver says."


def test_a_gpu_that_is_hidden_is_refused_with_what_hides_it(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml([Card("GPU-1"), Card("GPU-2")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")

    with pytest.raises(PlacementError, match=r"names GPU 1, but the only GPU here is 0\.") as refused:
        find_devices([1])

    assert "CUDA_VISIBLE_DEVICES is '1' and hides all others." in refused.value.hint


def test_a_torch_without_cuda_has_no_gpu_whatever_the_driver_lists(
    install_torch: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch(cuda=None)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([Card("GPU-1")]))

    (device,) = find_devices("all")
    with pytest.raises(PlacementError, match="there is no GPU here") as refused:
        find_devices([0])

    assert device.index is None
    assert "built for the CPU alone" in refused.value.hint


@pytest.mark.parametrize("error", [pynvml.NVMLError_LibraryNotFound(), pynvml.NVMLError_DriverNotLoaded()])
def test_a_host_without_a_driver_has_its_cpu_and_torch_is_not_asked(
    use_nvml: UseNvml, error: Exception
) -> None:
    use_nvml([], torch_sees=1, init_error=error)

    (device,) = find_devices("all")

    assert device.index is None


@pytest.mark.parametrize("file", ["nvidia0", "nvhost-gpu", "dxg"])
def test_where_only_nvml_is_missing_torch_is_asked(use_nvml: UseNvml, dev: Path, file: str) -> None:
    use_nvml([], torch_sees=2, init_error=pynvml.NVMLError_LibraryNotFound())
    (dev / file).touch()

    devices = find_devices([1])

    assert devices == (Device(1, "A100", 24 * GIB, 20 * GIB, "GPU-11aa-0001"),)


def test_torch_tells_the_memory_that_a_gpu_shares_with_the_host(use_nvml: UseNvml, dev: Path) -> None:
    nvml = use_nvml([Card("GPU-1", "GB10", knows_memory=False)], torch_sees=1)
    (dev / "nvidia0").touch()

    (device,) = find_devices("all")

    assert device.total_bytes == 24 * GIB
    assert nvml.num_open == 0


def test_torch_is_asked_for_the_order_in_which_the_fastest_comes_first(
    use_nvml: UseNvml, dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_nvml([Card("GPU-1"), Card("GPU-2")], torch_sees=2)
    (dev / "nvidia0").touch()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")

    devices = find_devices("all")

    assert [device.uuid for device in devices] == ["GPU-11aa-0000", "GPU-11aa-0001"]


def test_a_torch_for_rocm_is_asked_itself(
    install_torch: Callable[..., None], dev: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_torch(cuda=None, hip="7.2", count=2, name="MI300X")
    (dev / "kfd").touch()

    devices = find_devices("all")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    with pytest.raises(PlacementError, match="HIP_VISIBLE_DEVICES is set"):
        find_devices("all")

    assert [(device.name, device.uuid) for device in devices] == [("MI300X", ""), ("MI300X", "")]


def test_a_driver_that_does_not_answer_is_refused_in_its_own_words(use_nvml: UseNvml) -> None:
    use_nvml([], init_error=pynvml.NVMLError_LibRmVersionMismatch())

    with pytest.raises(PlacementError, match="RM has detected an NVML/RM version mismatch"):
        find_devices("all")


def test_a_lost_gpu_is_refused_where_it_is_chosen_and_not_elsewhere(use_nvml: UseNvml) -> None:
    nvml = use_nvml([Card("GPU-1"), Card("GPU-2", error=pynvml.NVMLError_GpuIsLost())])

    with pytest.raises(PlacementError, match=r"GPU 1 cannot be used; its driver says: GPU is lost\."):
        find_devices([0, 1])

    assert [device.uuid for device in find_devices([0])] == ["GPU-1"]
    assert nvml.num_open == 0


def test_all_gpus_are_those_that_are_not_lost(use_nvml: UseNvml, caplog: pytest.LogCaptureFixture) -> None:
    use_nvml([Card("GPU-1", error=pynvml.NVMLError_GpuIsLost()), Card("GPU-2")])

    devices = find_devices("all")

    assert [(device.index, device.uuid) for device in devices] == [(1, "GPU-2")]
    assert caplog.messages == ["GPU 0 is left out, its driver says: GPU is lost"]


def test_a_host_whose_gpus_are_all_lost_does_not_fall_back_to_the_cpu(use_nvml: UseNvml) -> None:
    use_nvml([Card("GPU-1", error=pynvml.NVMLError_GpuIsLost())])

    with pytest.raises(PlacementError, match="GPU 0 cannot be used"):
        find_devices("all")


@pytest.mark.parametrize(
    ("visible", "cards"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,1", [2, 1]),
        ("0,2,-1,1", [0, 2]),
        ("1,9,0", [1]),
        (" 3 , 0 ", [3, 0]),
        ("1gpu,+2", [1, 2]),
        ("0,,1", [0]),
        (UUIDS[3], [3]),
        ("GPU-22,GPU-33", [2, 3]),
        ("GPU-22,GPU-44,GPU-33", [2]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(visible: str | None, cards: list[int]) -> None:
    assert [gpu.card for gpu in visible_gpus(GPUS, visible)] == cards


@pytest.mark.parametrize("visible", ["7", "7,0", "GPU-11,GPU-22", "gpu-22", "all", "MIG-1,MIG-00ee"])
def test_a_variable_that_names_no_gpu_by_mistake_does_not_mean_the_cpu(visible: str) -> None:
    with pytest.raises(PlacementError, match="names none of the GPUs"):
        visible_gpus([*SLICES, *GPUS], visible)

    assert visible_gpus((), visible) == ()


@pytest.mark.parametrize("visible", ["0,0", "1,GPU-11bb", "2,0,2,1"])
def test_a_gpu_that_is_visible_twice_is_refused(visible: str) -> None:
    with pytest.raises(PlacementError, match="names one GPU twice"):
        visible_gpus(GPUS, visible)


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        (None, ["MIG-00ee", "MIG-01ee", "MIG-10ee", "MIG-11ee", UUIDS[2]]),
        ("MIG-11,MIG-00ee", ["MIG-11ee", "MIG-00ee"]),
        ("1,2", ["MIG-10ee", UUIDS[2]]),
        ("GPU-11bb", ["MIG-10ee"]),
    ],
)
def test_a_card_in_mig_mode_stands_for_its_first_mig_device(visible: str | None, uuids: list[str]) -> None:
    assert [gpu.uuid for gpu in visible_gpus([*SLICES, GPUS[2]], visible)] == uuids


@given(order=st.permutations(range(4)), length=st.integers(0, 4))
def test_numbers_and_uuids_name_the_same_gpus(order: list[int], length: int) -> None:
    by_number = visible_gpus(GPUS, ",".join(map(str, order[:length])))
    by_uuid = visible_gpus(GPUS, ",".join(UUIDS[card] for card in order[:length]))

    assert by_number == by_uuid == tuple(GPUS[card] for card in order[:length])


@given(chosen=st.permutations(range(4)).map(lambda order: order[:2]))
def test_a_replica_sees_its_own_gpus_in_its_own_order(chosen: list[int]) -> None:
    devices = [Device(card, "H100", 80 * GIB, 78 * GIB, UUIDS[card]) for card in chosen]

    seen = visible_gpus(GPUS, cuda_visible_devices(devices))

    assert [gpu.uuid for gpu in seen] == [device.uuid for device in devices]


def test_gpus_without_a_uuid_are_named_by_their_numbers() -> None:
    devices = [Device(2, "MI300X", 192 * GIB, 190 * GIB), Device(0, "MI300X", 192 * GIB, 190 * GIB)]

    assert cuda_visible_devices(devices) == "2,0"


def test_gpus_without_a_uuid_are_named_as_the_user_named_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    devices = [Device(1, "MI300X", 192 * GIB, 190 * GIB), Device(0, "MI300X", 192 * GIB, 190 * GIB)]

    assert cuda_visible_devices(devices) == "3,5"


def test_a_replica_on_the_cpu_sees_no_gpu() -> None:
    assert cuda_visible_devices([CPU]) == ""
    assert visible_gpus(GPUS, "") == ()


def test_one_replica_cannot_have_several_mig_devices() -> None:
    first, second = (Device(i, "MIG 3g.40gb", 40 * GIB, 39 * GIB, f"MIG-{i}") for i in range(2))

    assert cuda_visible_devices([first]) == "MIG-0"
    with pytest.raises(PlacementError, match="several MIG devices"):
        cuda_visible_devices([first, second])


def test_torch_tells_its_gpus_from_a_process_of_its_own(install_torch: Callable[..., None]) -> None:
    install_torch(cuda="13.0", count=3)

    gpus = ask_torch()

    assert gpus == (
        Gpu(0, "GPU-11aa-0000", "GPU-11aa-0000", "A100", 24 * GIB, 20 * GIB),
        Gpu(1, "GPU-11aa-0001", "GPU-11aa-0001", "A100", 24 * GIB, 20 * GIB),
        Gpu(2, trouble="CUDA error: device busy"),
    )
    assert "torch" not in sys.modules


@pytest.mark.parametrize(("cuda", "name"), [(None, "MI300X"), ("13.0", "A100 MIG 1g.10gb")])
def test_a_uuid_that_cuda_might_not_take_is_left_out(
    install_torch: Callable[..., None], cuda: str | None, name: str
) -> None:
    install_torch(cuda=cuda, count=1, name=name)

    assert ask_torch() == (Gpu(0, "", "", name, 24 * GIB, 20 * GIB),)


def test_a_torch_that_cannot_be_loaded_is_refused_in_its_own_words(
    install_torch: Callable[..., None], tmp_path: Path
) -> None:
    install_torch(cuda="13.0")
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('libcudart.so.13 is missing')")

    with pytest.raises(PlacementError, match=r"it says: ImportError: libcudart\.so\.13 is missing"):
        ask_torch()


def _group(folder: Path, **files: int | str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def _belongs_to(folder: Path, *lines: str) -> Path:
    membership = folder / "membership"
    membership.write_text("\n".join(lines) + "\n")
    return membership


def test_the_host_has_no_more_memory_than_its_tightest_group_leaves(tmp_path: Path) -> None:
    _group(tmp_path / "pod" / "job", memory__max="max", memory__current=100, memory__stat="inactive_file 7")
    _group(
        tmp_path / "pod",
        memory__max=GIB,
        memory__current=GIB - 4096,
        memory__stat="anon 5\ninactive_file 1000\nslab 3",
    )
    _group(tmp_path, cgroup__procs="")

    memory = host_memory(tmp_path, _belongs_to(tmp_path, "0::/pod/job"))

    assert memory == MemorySize(GIB, 4096 + 1000)


def test_groups_of_version_1_limit_the_host_too(tmp_path: Path) -> None:
    _group(
        tmp_path / "memory" / "docker",
        memory__limit_in_bytes=2 * GIB,
        memory__usage_in_bytes=GIB,
        memory__stat="inactive_file 1\ntotal_inactive_file 4096",
    )
    _group(
        tmp_path / "memory",
        memory__limit_in_bytes=9223372036854771712,
        memory__usage_in_bytes=GIB,
        memory__stat="total_inactive_file 0",
    )

    membership = _belongs_to(tmp_path, "5:cpu,cpuacct:/docker", "4:memory,hugetlb:/docker", "0::/")

    assert host_memory(tmp_path, membership) == MemorySize(2 * GIB, GIB + 4096)


def test_a_group_beyond_what_the_container_sees_leaves_the_limit_of_its_root(tmp_path: Path) -> None:
    _group(tmp_path, memory__max=GIB, memory__current=2 * GIB, memory__stat="inactive_file 0")

    memory = host_memory(tmp_path, _belongs_to(tmp_path, "0::/../../other"))

    assert memory == MemorySize(GIB, 0)


def test_without_groups_the_host_has_all_of_its_memory(tmp_path: Path) -> None:
    memory = host_memory(tmp_path, tmp_path / "nothing")

    assert 0 < memory.free_bytes <= memory.total_bytes


def test_a_monitor_reads_all_cards_that_answer(use_nvml: UseNvml) -> None:
    cards = [Card("GPU-1"), Card("GPU-2", busy_percent=None), Card("GPU-3")]
    use_nvml(cards)
    monitor = DeviceMonitor(find_devices("all"))
    before = monitor.read()

    cards[2].error = pynvml.NVMLError_GpuIsLost()
    cards[0].free_bytes = 9 * GIB

    first, second, third = before
    assert first == DeviceUse(0, GIB, 79 * GIB, 0.4)
    assert second.utilisation is None
    assert monitor.read() == (replace(first, used_bytes=70 * GIB), second)
    assert third.index == 2


def test_a_monitor_leaves_nvml_open_until_it_is_closed(use_nvml: UseNvml) -> None:
    nvml = use_nvml([Card("GPU-1")])
    monitor = DeviceMonitor(find_devices("all"))
    num_open = nvml.num_open

    monitor.close()

    assert (num_open, nvml.num_open) == (1, 0)
    assert monitor.read() == ()
    monitor.close()
    assert nvml.num_open == 0


def test_a_monitor_of_a_lost_card_is_silent(use_nvml: UseNvml) -> None:
    cards = [Card("GPU-1"), Card("GPU-2")]
    use_nvml(cards)
    devices = find_devices("all")
    cards[0].error = pynvml.NVMLError_GpuIsLost()

    figures = DeviceMonitor(devices).read()

    assert [use.index for use in figures] == [1]


def test_a_monitor_of_the_cpu_or_without_nvml_has_no_figures(use_nvml: UseNvml) -> None:
    nvml = use_nvml([Card("GPU-1")], init_error=pynvml.NVMLError_DriverNotLoaded())

    for devices in ([CPU], [Device(0, "H100", 80 * GIB, 78 * GIB, "GPU-1")]):
        monitor = DeviceMonitor(devices)
        assert monitor.read() == ()
        monitor.close()

    assert nvml.num_open == 0


def test_growing_segments_are_asked_for_unless_the_user_asks_for_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    let_segments_grow()
    theirs = os.environ["PYTORCH_ALLOC_CONF"]

    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    let_segments_grow()

    assert theirs == "max_split_size_mb:64"
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
