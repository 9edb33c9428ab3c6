"""Cards by name only: CPU tensors that know which card they lie on, and fail as on CUDA where two meet.

A tensor's place is written on its storage, so that views and parameters share it. A function mode
answers `.device` and carries out moves; a dispatch mode sees every operation, refuses tensors of two
devices and leaves the result where the operands are. The arithmetic is the CPU's own, so values are
bit-identical to those without cards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

_CPU = torch.device("cpu")
_PLACE = "logical_device"
_MOVES = (Tensor.to, Tensor.type_as)
_TO_NUMPY = (Tensor.numpy, Tensor.__array__)
_ATEN = torch.ops.aten
# Their indices may lie on the host while what they index lies on a card.
_INDEXED = (
    _ATEN.index.Tensor,
    _ATEN.index_put.default,
    _ATEN.index_put_.default,
    _ATEN._index_put_impl_.default,
)


@contextmanager
def logical_devices() -> Iterator[None]:
    """Inside, tensors can be made on `cuda:0`, `cuda:1`, … and moved there, without a GPU.

    An operation on tensors of two devices raises CUDA's RuntimeError. As on CUDA, copies cross
    devices, a CPU tensor without dimensions meets any card, and CPU indices index any card. CUDA
    takes such a scalar in elementwise operations only, this in all of them. What other threads do,
    and what C++ decides by a tensor's device (which kernel, which attention), stays the CPU's.
    """
    with _OneDevicePerOperation(), _Places():  # type: ignore[no-untyped-call]  # untyped in torch
        yield


class _Places(TorchFunctionMode):
    """What torch does before any operation runs: tell where a tensor lies, move it where a call says."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # Each look-up makes another wrapper of the descriptor, equal but not identical.
        if func == torch.Tensor.device.__get__:
            return _place(args[0])
        if func in _TO_NUMPY and _place(args[0]) != _CPU:
            raise TypeError(f"can't convert {_place(args[0])} device type tensor to numpy.")
        target = _target(func, args, kwargs)
        if target is None:
            return func(*args, **kwargs)
        args, kwargs = tree_map(_without_card, (args, dict(kwargs)))
        return tree_map_only(Tensor, partial(_moved, device=target), func(*args, **kwargs))


class _OneDevicePerOperation(TorchDispatchMode):  # type: ignore[no-untyped-call]  # untyped in torch
    """What CUDA's kernels do: refuse tensors of two devices, leave what is new on the one."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            # A result may be a view of a host scalar, which stays where it is.
            _settle(tensor, _CPU)
        device = _common_device(func, args, kwargs)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            _settle(tensor, device)
        return result


def _target(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device | None:
    """The device that a call names, as in `x.to("cuda:1")`, `x.to(other)` or `torch.zeros(3, device=…)`."""
    named = kwargs.get("device")
    if func is Tensor.cpu:
        named = _CPU
    elif func is Tensor.new_tensor and named is None:
        named = _place(args[0])
    elif func in _MOVES and len(args) > 1:
        named = _place(args[1]) if isinstance(args[1], Tensor) else named or args[1]
    if not isinstance(named, str | torch.device):
        return None
    return torch.device("cuda", 0) if str(named) == "cuda" else torch.device(named)


def _without_card(value: Any) -> Any:
    is_card = isinstance(value, str | torch.device) and str(value).startswith("cuda")
    return _CPU if is_card else value


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if _place(tensor) == device or tensor.is_meta:
        return tensor
    copy = tensor.clone()
    setattr(copy.untyped_storage(), _PLACE, device)
    return copy


def _place(tensor: Tensor) -> torch.device:
    if tensor.is_meta:
        return torch.device("meta")
    place: torch.device = getattr(tensor.untyped_storage(), _PLACE, _CPU)
    return place


def _settle(tensor: Tensor, device: torch.device) -> None:
    storage = tensor.untyped_storage()
    if not hasattr(storage, _PLACE):
        setattr(storage, _PLACE, device)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and not leaf.is_meta]


def _common_device(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.device:
    operands = _tensors((args, kwargs))
    if func is _ATEN.copy_.default:
        return _place(args[0])
    if func in _INDEXED:
        operands = [args[0], *(t for t in _tensors(args[1]) if _place(t) != _CPU), *_tensors(args[2:])]
    places = list(dict.fromkeys(_place(t) for t in operands if t.dim() > 0 or _place(t) != _CPU))
    if len(places) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{places[0]} and {places[1]}! (in {func})"
        )
    return places[0] if places else _CPU
