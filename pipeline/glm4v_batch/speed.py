"""Predict how long the batches of a job take, and learn from those that were measured.

A batch takes `Σ coefficient × feature` seconds, coefficients ≥ 0: of its decode steps, visual
patches, padded prompt tokens and written tokens. Coefficients start from arithmetic on the model's
dimensions and are fitted to measured batches. How sure the result is comes from batches that a fit
has not seen and from how far the sampled rows differ, never from the fit's own residuals.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from glm4v_batch.activations import FloatArray
from glm4v_batch.memory import fit_multiples
from glm4v_batch.survey import Survey
from glm4v_batch.types import BatchRun, Device, RequestSize

_GPU_FLOPS_PER_SECOND = 1e14
_PACKED_FLOPS_PER_SECOND = 2.4e14
_CPU_FLOPS_PER_SECOND = 1e11
_STEP_SECONDS_PER_LAYER = 2e-3
_PACKED_STEP_SECONDS_PER_LAYER = 3e-4
_GUESSED_PADDING = 1.1
_GUESS_FACTOR = 3.0

_MEMORY_OF_RUNS = 256
# Of few batches the early ones, which are small and slow, must not count as long.
_HALF_LIFE_FRACTION = 1 / 3
_MOST_HALF_LIFE_RUNS = 64
_ROUNDS = 12
_LEAST_OF_PRIOR = 1e-2
_FOLDS = 8
# Its square is the weight of the prior beside that of one batch: it decides what few batches leave open.
_RIDGE = 0.1
# Huber's usual choice: 95 % as good as least squares where no batch is odd.
_HUBER_DEVIATIONS = 1.345
_DEVIATIONS_PER_MEDIAN = 1.4826  # of the absolute errors, if they are normal
_LEAST_DEVIATION = 0.02
_LEAST_PREDICTED_FRACTION = 0.05
_LEAST_SECONDS = 1e-9

# 80 % of a normal error lies within so many standard deviations.
_DEVIATIONS = 1.2816
_GUESS_ERROR = math.log(_GUESS_FACTOR) / _DEVIATIONS
_DRIFT = 0.05
_ONE_PLACE = 0.5


@dataclass(frozen=True, slots=True)
class TimeEstimate:
    """The seconds that a job is expected to take, and an interval that holds the truth 8 times in 10.

    Where *is_measured* is false this is a guess, and stays one until the first batches are measured.
    """

    seconds: float
    low_seconds: float
    high_seconds: float
    is_measured: bool


@dataclass(frozen=True, slots=True)
class WorkAhead:
    """What is left to do, and how it will run.

    *num_rows* are shared by *num_replicas* copies of the model, each of which runs batches of about
    *batch_size* requests after the *load_seconds* that loading takes.
    """

    survey: Survey
    num_rows: int
    batch_size: int
    num_replicas: int = 1
    load_seconds: float = 0.0


def estimate(ahead: WorkAhead, runs: Sequence[BatchRun], prior: FloatArray) -> TimeEstimate | None:
    """How long *ahead* takes, judging by *runs* of the same model on such devices, the oldest first.

    *prior* is what `prior_seconds` gives. None where the survey found no request, so that nothing is
    known of the work. Loading and batches count; where preprocessing cannot keep up with them a run
    takes longer.
    """
    if not ahead.survey.sizes:
        return None
    timed = [run for run in runs if run.seconds > 0][-_MEMORY_OF_RUNS:]
    clean = [run for run in timed if not run.out_of_memory]
    if not clean:
        return _interval(ahead, _total_seconds(ahead, _Speed(prior)), _GUESS_FACTOR, is_measured=False)
    # What ran out of memory ran for nothing, and some of what comes will.
    overhead = sum(run.seconds for run in timed) / sum(run.seconds for run in clean)
    steady = _without_first(clean) or clean
    seconds = overhead * _total_seconds(ahead, _learn(steady, prior))
    factor = math.exp(_DEVIATIONS * _relative_error(ahead, steady, prior))
    return _interval(ahead, seconds, factor, is_measured=True)


def side_by_side(alone: Sequence[TimeEstimate], load_seconds: float) -> TimeEstimate | None:
    """How long copies take together that each would take *alone* for all of the work, after loading.

    Whoever is faster gets more of it. None where nothing is known.
    """
    if not alone:
        return None

    def together(seconds: Iterable[float]) -> float:
        return load_seconds + 1 / sum(1 / max(each, 1e-9) for each in seconds)

    return TimeEstimate(
        together(each.seconds for each in alone),
        together(each.low_seconds for each in alone),
        together(each.high_seconds for each in alone),
        is_measured=all(each.is_measured for each in alone),
    )


def _without_first(runs: Sequence[BatchRun]) -> list[BatchRun]:
    """*runs* but for each replica's first, which also loads and tunes kernels and tells of no other."""
    first = {run.replica: place for place, run in reversed(list(enumerate(runs)))}
    return [run for place, run in enumerate(runs) if place != first[run.replica]]


def prior_seconds(
    config: Mapping[str, Any], device: Device, fetching_seconds: float = 0.0, *, is_packed: bool = False
) -> FloatArray:
    """Seconds per decode step, visual patch, padded token and written token, [features]: a guess.

    *fetching_seconds* is what each step takes on top to fetch offloaded weights.
    *config* is a checkpoint's config.json; what it leaves out counts as in GLM-4.1V-9B. Each weight is
    two operations for whatever passes it; attention's products are left out. That makes 25.1 of the
    27.8 TFLOP that GLM-4.1V-9B takes for 3,996 patches, a prompt of 1,041 and an answer of 128 tokens.
    `generate()` was measured to do 220 (vision) to 400 (prefill) of them a second on an H100; cards of
    24 GB have about a tenth of its speed by their data sheets; the guess stands between. A decode step
    is bound by launches from Python: 46 to 185 ms were measured for 40 layers. The packed engine does
    520 of them a second on that H100, and a step without prompts took 7 to 15 ms.
    """
    gpu_speed = _PACKED_FLOPS_PER_SECOND if is_packed else _GPU_FLOPS_PER_SECOND
    layer_seconds = _PACKED_STEP_SECONDS_PER_LAYER if is_packed else _STEP_SECONDS_PER_LAYER
    speed = _CPU_FLOPS_PER_SECOND if device.index is None else gpu_speed
    text: Mapping[str, Any] = config.get("text_config") or config
    num_layers: int = text.get("num_hidden_layers", 40)
    token = num_layers * _layer_weights(text)
    head = text.get("hidden_size", 4096) * text.get("vocab_size", 151552)
    patch = _patch_weights(config.get("vision_config") or {}, text)
    step_seconds = layer_seconds * num_layers + fetching_seconds
    return np.array([step_seconds, *(2 * weights / speed for weights in (patch, token, token + head))])


def _layer_weights(text: Mapping[str, Any]) -> float:
    """Weights of a decoder layer that a token passes: of experts only those that it is sent to."""
    hidden: int = text.get("hidden_size", 4096)
    heads: int = text.get("num_attention_heads", 32)
    head_dim: int = text.get("head_dim") or hidden // heads
    width: int = text.get("intermediate_size", 13696)
    if experts := text.get("num_experts_per_tok"):
        width = (experts + text.get("n_shared_experts", 0)) * text.get("moe_intermediate_size", 1408)
    return float(2 * hidden * head_dim * (heads + text.get("num_key_value_heads", 2)) + 3 * hidden * width)


def _patch_weights(vision: Mapping[str, Any], text: Mapping[str, Any]) -> float:
    """Weights of the vision tower that a patch passes; those of the merger count once per four patches."""
    hidden = vision.get("hidden_size", 1536)
    out = vision.get("out_hidden_size", text.get("hidden_size", 4096))
    # The blocks' own MLP is as wide as the output (Glm4VisionMlp), the merger's as intermediate_size.
    blocks = vision.get("depth", 24) * (4 * hidden**2 + 3 * hidden * out)
    merger = 4 * hidden * out + out**2 + 3 * out * vision.get("intermediate_size", 13696)
    return float(blocks + merger / 4)


@dataclass(frozen=True, slots=True)
class _Speed:
    """Seconds per feature, and what batches look like.

    *padding* is padded over true prompt tokens, *answered* the part of max_new_tokens that is written,
    and *rows* how many answers grow at once; None where batches are run one by one.
    """

    seconds: FloatArray
    padding: float = _GUESSED_PADDING
    answered: float = 1.0
    rows: float | None = None


def _learn(runs: Sequence[BatchRun], prior: FloatArray) -> _Speed:
    padded_tokens = sum(run.shape.padded_tokens for run in runs)
    asked_tokens = sum(map(_asked_tokens, runs))
    flowing = [run for run in runs if run.asked_tokens is not None]
    return _Speed(
        seconds=_fit(runs, prior),
        padding=padded_tokens / max(1, sum(run.prompt_tokens for run in runs)),
        # Until the first answers have ended they are taken to be as long as allowed.
        answered=sum(run.completion_tokens for run in runs) / asked_tokens if asked_tokens else 1.0,
        rows=sum(map(_room_tokens, flowing)) / sum(map(_num_steps, flowing)) if flowing else None,
    )


def _room_tokens(run: BatchRun) -> int:
    """What the KV cache had room for beside the prompts."""
    return run.shape.kv_tokens - run.shape.padded_tokens


def _num_steps(run: BatchRun) -> float:
    return _room_tokens(run) / run.shape.batch_size


def _asked_tokens(run: BatchRun) -> int:
    return _room_tokens(run) if run.asked_tokens is None else run.asked_tokens


def _fit(runs: Sequence[BatchRun], prior: FloatArray) -> FloatArray:
    """The seconds per feature that come nearest to *runs*, in relative terms.

    Recent batches count more. Odd ones, such as those for which kernels were compiled, count less
    (Huber 1964): each round measures errors, and weighs them, by the fit before it. A light pull to that
    fit, the first time to the prior's proportions (ridge regression), stands for the shapes that *runs* lack.
    """
    features = _features(runs)
    seconds = np.array([run.seconds for run in runs])
    half_life = min(_MOST_HALF_LIFE_RUNS, _HALF_LIFE_FRACTION * len(runs))
    recency = 0.5 ** (np.arange(len(runs))[::-1] / half_life)
    scale = np.median(seconds / (features @ prior))
    fitted = prior * scale
    for _ in range(_ROUNDS):
        predicted = np.maximum(features @ fitted, _LEAST_PREDICTED_FRACTION * seconds)
        errors = np.abs(seconds / predicted - 1)
        deviation = max(_DEVIATIONS_PER_MEDIAN * float(np.median(errors)), _LEAST_DEVIATION)
        weights = recency * np.minimum(1, _HUBER_DEVIATIONS * deviation / np.maximum(errors, 1e-9))
        roots = np.sqrt(weights) / predicted
        # Pulled to the round before, not to the prior for ever: what the batches do tell may lie far off
        # the prior's proportions, and what they leave open stays where it was.
        base = np.maximum(fitted, _LEAST_OF_PRIOR * scale * prior)
        rows = np.vstack([features * base * roots[:, None], _RIDGE * np.eye(len(prior))])
        targets = np.concatenate([seconds * roots, np.full(len(prior), _RIDGE)])
        fitted = base * fit_multiples(rows, targets)
    return fitted


def _features(runs: Sequence[BatchRun]) -> FloatArray:
    return np.array(
        [
            (
                # All that the batch may have decoded: how early it stopped is the coefficient's.
                _num_steps(run),
                run.shape.visual_patches,
                run.shape.padded_tokens,
                run.completion_tokens if run.asked_tokens is None else _room_tokens(run),
            )
            for run in runs
        ],
        dtype=np.float64,
    )


def _interval(ahead: WorkAhead, seconds: float, factor: float, *, is_measured: bool) -> TimeEstimate:
    load = ahead.load_seconds
    return TimeEstimate(load + seconds, load + seconds / factor, load + seconds * factor, is_measured)


def _total_seconds(ahead: WorkAhead, speed: _Speed) -> float:
    return _num_requests(ahead) * float(np.mean(np.concatenate(_seconds_per_request(ahead, speed))))


def _num_requests(ahead: WorkAhead) -> float:
    """Requests for the replica that gets most: failed records cost next to nothing."""
    num_good, num_failed = len(ahead.survey.sizes), ahead.survey.num_failed
    return math.ceil(ahead.num_rows / ahead.num_replicas) * num_good / (num_good + num_failed)


def _num_batches(ahead: WorkAhead) -> int:
    return max(1, math.ceil(_num_requests(ahead) / ahead.batch_size))


def _seconds_per_request(ahead: WorkAhead, speed: _Speed) -> list[FloatArray]:
    """Per sampled place the seconds of each request, an equal share of its batch's steps among them."""
    steps_share = _num_batches(ahead) / max(_num_requests(ahead), 1e-9)

    def seconds(size: RequestSize) -> float:
        written = size.new_tokens * speed.answered
        padded = size.prompt_tokens * speed.padding
        steps = size.new_tokens * steps_share if speed.rows is None else written / speed.rows
        features = (steps, size.visual_patches, padded, written)
        return float(np.dot(features, speed.seconds))

    return [np.array([seconds(size) for size in place]) for place in ahead.survey.places]


def _relative_error(ahead: WorkAhead, runs: Sequence[BatchRun], prior: FloatArray) -> float:
    """The standard deviation of the total's logarithm.

    Independent errors add up: of the fit, of batches about it, of the sample, of what drifts between
    runs; and few batches may all have been slow ones, whatever they say of each other.
    """
    fit, batches = _held_out_variances(ahead, runs, prior)
    sample = _sample_variance(ahead, _learn(runs, prior))
    few = (_GUESS_ERROR / len(runs)) ** 2
    return math.sqrt(fit + batches / _num_batches(ahead) + sample + few + _DRIFT**2)


def _held_out_variances(ahead: WorkAhead, runs: Sequence[BatchRun], prior: FloatArray) -> tuple[float, float]:
    """Relative variances: of the total, by the jackknife over blocks of batches, and of one batch.

    A fit that leaves a block out shows both how much the total hangs on that block, which grows
    where the work ahead is unlike what was measured, and how well the block is predicted unseen.
    """
    if len(runs) < 2:
        return 0.0, 0.0
    totals, errors = [], []
    for rest, held_out in _folds(runs):
        speed = _learn(rest, prior)
        totals.append(math.log(max(_total_seconds(ahead, speed), _LEAST_SECONDS)))
        predicted = np.maximum(_features(held_out) @ speed.seconds, _LEAST_SECONDS)
        errors.append(np.array([run.seconds for run in held_out]) / predicted - 1)
    num = len(totals)
    return (num - 1) * float(np.var(totals)), float(np.mean(np.minimum(np.concatenate(errors) ** 2, 1)))


def _folds(runs: Sequence[BatchRun]) -> Iterator[tuple[list[BatchRun], list[BatchRun]]]:
    # Blocks, not every eighth: neighbours in time share what made them slow.
    for block in np.array_split(np.arange(len(runs)), min(_FOLDS, len(runs))):
        first, last = int(block[0]), int(block[-1])
        yield [*runs[:first], *runs[last + 1 :]], list(runs[first : last + 1])


def _sample_variance(ahead: WorkAhead, speed: _Speed) -> float:
    """Relative variance of the mean request: neighbours resemble each other, so whole places are compared."""
    unseen = max(0.0, 1 - len(ahead.survey.sizes) / max(1, ahead.num_rows))
    means = [float(np.mean(place)) for place in _seconds_per_request(ahead, speed)]
    if len(means) < 2:
        return unseen * _ONE_PLACE**2
    return unseen * float(np.var(means, ddof=1)) / len(means) / float(np.mean(means)) ** 2
