"""The memory that a replica's devices have beside its weights, and whether others have taken it since."""

from glm4v_batch.errors import PlacementError
from glm4v_batch.memory import Meter
from glm4v_batch.units import format_bytes

# Who has less than this of what there was at first does not judge a record by it.
_CROWDED_FRACTION = 0.2


class Room:
    """The bytes for work on each device of *meter*, which holds nothing but the weights as yet.

    *memory_fraction* of what the process may use is used.
    """

    def __init__(self, meter: Meter, memory_fraction: float) -> None:
        self._meter = meter
        self._memory_fraction = memory_fraction
        self._weight_bytes = meter.held_bytes()
        self._first_bytes = self.left_bytes()

    def budget_bytes(self) -> tuple[int, ...]:
        """What may be in use on each device by now, the weights included: others come and go."""
        return tuple(int(limit * self._memory_fraction) for limit in self._meter.limit_bytes())

    def left_bytes(self) -> tuple[int, ...]:
        """What of the budgets is not the weights'."""
        pairs = zip(self.budget_bytes(), self._weight_bytes, strict=True)
        return tuple(budget - weights for budget, weights in pairs)

    def refuse_if_taken(self) -> None:
        """Raise PlacementError where others have taken most of a device since it was first looked at.

        That a record does not fit there is not the record's fault.
        """
        for place, (left, first) in enumerate(zip(self.left_bytes(), self._first_bytes, strict=True)):
            if left < _CROWDED_FRACTION * first:
                raise PlacementError(
                    f"Other processes have taken a GPU's memory while the run used it: of the "
                    f"{format_bytes(first)} for work, {format_bytes(max(left, 0))} are left "
                    f"(device {place} of the replica).",
                    hint="What is committed is safe. Free the GPU, then run the same command again.",
                )
