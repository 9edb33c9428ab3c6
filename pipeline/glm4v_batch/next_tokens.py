"""Choose the next token of many rows at once, each at a step of its own, without leaving the device."""

# R rows, V vocabulary

from dataclasses import dataclass

import torch
from torch import Tensor

from glm4v_batch.job import GenerationSettings
from glm4v_batch.sampling import gumbel_noise, warpers


@dataclass(frozen=True, slots=True)
class RowHistory:
    """What a row's choice depends on beside its logits.

    seeds  int64 [R], where each row's noise starts
    steps  int64 [R], tokens that the row has written
    seen   bool [R, V], tokens of prompt and answer; None without a repetition penalty
    """

    seeds: Tensor
    steps: Tensor
    seen: Tensor | None


def next_tokens(logits_RV: Tensor, history: RowHistory, settings: GenerationSettings) -> Tensor:
    """int64 [R]: what `generate()` would choose with *settings*, and with the seeded noise of `sampling`."""
    scores_RV = logits_RV.float()
    if history.seen is not None:
        scores_RV = penalised(scores_RV, history.seen, settings.repetition_penalty)
    if settings.temperature:
        scores_RV = _warped(scores_RV, settings)
        scores_RV = scores_RV + gumbel_noise(history.seeds, history.steps, scores_RV.shape[1])
    return scores_RV.argmax(dim=1)


def penalised(scores_RV: Tensor, seen_RV: Tensor, penalty: float) -> Tensor:
    """*scores_RV* with those of seen tokens pushed down (Keskar et al. 2019, "CTRL")."""
    pushed_RV = torch.where(scores_RV < 0, scores_RV * penalty, scores_RV / penalty)
    return torch.where(seen_RV, pushed_RV, scores_RV)


def _warped(scores_RV: Tensor, settings: GenerationSettings) -> Tensor:
    for warper in warpers(settings):
        scores_RV = warper(None, scores_RV)  # which looks at nothing but the scores
    return scores_RV
