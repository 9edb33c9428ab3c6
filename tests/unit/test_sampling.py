"""Sampling that no neighbour can change."""

import math

import torch

from glm4v_batch.sampling import SeededGumbel, gumbel_noise, row_seed


def seeds(count: int) -> torch.Tensor:
    return torch.tensor([row_seed(0, f"id-{n}", n) for n in range(count)])


def test_noise_has_the_moments_of_a_standard_gumbel_distribution() -> None:
    noise = gumbel_noise(seeds(2000), step=3, vocab_size=200)

    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.02
    assert torch.isfinite(noise).all()


def test_argmax_over_noisy_scores_draws_from_the_softmax() -> None:
    wanted = torch.tensor([0.5, 0.3, 0.15, 0.05])

    draws = (wanted.log() + gumbel_noise(seeds(20_000), step=0, vocab_size=4)).argmax(dim=1)

    frequencies = torch.bincount(draws, minlength=4) / len(draws)
    # Four standard errors of the largest frequency.
    assert (frequencies - wanted).abs().max() < 4 * math.sqrt(0.25 / len(draws))


def test_records_steps_and_tokens_are_independent() -> None:
    one, other = gumbel_noise(seeds(4000), 1, 3), gumbel_noise(seeds(4000), 2, 3)

    columns = torch.stack([one[:, 0], one[:, 1], other[:, 0], one[:, 0].roll(1)])

    off_diagonal = torch.corrcoef(columns) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.07


def test_a_rows_noise_does_not_depend_on_its_batch() -> None:
    together = gumbel_noise(seeds(8), step=5, vocab_size=50)
    alone = gumbel_noise(seeds(8)[6:7], step=5, vocab_size=50)

    assert torch.equal(together[6:7], alone)


def test_the_step_counts_from_the_end_of_the_padded_prompt() -> None:
    scores = torch.zeros(1, 50)
    short = SeededGumbel([1], prompt_length=3)(torch.zeros(1, 5, dtype=torch.long), scores)
    padded = SeededGumbel([1], prompt_length=9)(torch.zeros(1, 11, dtype=torch.long), scores)

    assert torch.equal(short, padded)


def test_another_seed_or_record_gives_another_stream() -> None:
    assert len({row_seed(s, i, r) for s in (0, 1) for i in ("a", "b") for r in (0, 1)}) == 8
