"""The choice of the next token, against transformers' own processors."""

import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor
from transformers import TemperatureLogitsWarper as Temperature
from transformers import TopKLogitsWarper as TopK
from transformers import TopPLogitsWarper as TopP

from glm4v_batch.job import GenerationSettings
from glm4v_batch.next_tokens import RowHistory, next_tokens
from glm4v_batch.sampling import SeededGumbel

SEEDS = [11, 22, 33, 44]
IDS = torch.tensor([[1, 2, 3], [4, 4, 4], [9, 8, 7], [0, 5, 6]])


def seen(ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    return torch.zeros(len(ids), vocabulary, dtype=torch.bool).scatter_(1, ids, value=True)


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(),
        GenerationSettings(repetition_penalty=1.7),
        GenerationSettings(temperature=0.7),
        GenerationSettings(temperature=1.3, top_k=5, top_p=0.8, repetition_penalty=1.2),
    ],
)
def test_the_choice_is_that_of_transformers_processors(settings: GenerationSettings) -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)) * 3
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)])
    if settings.temperature:
        processors.append(Temperature(float(settings.temperature)))
        processors.extend([TopK(settings.top_k)] if settings.top_k else [])
        processors.extend([TopP(settings.top_p)] if settings.top_p else [])
        processors.append(SeededGumbel(SEEDS, prompt_length=1))
    penalised = seen(IDS, 50) if settings.repetition_penalty != 1 else None

    found = next_tokens(logits, RowHistory(torch.tensor(SEEDS), torch.full((4,), 2), penalised), settings)

    assert found.tolist() == processors(IDS, logits.clone()).argmax(dim=1).tolist()


def test_each_row_draws_by_its_own_step_and_not_by_its_neighbours() -> None:
    logits = torch.zeros(3, 1000)
    settings = GenerationSettings(temperature=1.0)
    steps = torch.tensor([4, 5, 6])
    together = next_tokens(logits, RowHistory(torch.tensor([7, 7, 7]), steps, None), settings)

    alone = [
        int(next_tokens(logits[:1], RowHistory(torch.tensor([7]), steps[row : row + 1], None), settings))
        for row in range(3)
    ]

    assert together.tolist() == alone
    assert len(set(alone)) == 3
