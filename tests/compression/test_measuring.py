"""Estimates of candidates stand beside fits of their own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_compress import compress
from torchrec_compress.compression import measuring
from torchrec_compress.compression.candidates import Tried
from torchrec_compress.compression.knapsack import undominated
from torchrec_compress.compression.measuring import measure_candidates, sample_of, share_of_signal
from torchrec_compress.compression.rows import rows_of
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import CodebookConfig, MECConfig, PQConfig

FEW = PQConfig(num_codes=1, codebook_size=32, popularity="count")  # codewords, which are quick to fit


def clustered(num_rows: int, power: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200, 16, generator=generator)[torch.randint(200, (num_rows,), generator=generator)]
    rows = rows + torch.randn(num_rows, 16, generator=generator)
    counts = (1 + 20 * num_rows * torch.arange(1, num_rows + 1).pow(-power)).long()
    return rows, counts[torch.randperm(num_rows, generator=generator)]


def measure(rows: Tensor, counts: Tensor, base: CodebookConfig = FEW, lengths: tuple[int, ...] = (1, 2, 4), seed=0):
    sample = sample_of(rows_of("measure", {"t": rows})["t"], counts, seed, None)
    found = measure_candidates(sample, Tried(base, lengths))
    assert len({each.option for each in found}) == len(found)
    return {each.option: each for each in found}


def table(rows: Tensor) -> EmbeddingBagConfig:
    return EmbeddingBagConfig(name="t", num_embeddings=len(rows), embedding_dim=rows.shape[1], feature_names=["t"])


def own_error(config, rows: Tensor, counts: Tensor) -> float:
    dense = EmbeddingBagCollection([table(rows)])
    with torch.no_grad():
        dense.embedding_bags["t"].weight.copy_(rows)  # type: ignore[operator]
    made = compress(dense, config, counts={"t": counts})
    gaps = made.table_rows("t", torch.arange(len(rows))).detach() - rows
    return float(gaps.square().sum(1).double() @ popularity_weights(counts, "count", len(rows)).double())


@pytest.mark.parametrize("power", [0.3, 1.1])
def test_estimates_are_near_fits_of_their_own(power):
    """A fit of its own is longer and knows its head: that is worth up to three tenths, of few codewords."""
    rows, counts = clustered(4000, power)
    found = measure(rows, counts)
    kinds = {(c.option.structure, c.option.num_codes) for c in found.values() if isinstance(c.option, PQConfig)}
    assert kinds == {("product", 1), ("product", 2), ("product", 4), ("residual", 2), ("residual", 4)}
    assert {config.method for config in found} == {"dense", "int8", "int4", "hash", "pq"}
    for config, each in found.items():
        heads = getattr(config, "num_hot_rows", 0)
        if heads in (0, 40, 400):
            error = own_error(config, rows, counts)
            assert 0.9 * error <= each.error + 1e-9 <= 1.3 * error + 1e-6, config
        assert each.num_bytes == config.stored_bytes(table(rows))


def test_a_sample_of_a_large_table_stands_for_all_of_it(monkeypatch):
    rows, counts = clustered(6000, 0.9)
    whole = measure(rows, counts, lengths=(2,))
    monkeypatch.setattr(measuring, "_MEASURED_ROWS", 3000)
    sampled, other = (measure(rows, counts, lengths=(2,), seed=seed) for seed in (0, 1))
    assert sampled.keys() == whole.keys() and len(whole) > 12
    assert sampled != other
    for config, each in sampled.items():
        assert each.num_bytes == whole[config].num_bytes
        assert each.error == pytest.approx(whole[config].error, rel=0.15), config


def test_another_popularity_is_fitted_to_its_own_weights(monkeypatch):
    """A sample is drawn by look-ups; a method that weighs rows alike must see each stand for its kind."""
    rows, counts = clustered(6000, 1.2)
    base = PQConfig(num_codes=1, codebook_size=32)
    whole = measure(rows, counts, base, lengths=(1,))
    monkeypatch.setattr(measuring, "_MEASURED_ROWS", 3000)
    sampled = measure(rows, counts, base, lengths=(1,))
    for config in (base, FEW):
        assert (config in whole) == (config == base)
    assert sampled[base].error == pytest.approx(whole[base].error, rel=0.15)
    assert whole[base].error > 1.2 * measure(rows, counts, FEW, lengths=(1,))[FEW].error


@pytest.mark.parametrize("hot_dtype", ["int4", "int8"])
def test_a_larger_head_leaves_less_error_and_finer_rows_less(hot_dtype):
    found = measure(*clustered(4000, 1.1))
    for family in ("product", "residual"):
        mine = [c for c in found if isinstance(c, PQConfig) and (c.structure, c.num_codes) == (family, 2)]
        sizes = sorted({c.num_hot_rows for c in mine if c.hot_dtype == hot_dtype and c.num_hot_rows})
        by_size = {c.num_hot_rows: found[c].error for c in mine if c.hot_dtype == hot_dtype}
        assert len(sizes) >= 4 and all(by_size[a] > by_size[b] for a, b in pairwise(sizes))


def test_codes_as_large_as_int8_rows_are_not_fitted(monkeypatch):
    rows, counts = clustered(300, 0.5)  # 32 codewords of 16 floats, 300 rows of 20 bytes in int8

    def refuse(self, table, data, lengths):
        assert max(lengths) < 3, "residual codes of three take 300 x 3 + 6,144 bytes"
        return iter(())

    monkeypatch.setattr(PQConfig, "serve_lengths", refuse)
    measure(rows, counts, lengths=(2, 3))


def test_other_codes_are_measured_by_their_own_fits():
    rows, counts = clustered(1500, 0.8)
    base = MECConfig(num_codes=1, codebook_size=16, fit_options=MECFit(num_steps=20, batch_size=256))
    found = measure(rows, counts, base, lengths=(2,))
    config = replace(base, num_codes=2)
    assert found[config].error == pytest.approx(own_error(config, rows, counts), rel=0.1)


def test_a_sample_weighs_as_much_as_the_table_whatever_the_popularity(monkeypatch):
    monkeypatch.setattr(measuring, "_MEASURED_ROWS", 3000)
    rows, counts = clustered(6000, 1.2)
    sample = sample_of(rows_of("measure", {"t": rows})["t"], counts, 0, None)
    for method in (PQConfig(num_codes=1), FEW):
        weights = sample.data_of(method).weights
        assert weights is not None and len(weights) == 3000
        whole = method.learning_weights(table(rows), sample.data)
        assert float(weights.double().sum()) == pytest.approx(float(whole.double().sum()), rel=0.1)


@pytest.mark.parametrize("noise", [0.0, 40.0])
@pytest.mark.parametrize("most", [16384, 700])
def test_shared_rows_cost_what_is_signal_in_them(noise, most, monkeypatch):
    monkeypatch.setattr(measuring, "_MEASURED_ROWS", most)
    rows, counts = clustered(2000, 0.9)
    sample = sample_of(rows_of("measure", {"t": rows})["t"], counts, 0, None, noise)
    order = torch.argsort(counts, descending=True, stable=True)
    for own in (0, 50, 600):
        rare = order[own:]
        mean = counts[rare].double() @ rows[rare].double() / counts[rare].sum()
        gaps = (rows[rare] - mean).square().sum(dim=1)
        expected = float((gaps * counts[rare] * share_of_signal(counts[rare].double(), noise)).sum())
        found = sample.error_of_mean(sample.hot_rows(own))
        assert found == pytest.approx(expected, rel=1e-4 if most > 2000 else 0.2)


def test_noise_makes_it_cheap_to_share_rows():
    rows, counts = clustered(4000, 0.9)

    def coded(noise: float) -> list[int]:
        sample = sample_of(rows_of("measure", {"t": rows})["t"], counts, 0, None, noise)
        found = undominated("t", measure_candidates(sample, Tried(FEW, (1, 2))))
        options = [each.option for each in found if isinstance(each.option, PQConfig)]
        return [option.num_coded or len(rows) for option in options]

    assert sum(coded(60.0)) / len(coded(60.0)) < 0.8 * sum(coded(0.0)) / len(coded(0.0))
