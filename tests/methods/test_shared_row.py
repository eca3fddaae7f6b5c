"""Codes of some ids, and one row for the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.cases import DIM, NUM_ROWS, batch, contexts, counts, dense_collection, fit, fresh, rows, table
from torchrec_compress import compress, decompress
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import CceConfig, MECConfig, PQConfig, RandomCodesConfig, TableData
from torchrec_compress.methods.shared_row import learn_shared_row
from torchrec_compress.ops import coded_ids_bytes

CODED = 90
CONFIGS = [
    PQConfig(num_codes=4, codebook_size=16, popularity="count", num_coded=CODED),
    PQConfig(num_codes=2, codebook_size=32, structure="residual", popularity="count", num_coded=CODED),
    PQConfig(num_codes=2, codebook_size=32, popularity="count", num_coded=CODED, num_hot_rows=9, hot_dtype="fp32"),
    MECConfig(num_codes=2, codebook_size=32, num_coded=CODED),
]
each = pytest.mark.parametrize("config", CONFIGS, ids=["product", "residual", "hot", "mec"])


def ids_by_lookups() -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.argsort(counts(), descending=True, stable=True)
    return order[:CODED], order[CODED:]


@each
def test_ids_that_are_rare_are_served_one_row(config):
    served = fit(config).table_rows("item", torch.arange(NUM_ROWS))
    own, rare = ids_by_lookups()
    assert bool((served[rare] == served[rare[0]]).all())
    assert len(served[own].unique(dim=0)) > CODED / 3


@each
def test_the_shared_row_is_near_the_mean_of_theirs(config):
    served = fit(config).table_rows("item", torch.arange(NUM_ROWS)).detach()
    _, rare = ids_by_lookups()
    weights = popularity_weights(counts(), "count", NUM_ROWS)[rare]
    mean = (weights @ rows()[rare]) / weights.sum()
    spread = rows().var(dim=0).sum()
    assert float((served[rare[0]] - mean).square().sum()) < 0.35 * float(spread)


@each
def test_ids_with_codes_lose_no_more_than_where_all_have_some(config):
    """Codewords serve fewer rows, so that those fit better."""
    own, _ = ids_by_lookups()
    weights = popularity_weights(counts(), "count", NUM_ROWS)[own]

    def error(each):
        served = fit(each).table_rows("item", own).detach()
        return float((weights * (served - rows()[own]).square().sum(dim=1)).sum())

    assert error(config) < 1.1 * error(replace(config, num_coded=None))


@each
def test_what_is_stored_is_counted(config):
    part = config.parts(table(), 0).codes
    footprint = fit(config).footprint().tables["item"]
    every = replace(config, num_coded=None)
    saved = (NUM_ROWS - CODED - 1) * part.row_size * part.dtype.itemsize - coded_ids_bytes(NUM_ROWS)
    assert footprint.total_bytes == config.stored_bytes(table()) == every.stored_bytes(table()) - saved


@each
def test_bags_are_sums_of_what_ids_are_served(config):
    collection = fit(config)
    served = collection.table_rows("item", torch.arange(NUM_ROWS))
    bags = [[number % NUM_ROWS for number in range(first, first + 7)] for first in range(0, NUM_ROWS, 7)] + [[]]
    expected = torch.stack([served[torch.tensor(bag, dtype=torch.int64)].sum(dim=0) for bag in bags])
    torch.testing.assert_close(collection(batch(bags)).values(), expected, rtol=1e-5, atol=1e-5)


@each
def test_gradients_are_those_of_what_ids_are_served(config):
    collection = fit(config)
    bags = [[0, 1, 2], [2, 3], [5], [200, 0]]
    collection(batch(bags)).values().square().sum().backward()
    books = collection.decoder.banks["item"].codebooks
    found, books.grad = books.grad, None
    sums = [collection.table_rows("item", torch.tensor(bag)).sum(dim=0) for bag in bags]
    torch.stack(sums).square().sum().backward()
    torch.testing.assert_close(found, books.grad, rtol=1e-4, atol=1e-5)


def test_before_a_fit_all_ids_share_a_row():
    collection = fresh(CONFIGS[0])
    assert len(collection.table_rows("item", torch.arange(NUM_ROWS)).unique(dim=0)) == 1


def test_an_id_out_of_range_is_refused_and_none_is_served_for_it():
    with pytest.raises(ValueError, match=rf"table 'item', feature 'item': every id must be in \[0, {NUM_ROWS}\)"):
        fit(CONFIGS[0])(batch([[NUM_ROWS]]))


def test_an_index_that_was_changed_is_refused():
    collection = fit(CONFIGS[0])
    collection.decoder.banks["item"].coded_ids[0, 0] ^= 1
    with pytest.raises(ValueError, match="table 'item': codes and low-bit rows must be those that a fit"):
        collection.table_rows("item", torch.arange(3))


@each
def test_a_state_dict_brings_the_ids_along(config):
    expected, made = fit(config), fresh(config)
    made.load_state_dict(expected.state_dict())
    everyone = torch.arange(NUM_ROWS)
    assert torch.equal(made.table_rows("item", everyone), expected.table_rows("item", everyone))


def test_a_state_dict_of_other_coded_ids_is_refused():
    with pytest.raises(ValueError, match=r"table 'item': the checkpoint's sizes must be those"):
        fresh(replace(CONFIGS[0], num_coded=CODED + 1)).load_state_dict(fit(CONFIGS[0]).state_dict())


def test_what_is_compressed_again_is_read_by_ids():
    source = fit(CONFIGS[0])
    again = compress(source, replace(CONFIGS[0], num_codes=8), counts={"item": counts()})
    dense = decompress(source).embedding_bags["item"].weight.detach()
    assert torch.equal(dense, source.table_rows("item", torch.arange(NUM_ROWS)))
    assert float((again.table_rows("item", torch.arange(NUM_ROWS)) - dense).detach().abs().max()) < 2.0


def test_the_mean_is_that_of_rare_rows_as_look_ups_weigh_them():
    _, rare = ids_by_lookups()
    weights = popularity_weights(counts(), "count", NUM_ROWS)[rare]
    shared = learn_shared_row(table(), TableData(rows(), counts(), contexts()), CODED)
    expected = torch.stack([(weights * column).sum() / weights.sum() for column in rows()[rare].T])
    torch.testing.assert_close(shared.row, expected, rtol=1e-4, atol=1e-5)
    assert sorted((~shared.is_coded).nonzero().flatten().tolist()) == sorted(rare.tolist())


def test_ids_that_the_sample_lacks_share_the_mean_of_all():
    own, _ = ids_by_lookups()
    data = TableData(rows()[own], counts(), contexts(), ids=own, weights=torch.ones(CODED))
    shared = learn_shared_row(table(), data, CODED)
    assert int(shared.is_coded.sum()) == CODED
    torch.testing.assert_close(shared.row, rows()[own].mean(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(CONFIGS[0], num_coded=0), r"num_coded must be in \[15, 403\)"),
        (replace(CONFIGS[0], num_coded=14), r"num_coded must be in \[15, 403\)"),
        (replace(CONFIGS[0], num_coded=NUM_ROWS), r"got 403; leave it out for codes of all ids"),
        (replace(CONFIGS[2], num_hot_rows=CODED + 1), r"num_coded must be in \[91, 403\)"),
        (RandomCodesConfig(num_codes=4, codebook_size=16, num_coded=50), "num_coded must be left out with 'random'"),
    ],
)
def test_numbers_that_cannot_be_are_refused(config, message):
    with pytest.raises(ValueError, match=rf"table 'item': .*{message}"):
        config.check(table())


def test_counts_are_asked_for():
    with pytest.raises(ValueError, match="table 'item': num_coded = 90 must come with counts"):
        compress(dense_collection(), replace(CONFIGS[0], popularity="none"))


def test_codes_that_change_have_no_such_setting():
    with pytest.raises(TypeError, match="num_coded"):
        CceConfig(num_codes=4, num_coded=9)


def test_codes_of_a_width_share_a_row_too():
    config = replace(CONFIGS[1], width=DIM // 2)
    served = fit(config).table_rows("item", torch.arange(NUM_ROWS))
    _, rare = ids_by_lookups()
    assert bool((served[rare] == served[rare[0]]).all())
