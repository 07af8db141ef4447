"""The order of samples: every one once, another order each epoch, and neighbours of one length where asked for."""

import itertools

import torch

from tnm_pipeline.training.shuffle import Shuffle

LENGTHS = torch.randint(1, 50, (1003,), generator=torch.Generator().manual_seed(0))


def order(shuffle: Shuffle, epoch: int = 0) -> list[int]:
    shuffle.epoch = epoch
    return list(shuffle)


def padded(rows: list[int]) -> int:
    """Tokens of a whole epoch in batches of 8."""
    batches = [rows[start : start + 8] for start in range(0, len(rows), 8)]
    return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)


def test_every_sample_comes_once_and_epochs_and_seeds_differ() -> None:
    for lengths in (None, LENGTHS):
        orders = [order(Shuffle(1003, seed, 8, lengths), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
        assert all(sorted(rows) == list(range(1003)) for rows in orders)
        assert len({tuple(rows) for rows in orders}) == 3
        assert order(Shuffle(1003, 0, 8, lengths)) == orders[0]


def test_without_lengths_it_is_a_permutation_of_torch() -> None:
    expected = torch.randperm(20, generator=torch.Generator().manual_seed(5 * 1_000_003 + 2))
    assert order(Shuffle(20, 5, 8), epoch=2) == expected.tolist()


def test_samples_of_similar_length_share_a_batch() -> None:
    grouped, mixed = (order(Shuffle(1003, 0, 8, lengths)) for lengths in (LENGTHS, None))
    assert padded(grouped) < 1.1 * int(LENGTHS.sum())
    assert padded(mixed) > 1.5 * int(LENGTHS.sum())
    means = [float(LENGTHS[grouped[start : start + 8]].double().mean()) for start in range(0, 1000, 8)]
    rising = sum(one < other for one, other in itertools.pairwise(means))
    assert 0.3 < rising / len(means) < 0.7  # the batches themselves come in no order
