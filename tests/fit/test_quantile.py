"""Quantile codes: uniform usage, co-occurrence kept, ties and unseen ids by hash."""

import pytest
import torch

from torchrec_compress.fit import quantile
from torchrec_compress.fit.quantile import quantile_codes


def pairs(num_rows: int = 600, num_contexts: int = 80, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of 8 groups; each row occurs with contexts of its own group mostly."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.arange(num_rows).repeat(12)
    noise = torch.rand(len(row), generator=generator) < 0.1
    own = torch.randint(num_contexts // 8, row.shape, generator=generator) * 8 + row % 8
    anywhere = torch.randint(num_contexts, row.shape, generator=generator)
    return row, torch.where(noise, anywhere, own)


@pytest.mark.parametrize("codebook_size", [7, 64, 256])
def test_usage_is_uniform(codebook_size: int) -> None:
    codes = quantile_codes(*pairs(), num_rows=600, num_codes=3, codebook_size=codebook_size, seed=0)
    assert codes.shape == (600, 3)
    assert codes.dtype == torch.int64
    for column in codes.T:
        usage = torch.bincount(column, minlength=codebook_size)
        assert len(usage) == codebook_size
        assert int(usage.max() - usage.min()) <= 1
        assert int(usage[0]) == -(-600 // codebook_size)  # of unequal bins the first is a large one


def test_ids_of_one_group_share_codes_more_often() -> None:
    codes = quantile_codes(*pairs(), num_rows=600, num_codes=6, codebook_size=8, seed=0)
    same = (codes[:, None] == codes[None]).float().mean(dim=2)
    group = torch.arange(600) % 8
    together = group[:, None] == group[None]
    apart = same[~together].mean()
    together.fill_diagonal_(False)
    assert same[together].mean() > 1.5 * apart


def test_ids_never_seen_get_hashed_uniform_codes() -> None:
    row, context = pairs(100)
    codes = quantile_codes(row, context, num_rows=50_100, num_codes=2, codebook_size=64, seed=3)
    for column in codes[100:].T:
        usage = torch.bincount(column, minlength=64).double()
        chi_square = float(((usage - usage.mean()) ** 2 / usage.mean()).sum())
        assert chi_square < 120  # 63 degrees of freedom: exceeded once in 10^5
    pair_usage = torch.bincount(codes[100:, 0] * 64 + codes[100:, 1], minlength=4096)
    assert int((pair_usage == 0).sum()) < 5  # the codes of one id are independent
    fewer = quantile_codes(row, context, num_rows=1000, num_codes=2, codebook_size=64, seed=3)
    assert torch.equal(fewer, codes[:1000])  # a pure function of (seed, id)
    other = quantile_codes(row, context, num_rows=1000, num_codes=2, codebook_size=64, seed=4)
    assert not torch.equal(fewer[100:], other[100:])


def test_deterministic_and_blind_to_the_order_and_repetition_of_pairs() -> None:
    row, context = pairs()
    first = quantile_codes(row, context, num_rows=600, num_codes=4, codebook_size=16, seed=0)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    twice = torch.cat([order, order[:50]])
    assert torch.equal(first, quantile_codes(row[twice], context[twice], 600, 4, 16, 0))


def test_ties_are_broken_by_a_hash_and_bins_stay_full() -> None:
    row = torch.arange(64)
    codes = quantile_codes(row, torch.zeros_like(row), num_rows=64, num_codes=1, codebook_size=8, seed=0)
    assert torch.bincount(codes[:, 0]).tolist() == [8] * 8
    assert not torch.equal(codes[:, 0], row // 8)
    assert not torch.equal(codes, quantile_codes(row, torch.zeros_like(row), 64, 1, 8, seed=1))


def test_truncated_and_full_factorisation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    row, context = pairs()
    full = quantile_codes(row, context, 600, 3, 8, 0)
    monkeypatch.setattr(quantile, "SMALL_SIDE", 0)
    assert (quantile_codes(row, context, 600, 3, 8, 0) == full).float().mean() > 0.99


def test_fewer_ids_than_codewords() -> None:
    codes = quantile_codes(torch.tensor([4, 9]), torch.tensor([0, 1]), 300, 1, 256, 0)
    assert codes[4, 0] != codes[9, 0]


@pytest.mark.parametrize(
    ("rows", "contexts", "options", "message"),
    [
        ([0, 1], [0], {}, r"vectors of one length above 0, got \[2\] and \[1\]"),
        ([], [], {}, r"got \[0\] and \[0\]"),
        ([0, 5], [0, 1], {}, r"row_ids must be in \[0, 4\), got 5"),
        ([-1, 1], [0, 1], {}, r"row_ids must be in \[0, 4\), got -1"),
        ([0, 1], [0, -7], {}, "context_ids must be >= 0, got -7"),
        ([0, 1], [0, 1], {"num_codes": 3}, r"at most the distinct ids \(2\) and contexts \(2\), got 3"),
        ([0, 1], [0, 1], {"num_codes": 0}, "num_codes must be at least 1"),
        ([0, 1], [0, 1], {"codebook_size": 70000}, r"codebook_size in \[1, 65536\], got 1 and 70000"),
        ([0, 1], [0, 1], {"codebook_size": 5}, r"got K = 5 larger than the rows \(4\)"),
    ],
)
def test_bad_input(rows: list[int], contexts: list[int], options: dict, message: str) -> None:
    arguments = {"num_rows": 4, "num_codes": 1, "codebook_size": 2, "seed": 0, **options}
    ids = torch.tensor(rows, dtype=torch.int64), torch.tensor(contexts, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"quantile_codes: .*{message}"):
        quantile_codes(*ids, **arguments)
