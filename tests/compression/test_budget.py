"""A byte budget is kept, and bytes follow look-ups."""

from dataclasses import replace

import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_compress import compress, decompress
from torchrec_compress.compression import budget, for_budget
from torchrec_compress.compression.budget import measure_candidates
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import MECConfig, PQConfig, QuantileCodesConfig

FEW = PQConfig(num_codes=1, codebook_size=32, popularity="count")  # codewords, which are quick to fit


def trained(rows: dict[str, int], width: int = 16) -> EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [
        EmbeddingBagConfig(name=name, num_embeddings=number, embedding_dim=width, feature_names=[name])
        for name, number in rows.items()
    ]
    return EmbeddingBagCollection(tables)


def test_the_compressed_collection_fits_the_budget() -> None:
    dense = trained({"user": 1000, "item": 400, "day": 7})
    counts = {"user": torch.ones(1000), "item": 1e6 / torch.arange(1, 401), "day": torch.full((7,), 1000.0)}
    most = 12_000
    chosen = for_budget(dense, counts, most, num_codes=(1, 2), codes=FEW)
    footprint = compress(dense, chosen, counts=counts).footprint()
    assert footprint.total_bytes <= most
    assert footprint.total_bytes > 0.7 * most, "most of the budget should be used"
    assert chosen["day"].method == "dense"


def test_bytes_follow_look_ups() -> None:
    rows = {name: torch.randn(700, 16, generator=torch.Generator().manual_seed(1)) for name in ("hot", "cold")}
    counts = {"hot": torch.full((700,), 1000.0), "cold": torch.full((700,), 1.0)}
    chosen = for_budget(rows, counts, 20_000, num_codes=(1, 2), codes=FEW)
    table = EmbeddingBagConfig(name="t", num_embeddings=700, embedding_dim=16, feature_names=["t"])
    assert chosen["hot"].stored_bytes(table) > 1.5 * chosen["cold"].stored_bytes(table)


def test_a_measured_error_is_that_of_the_served_rows() -> None:
    rows = torch.randn(600, 16, generator=torch.Generator().manual_seed(2))
    counts = torch.arange(600) + 1
    dense = EmbeddingBagCollection(
        [EmbeddingBagConfig(name="t", num_embeddings=600, embedding_dim=16, feature_names=["t"])]
    )
    with torch.no_grad():
        dense.embedding_bags["t"].weight.copy_(rows)  # type: ignore[operator]
    candidates = measure_candidates("t", rows, counts, PQConfig(num_codes=1, codebook_size=16), (1, 2), seed=0)
    assert {c.option.method for c in candidates} == {"dense", "int8", "int4", "pq"}
    for candidate in candidates:
        served = compress(dense, candidate.option, counts={"t": counts}).table_rows("t", torch.arange(600)).detach()
        error = float(((rows - served).square().sum(1) * counts).sum())
        assert candidate.error == pytest.approx(error, rel=1e-4, abs=1e-3)


def test_a_sample_of_a_large_table_stands_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    rows, counts = torch.randn(4000, 8, generator=generator), 1 + 8000 // torch.arange(1, 4001)
    order = torch.randperm(4000, generator=generator)

    def measure(seed: int) -> dict:
        found = measure_candidates("t", rows[order], counts[order], FEW, (2,), seed)
        return {c.option: (c.num_bytes, c.error) for c in found}

    whole = measure(0)
    monkeypatch.setattr(budget, "_MAX_MEASURED_ROWS", 2000)
    sampled, other = measure(0), measure(1)
    assert sampled.keys() == whole.keys() and len(whole) > 12
    assert sampled != other
    for option, (num_bytes, error) in sampled.items():
        assert (
            num_bytes
            == whole[option][0]
            == option.stored_bytes(
                EmbeddingBagConfig(name="t", num_embeddings=4000, embedding_dim=8, feature_names=["t"])
            )
        )
        assert error == pytest.approx(whole[option][1], rel=0.3), option


def test_bad_input_says_what_to_do() -> None:
    rows = {"user": torch.randn(500, 16)}
    with pytest.raises(ValueError, match="only one of the two for \\['user'\\]"):
        for_budget(rows, {}, 1000)
    with pytest.raises(ValueError, match="budget"):
        for_budget(rows, {"user": torch.ones(500)}, 10, num_codes=(1,), codes=FEW)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_candidates_that_train_in_their_fit_do_so_whatever_is_switched_off(mode) -> None:
    given = {"user": torch.randn(600, 8, generator=torch.Generator().manual_seed(0))}, {"user": torch.ones(600)}
    codes = MECConfig(num_codes=1, codebook_size=16, fit_options=MECFit(num_steps=3, batch_size=64))
    expected = for_budget(*given, 2500, num_codes=(1,), codes=codes)
    with mode():
        assert for_budget(*given, 2500, num_codes=(1,), codes=codes) == expected
    assert expected["user"].method == "mec"


def test_codes_that_need_contexts_are_refused() -> None:
    given = {"user": torch.randn(60, 8)}, {"user": torch.ones(60)}
    with pytest.raises(ValueError, match="codes must be fitted to rows alone, got 'quantile', which needs contexts"):
        for_budget(*given, 2500, codes=QuantileCodesConfig(num_codes=1, codebook_size=16))


def test_heads_are_tried_in_int4_and_in_int8():
    """The int8 one reuses the fit of the int4 one; its error must be what a fit of its own would have."""
    dense, counts = trained({"t": 2000}), 4000 // torch.arange(1, 2001)
    rows = dense.embedding_bags["t"].weight.detach()
    base = PQConfig(num_codes=1, codebook_size=16, popularity="count")
    found = {c.option: c for c in measure_candidates("t", rows, counts, base, [2], seed=0)}
    heads = [option for option in found if isinstance(option, PQConfig) and option.num_hot_rows]
    heads = [option for option in heads if option.hot_dtype == "int8" and option.structure == "product"]
    assert len(heads) >= 3
    for option in heads:
        served = decompress(compress(dense, option, counts={"t": counts})).embedding_bags["t"].weight.detach()
        gaps = (served - rows).square().sum(1).double() * popularity_weights(counts, "count", 2000).double()
        assert found[option].error == pytest.approx(float(gaps.sum()), rel=1e-6)
        twin = found[replace(option, hot_dtype="int4")]
        assert found[option].error < twin.error and found[option].num_bytes > twin.num_bytes
