"""Predict a batch's peak memory from its shape, and learn from what the device measured.

A batch passes three phases: the vision tower, the prefill of the prompts, the decoding of the
answers. Each takes `Σ coefficient × feature` over the features of a `BatchShape`, coefficients ≥ 0,
and the peak is what the device held before plus the largest of the three. One sum over all features
would add up what never exists at the same time. Coefficients start from the formulas of the
architecture and are pulled towards every measured batch. Trust is asymmetric: the share of the
budget that batches may use rises slowly while they run clean and falls at once when memory runs out.
"""

import math
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from typing import Protocol

import numpy as np

from glm4v_batch.activations import FloatArray
from glm4v_batch.types import BatchShape, PeakSample

MEMORY_OF_SAMPLES = 512
"""How many batches a `MemoryModel` remembers."""

_FIRST_TRUST = 0.4
_TRUST_GAIN = 1.25
_TRUST_LOSS = 0.7
_RECENT = 32
_LEAST_TRUST = 0.1
_SMALLEST_MARGIN = 0.02
_LARGEST_MARGIN = 1.0
_MARGIN_QUANTILE = 0.9
_NUM_PROBES = 3
_LEAST_PEAK_FRACTION = 0.01
_WORKSPACE_FRACTION = 0.01
# Small beside one sample, whose terms are of order one: the prior decides only what samples do not.
_PRIOR_WEIGHT = 5e-4
_SWEEPS = 60
_ROUNDS = 3


class Meter(Protocol):
    """Measures the devices that one replica runs on; one value per device, in bytes."""

    def limit_bytes(self) -> tuple[int, ...]:
        """What this process could hold right now, counting what it holds and what is free."""
        ...

    def held_bytes(self) -> tuple[int, ...]:
        """What this process holds right now: after loading, the model's weights."""
        ...

    def watch(self) -> AbstractContextManager[None]:
        """Measure the peak of what runs inside."""
        ...

    def peak_bytes(self) -> tuple[int, ...]:
        """The peak of live tensors in the last `watch`."""
        ...

    def reserved_bytes(self) -> tuple[int, ...]:
        """The most that the allocator held in the last `watch`; beyond the peak, it is cache or fragments."""
        ...

    def free(self) -> None:
        """Give cached, unused memory back to the device."""
        ...

    def trim(self, budget_bytes: Sequence[int]) -> None:
        """Give cached memory back where more than *budget_bytes* is held: others may have come for it."""
        ...


class MemoryModel:
    """Peak memory of one replica as a function of the batch, per device.

    *fixed_bytes* is what each device holds before any batch, *priors* per device what
    `prior_coefficients` gives, *samples* what was measured before on the same devices.
    *must_probe* says that the priors are proportions only (`can_predict` is False): the first batches
    are single requests, later ones at most twice as large as the largest that ran, and the margin
    covers the worst recent error, because a formula that is not the model's errs again and again.
    """

    def __init__(
        self,
        fixed_bytes: Sequence[int],
        priors: Sequence[FloatArray],
        samples: Sequence[PeakSample] = (),
        *,
        must_probe: bool = False,
    ) -> None:
        self._fixed_bytes = tuple(fixed_bytes)
        self._must_probe = must_probe
        # Workspaces and the like: they come with the first batch and do not grow with it.
        self._priors = [
            np.insert(prior, 0, _WORKSPACE_FRACTION * fixed, axis=1)
            for fixed, prior in zip(self._fixed_bytes, priors, strict=True)
        ]
        self._coefficients = self._priors
        self._samples: deque[PeakSample] = deque(maxlen=MEMORY_OF_SAMPLES)
        self.margin = _SMALLEST_MARGIN
        self.trust = _FIRST_TRUST
        self._largest_batch: float = 1 if must_probe else math.inf
        self._learn(samples)

    def predict(self, shape: BatchShape) -> tuple[int, ...]:
        """The peak that a batch of *shape* is expected to reach on each device, in bytes."""
        features = _features(shape)
        return tuple(
            int(fixed + (coefficients @ features).max())
            for fixed, coefficients in zip(self._fixed_bytes, self._coefficients, strict=True)
        )

    def fits(self, shape: BatchShape, budget_bytes: Sequence[int]) -> bool:
        """Whether *shape*, with the margin, stays within the trusted part of every device's budget.

        With *must_probe*, no batch fits that is larger than what has been measured allows.
        """
        return shape.batch_size <= self._largest_batch and all(
            (predicted - fixed) * (1 + self.margin) <= (budget - fixed) * self.trust
            for predicted, fixed, budget in zip(
                self.predict(shape), self._fixed_bytes, budget_bytes, strict=True
            )
        )

    def observe(self, sample: PeakSample) -> None:
        """Learn from a batch: refit the coefficients, the margin and the trust."""
        self._learn([sample])

    def _learn(self, samples: Sequence[PeakSample]) -> None:
        for sample in samples:
            self.trust = self._next_trust(sample)
            self._samples.append(sample)
        if samples:
            self._coefficients = [self._fit(device) for device in range(len(self._fixed_bytes))]
            # Errors are judged by the new fit: what it has learnt needs no margin any more.
            recent = sorted(map(self._excess, list(self._samples)[-_RECENT:]))
            # Not the very worst: one odd batch would hold all others down for long.
            quantile = 1.0 if self._must_probe else _MARGIN_QUANTILE
            worst = recent[int(quantile * (len(recent) - 1))]
            self.margin = min(max(worst, _SMALLEST_MARGIN), _LARGEST_MARGIN)
            self._largest_batch = self._next_largest_batch()

    def _next_largest_batch(self) -> float:
        if not self._must_probe:
            return math.inf
        sizes = [sample.shape.batch_size for sample in self._samples if not sample.out_of_memory]
        return 1 if len(sizes) < _NUM_PROBES else 2 * max(sizes)

    def _next_trust(self, sample: PeakSample) -> float:
        if not sample.out_of_memory:
            # That a probe ran clean says nothing of batches.
            is_probe = self._must_probe and len(self._samples) < _NUM_PROBES
            return self.trust if is_probe else min(1.0, self.trust * _TRUST_GAIN)
        # A request alone is tried whatever the prediction says; that it fails says nothing of larger batches.
        alone = sample.shape.batch_size == 1
        return self.trust if alone else max(_LEAST_TRUST, self.trust * _TRUST_LOSS)

    def _excess(self, sample: PeakSample) -> float:
        return max(
            (peak - fixed) / max(predicted - fixed, 1) - 1
            for peak, predicted, fixed in zip(
                sample.peak_bytes, self.predict(sample.shape), self._fixed_bytes, strict=True
            )
        )

    def _fit(self, device: int) -> FloatArray:
        coefficients = self._fit_to([s for s in self._samples if not s.out_of_memory], device)
        # A batch that ran out of memory tells only how much it took at least.
        short = {
            id(s) for s in self._samples if s.out_of_memory and self._falls_short(s, device, coefficients)
        }
        if not short:
            return coefficients
        return self._fit_to([s for s in self._samples if not s.out_of_memory or id(s) in short], device)

    def _falls_short(self, sample: PeakSample, device: int, coefficients: FloatArray) -> bool:
        taken = sample.peak_bytes[device] - self._fixed_bytes[device]
        return bool((coefficients @ _features(sample.shape)).max() < taken)

    def _fit_to(self, samples: Sequence[PeakSample], device: int) -> FloatArray:
        if not samples:
            return self._priors[device]
        features = np.stack([_features(s.shape) for s in samples])
        peaks = np.asarray([s.peak_bytes[device] for s in samples], np.float64) - self._fixed_bytes[device]
        # A resident set can shrink below what it was at first: no batch is all but free.
        least = _LEAST_PEAK_FRACTION * (features @ self._priors[device].T).max(axis=1)
        return fit_phases(features, np.maximum(peaks, least), self._priors[device])


def _features(shape: BatchShape) -> FloatArray:
    return np.asarray([1, *astuple(shape)], dtype=np.float64)


def fit_phases(features: FloatArray, peaks: FloatArray, prior: FloatArray) -> FloatArray:
    """Coefficients [phases, features] whose largest phase gives *peaks*.

    *features* is [samples, features], *peaks* [samples] in bytes above what is fixed. A sample
    tells of the phase that dominates it, which the coefficients themselves decide: assign and fit
    by turns, from the prior (max-affine regression: Magnani and Boyd 2009). A phase that never
    dominated keeps its formula: samples of another phase say nothing of it.
    """
    coefficients = prior
    for _ in range(_ROUNDS):
        dominant = (features @ coefficients.T).argmax(axis=1)
        coefficients = np.stack(
            [
                _fit_phase(features[dominant == k], peaks[dominant == k], phase)
                for k, phase in enumerate(coefficients)
            ]
        )
    return coefficients


def _fit_phase(features: FloatArray, peaks: FloatArray, prior: FloatArray) -> FloatArray:
    # Relative errors, and coefficients as multiples of the prior: all terms are of order one.
    if not len(peaks):
        return prior
    return prior * fit_multiples(features * prior / peaks[:, None], np.ones(len(peaks)))


def fit_multiples(rows: FloatArray, targets: FloatArray) -> FloatArray:
    """The x ≥ 0 that minimises ‖rows·x − targets‖² + w·‖x/common − 1‖².

    *rows* is [samples, features] in multiples of the prior, *targets* is [samples]. *common* is
    the best single multiple for all features: a formula that is off by a factor is corrected
    as a whole, and features that the samples cannot tell apart keep their proportion.
    Coordinate descent on the normal equations, which are strictly convex, so it converges.
    """
    sums = rows.sum(axis=1)
    common = max(float(sums @ targets) / max(float(sums @ sums), 1e-12), 1e-3)
    gram = rows.T @ rows + _PRIOR_WEIGHT / common**2 * np.eye(rows.shape[1])
    aim = rows.T @ targets + _PRIOR_WEIGHT / common
    solution = np.full(rows.shape[1], common)
    for _ in range(_SWEEPS):
        for k in range(len(solution)):
            rest = gram[k] @ solution - gram[k, k] * solution[k]
            solution[k] = max(0.0, (aim[k] - rest) / gram[k, k])
    return solution
