"""Codes and tiers: what PQ, MEC, quantile and random codes share, and each one's own truth."""

from dataclasses import replace

import pytest
import torch
from torchrec import EmbeddingBagCollection

from tests.cases import CASES, DIM, NUM_ROWS, batch, contexts, counts, dense_collection, fit, fitted, fresh, rows, table
from torchrec_compress import compress, decompress
from torchrec_compress.fit import (
    MECFit,
    fit_mec,
    fit_product,
    fit_residual,
    popularity_weights,
    quantile_codes,
    refit_codebooks,
)
from torchrec_compress.methods import MECConfig, PQConfig, QuantileCodesConfig, RandomCodesConfig, TableData
from torchrec_compress.ops import (
    dequantize_rows,
    hash_codes,
    hot_row_codes,
    pack_codes,
    quantize_rows,
    stable_salt,
    unpack_codes,
)

TIERED = [
    PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, popularity="count", hot_dtype="fp32"),
    PQConfig(num_codes=2, codebook_size=32, num_hot_rows=70, hot_dtype="int8"),
    PQConfig(num_codes=2, codebook_size=32, structure="residual", num_hot_rows=70, hot_dtype="int4"),
    PQConfig(num_codes=1, codebook_size=100, num_hot_rows=9, hot_dtype="int8"),
    RandomCodesConfig(num_codes=4, codebook_size=32, num_hot_rows=70, hot_dtype="fp32"),
    RandomCodesConfig(num_codes=4, codebook_size=16, num_hot_rows=70, hot_dtype="fp32"),
    PQConfig(num_codes=3, codebook_size=11, structure="residual", num_hot_rows=70, hot_dtype="int8"),
    QuantileCodesConfig(num_codes=2, codebook_size=32, num_hot_rows=70),
    MECConfig(num_codes=2, codebook_size=32, num_hot_rows=70, fit_options=MECFit(num_steps=2)),
]


def served(config, **given):
    return decompress(fit(config, **given)).embedding_bags["item"].weight.detach()


def error(config):
    seen = counts().clamp(min=1e-3).unsqueeze(1)
    return float(((served(config) - rows()).square() * seen).sum() / seen.sum())


@pytest.mark.parametrize("config", TIERED)
def test_hot_rows_are_served_as_stored_rows(config):
    got = decompress(fitted(config)).embedding_bags["item"].weight
    hot = counts().argsort(descending=True, stable=True)[: config.num_hot_rows]
    expected = rows()[hot]
    if config.hot_dtype != "fp32":
        expected = dequantize_rows(quantize_rows(expected, config.hot_dtype), config.hot_dtype)
    torch.testing.assert_close(got[hot], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", TIERED)
def test_exactly_the_hot_rows_have_escape_codes(config):
    codes = fitted(config).code_tables.banks["item"].codes
    codes = (unpack_codes(codes, config.num_packed) if config.num_packed else codes).long()
    hot = counts().argsort(descending=True, stable=True)[: config.num_hot_rows]
    is_hot = codes[:, 0] >= config.first_size
    assert is_hot.nonzero().flatten().tolist() == sorted(hot.tolist())
    assert torch.equal(codes[hot], hot_row_codes(config.num_hot_rows, config.num_codes, config.codebook_size))


@pytest.mark.parametrize("config", TIERED)
def test_hot_rows_pull_no_codeword(config):
    hot, moved = config.hot_ids(table(), TableData(rows(), counts(), contexts())), rows()
    moved[hot] += 100 * torch.randn(len(hot), 16)
    one, other = (config.fit(table(), TableData(values, counts(), contexts())) for values in (rows(), moved))
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.decoder["codebooks"], other.decoder["codebooks"])


def test_tiers_without_counts_raise():
    with pytest.raises(ValueError, match="table 'item': num_hot_rows = 70 must come with counts, got none"):
        compress(dense_collection(), TIERED[0])


@pytest.mark.parametrize("popularity", ["count", "log2"])
def test_popularity_without_counts_raises(popularity):
    with pytest.raises(ValueError, match=f"popularity='{popularity}' must come with counts, got none"):
        compress(dense_collection(), PQConfig(num_codes=4, codebook_size=16, popularity=popularity))


def test_counts_of_the_wrong_shape_raise():
    with pytest.raises(
        ValueError, match=r"table 'item': counts must be a tensor of shape \(403,\), one per id, got \(7,\)"
    ):
        compress(dense_collection(), PQConfig(num_codes=4, codebook_size=16), counts={"item": torch.ones(7)})


def direct(config, seed: int, weights: torch.Tensor):
    """Return what the fit itself makes of a method's settings."""
    sizes = {"first_size": config.first_size, "weights": weights, "seed": seed}
    if isinstance(config, MECConfig):
        return fit_mec(rows(), config.num_codes, config.codebook_size, options=config.fit_options, **sizes)
    product = fit_product if config.structure == "product" else fit_residual
    return product(rows(), config.num_codes, config.codebook_size, **sizes)


@pytest.mark.parametrize("popularity", ["count", "log2", "none"])
@pytest.mark.parametrize(
    "config",
    [
        PQConfig(num_codes=4, codebook_size=17, num_hot_rows=9),
        PQConfig(num_codes=3, codebook_size=17, structure="residual"),
        MECConfig(num_codes=4, codebook_size=17, fit_options=MECFit(num_steps=9, batch_size=50, learning_rate=0.05)),
        MECConfig(num_codes=4, codebook_size=17, num_hot_rows=9, fit_options=MECFit(num_steps=3, usage=1.0)),
    ],
)
def test_a_fit_is_that_of_the_settings_popularity_and_seed(config, popularity):
    config = replace(config, popularity=popularity)
    made = []
    for seed in (0, 7):
        data = TableData(rows(), counts(), seed=seed)
        weights, hot = popularity_weights(counts(), popularity, NUM_ROWS), config.hot_ids(table(), data)
        weights[hot] = 0
        expected, state = direct(config, seed, weights), config.fit(table(), data)
        cold = torch.ones(NUM_ROWS, dtype=torch.bool).index_fill(0, hot, False)
        assert torch.equal(state.codes[cold].long(), expected.codes[cold])
        assert torch.equal(state.decoder["codebooks"], expected.codebooks)
        made.append(state.codes)
    assert not torch.equal(*made)


def test_quantile_codes_are_those_of_the_seed_and_their_codebooks_weigh_look_ups():
    config = QuantileCodesConfig(num_codes=4, codebook_size=17)
    seen = contexts()[0] < 300  # the codes of other ids are hashes
    pairs = contexts()[0][seen], contexts()[1][seen]
    for seed in (0, 7):
        codes = quantile_codes(*pairs, NUM_ROWS, 4, 17, seed)
        state = config.fit(table(), TableData(rows(), counts(), pairs, seed))
        books = refit_codebooks(
            codes, rows(), popularity_weights(counts(), "count", NUM_ROWS), codebook_size=17, kind="product"
        )
        assert torch.equal(state.codes.long(), codes)
        assert torch.equal(state.decoder["codebooks"], books)


def test_hot_rows_of_equal_counts_are_the_first():
    equal = torch.full((NUM_ROWS,), 3)
    equal[400] = 5
    config = PQConfig(num_codes=4, codebook_size=17, num_hot_rows=4)
    assert config.hot_ids(table(), TableData(None, equal)).tolist() == [400, 0, 1, 2]


@pytest.mark.parametrize("structure", ["product", "residual"])
@pytest.mark.parametrize("num_codes", [1, 4])
def test_an_untrained_row_has_the_spread_of_the_users_table(structure, num_codes):
    config = RandomCodesConfig(num_codes=num_codes, codebook_size=64, structure=structure)
    untrained = decompress(fresh(config, embedding_dim=64)).embedding_bags["item"].weight.std()
    users = EmbeddingBagCollection([table(embedding_dim=64)]).embedding_bags["item"].weight.std()
    torch.testing.assert_close(untrained, users, rtol=0.1, atol=0)


def test_pq_is_exact_where_there_are_codewords_for_all_rows():
    distinct = torch.randn(30, 16)
    stock = dense_collection()
    with torch.no_grad():
        stock.embedding_bags["item"].weight.copy_(distinct[torch.arange(NUM_ROWS) % 30])
    got = decompress(compress(stock, PQConfig(num_codes=2, codebook_size=30))).embedding_bags["item"].weight
    torch.testing.assert_close(got, stock.embedding_bags["item"].weight, rtol=1e-5, atol=1e-5)


def set_codes(collection, first, codes):
    bank = collection.code_tables.banks["item"]
    changed = bank.codes.clone()
    changed[first : first + len(codes)] = pack_codes(torch.tensor(codes))
    bank.load(changed)


def test_a_row_is_its_codewords_side_by_side():
    collection = fresh(PQConfig(num_codes=2, codebook_size=4))
    set_codes(collection, 5, [[3, 0], [1, 1]])
    with torch.no_grad():
        collection.decoder.banks["item"].codebooks.copy_(torch.arange(8.0).unsqueeze(1).expand(8, 8))
    assert collection(batch([[5], [5, 6]])).values().tolist() == [[3] * 8 + [4] * 8, [4] * 8 + [9] * 8]


def test_a_residual_row_is_the_sum_of_its_codewords():
    collection = fresh(PQConfig(num_codes=2, codebook_size=4, structure="residual"))
    set_codes(collection, 5, [[3, 0]])
    with torch.no_grad():
        collection.decoder.banks["item"].codebooks.copy_(torch.arange(8.0).unsqueeze(1).expand(8, 16))
    assert collection(batch([[5]])).values().tolist() == [[7] * 16]


def test_learned_codes_beat_random_ones():
    random = error(RandomCodesConfig(num_codes=4, codebook_size=16))
    plain = error(PQConfig(num_codes=4, codebook_size=16))
    weighted = error(PQConfig(num_codes=4, codebook_size=16, popularity="count"))
    mec = error(MECConfig(num_codes=4, codebook_size=16, fit_options=MECFit(num_steps=20)))
    assert weighted < plain < random
    assert mec < random


def test_random_codes_are_the_start_codes():
    config = RandomCodesConfig(num_codes=4, codebook_size=16)
    expected = hash_codes(torch.arange(NUM_ROWS), 4, 16, stable_salt(0, "item"))
    for collection in (fitted(config), fresh(config)):
        assert torch.equal(unpack_codes(collection.code_tables.banks["item"].codes, 4).long(), expected)


@pytest.mark.parametrize("config", CASES["random"])
def test_random_codebooks_solve_least_squares(config):
    # at the minimum the gradient of the weighted error vanishes
    collection = fit(config)
    seen = counts().clamp(min=1e-3)
    books = collection.decoder.banks["item"].codebooks
    got = collection(batch([[number] for number in range(NUM_ROWS)])).values()
    ((got - rows()).square() * seen.unsqueeze(1)).sum().backward()
    steepest = float(books.grad.abs().max())
    with torch.no_grad():
        books.zero_()
    books.grad = None
    got = collection(batch([[number] for number in range(NUM_ROWS)])).values()
    ((got - rows()).square() * seen.unsqueeze(1)).sum().backward()
    assert steepest < 1e-2 * float(books.grad.abs().max())


def test_quantile_codes_need_contexts_and_no_rows():
    config = QuantileCodesConfig(num_codes=4, codebook_size=16)
    with pytest.raises(ValueError, match="quantile codes must come with contexts, got none; pass contexts"):
        compress(dense_collection(), config)
    state = config.fit(table(), TableData(None, contexts=contexts()))
    seen = contexts()[0].unique()
    for m in range(4):
        sizes = unpack_codes(state.codes, 4)[seen, m].long().bincount(minlength=16)
        assert int(sizes.max() - sizes.min()) <= 1
    assert state.decoder["codebooks"].shape == (64, 4)


def test_a_fit_that_meets_bad_rows_says_so():
    stock = dense_collection()
    with torch.no_grad():
        stock.embedding_bags["item"].weight[3, 2] = float("nan")
    for config in (CASES["pq"][0], CASES["mec"][0], CASES["hash"][0], CASES["int8"][0]):
        with pytest.raises(ValueError, match="table 'item': pre-trained rows must be finite, got NaN or infinity"):
            compress(stock, config, counts={"item": counts()})


@pytest.mark.parametrize("structure", ["product", "residual"])
def test_codebooks_in_int8_are_those_in_float_rounded(structure):
    """Same codes, each codeword rounded by a scale of its own, at a quarter of the bytes; nothing of it is trained."""
    config = PQConfig(num_codes=2, codebook_size=32, structure=structure)
    floats, few = fitted(config), fitted(replace(config, codebook_dtype="int8"))
    mine, theirs = (each.decoder.banks["item"] for each in (few, floats))
    assert torch.equal(few.code_tables.banks["item"].codes, floats.code_tables.banks["item"].codes)
    assert mine.codebooks.dtype == torch.uint8 and not list(few.parameters())
    expected = dequantize_rows(quantize_rows(theirs.codebooks.detach(), "int8"), "int8")
    torch.testing.assert_close(mine.codewords(), expected, rtol=0, atol=0)
    got, wanted = (decompress(each).embedding_bags["item"].weight.detach() for each in (few, floats))
    assert 0 < float((got - wanted).abs().max()) < float(wanted.abs().max()) / 100
    assert few.footprint().tables["item"].decoder_bytes == mine.codebooks.numel()
    assert not replace(config, codebook_dtype="int8").trains_decoder(table())
    assert replace(config, codebook_dtype="int8", width=8).trains_decoder(table())


def test_a_codeword_that_int8_cannot_hold_is_named():
    stock = dense_collection()
    with torch.no_grad():
        stock.embedding_bags["item"].weight[7] = torch.linspace(-3e7, 3e7, DIM)
    with pytest.raises(ValueError, match=r"table 'item': int8 rows must have a float16 scale and bias.* of codeword "):
        compress(stock, PQConfig(num_codes=1, codebook_size=64, codebook_dtype="int8"))


def test_bytes():
    pq = PQConfig(num_codes=4, codebook_size=16)
    assert pq.stored_bytes(table()) == NUM_ROWS * 2 + 4 + 16 * 16 * 4  # two codes in a byte
    assert replace(pq, codebook_size=17).stored_bytes(table()) == NUM_ROWS * 4 + 4 + 17 * 16 * 4
    assert replace(pq, codebook_size=300).stored_bytes(table()) == NUM_ROWS * 8 + 4 + 300 * 16 * 4
    assert replace(pq, structure="residual").stored_bytes(table()) == NUM_ROWS * 2 + 4 + 4 * 16 * 16 * 4
    assert replace(pq, codebook_dtype="int8").stored_bytes(table()) == NUM_ROWS * 2 + 4 + 4 * 16 * (4 + 4)
    assert replace(pq, num_hot_rows=10).stored_bytes(table()) == pq.stored_bytes(table()) + 10 * 20
    assert replace(pq, num_hot_rows=10, hot_dtype="fp32").stored_bytes(table()) == pq.stored_bytes(table()) + 10 * 64
