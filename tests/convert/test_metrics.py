"""Fits in the metric of the loss: what they gain at equal bytes, and which curvatures are refused or of no use."""

import copy
import dataclasses
import logging
from collections import UserDict

import pytest
import torch

from tests.convert.clicks import ROWS, batches, counts, logits_of, trained, weight_of
from torchrec_compress import compress, compress_into, measure_curvature, predicted_rise
from torchrec_compress.fit.mec import MECFit
from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MECConfig, NarrowConfig, PQConfig, TableData
from torchrec_compress.methods.learned import BLOCK_ROWS

METHODS = {
    "residual": PQConfig(num_codes=2, codebook_size=16, structure="residual", popularity="count"),
    "tiers": PQConfig(num_codes=2, codebook_size=16, structure="residual", num_hot_rows=30, popularity="count"),
    "product": PQConfig(num_codes=2, codebook_size=16, popularity="count"),
    "mec": MECConfig(num_codes=2, codebook_size=16, fit_options=MECFit(num_steps=60)),
    "narrow": NarrowConfig(width=4),
    "narrow, 8 bits": NarrowConfig(width=4, bits=8),
}


@pytest.fixture(scope="module")
def found():
    return measure_curvature(trained(), batches(), logits_of)


def squeezed(curvature):
    """Return a curvature that reads half of the directions, none of them an axis; a trained one is nearly round."""
    turn = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    read = torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, 0.01, 0.01, 0.01, 0.01], dtype=torch.float64))
    return dataclasses.replace(curvature, matrix=turn @ read @ turn.T)


def compressed(method, curvature):
    methods = {"user": method, "*": DenseConfig()}
    made = compress(trained().embeddings, methods, counts={"user": counts("user")}, curvature=curvature)
    return made, made.table_rows("user", torch.arange(ROWS["user"])).detach()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("real", [True, False], ids=["measured", "squeezed"])
def test_a_fit_in_the_metric_costs_less_of_the_loss_at_equal_bytes(name, real, found):
    curvature = found if real else {"user": squeezed(found["user"])}
    before = weight_of(trained(), "user").detach()
    plain, in_metric = (compressed(METHODS[name], given) for given in (None, curvature))
    assert plain[0].footprint() == in_metric[0].footprint()
    rises = [predicted_rise(before, rows, counts("user"), curvature["user"]) for _, rows in (plain, in_metric)]
    assert rises[1] < rises[0] * (1 if real else 0.9), rises
    errors = [float(((rows - before).square().sum(dim=1) * counts("user")).sum()) for _, rows in (plain, in_metric)]
    assert errors[1] > errors[0]  # of squares it is the other way round
    if METHODS[name] is METHODS["tiers"]:
        hot = counts("user").argsort(descending=True, stable=True)[:30]
        assert torch.equal(plain[1][hot], in_metric[1][hot])


@pytest.mark.parametrize("name", METHODS)
def test_a_round_metric_changes_nothing_but_rounding(name, found):
    round_one = {"user": dataclasses.replace(found["user"], matrix=torch.eye(8, dtype=torch.float64) * 3)}
    before = weight_of(trained(), "user").detach()
    errors = [float((compressed(METHODS[name], given)[1] - before).norm()) for given in (None, round_one)]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("name", ["residual", "mec", "narrow"])
def test_blocks_are_encoded_in_the_metric_that_was_learned(name, found):
    table = trained().embeddings.embedding_bag_configs()[0]
    before, seen, curvature = weight_of(trained(), "user").detach(), counts("user"), squeezed(found["user"]).matrix
    data = TableData(before, seen, curvature=curvature)
    whole = METHODS[name].fit(table, data)
    learned = METHODS[name].learn(table, data)
    ids = torch.arange(len(before))
    assert len(before) < BLOCK_ROWS
    blocks = [learned.encode(some, before[some]) for some in (ids[150:], ids[:150])]
    state = learned.with_rows(learned.finish(), torch.cat(blocks[::-1]))
    for part in ("decoder", "native"):
        for key, value in getattr(whole, part).items():
            torch.testing.assert_close(getattr(state, part)[key], value, rtol=1e-4, atol=1e-5)
    assert whole.codes is None or torch.equal(state.codes, whole.codes)


def test_what_cannot_use_a_curvature_says_so_once(found, caplog):
    with caplog.at_level(logging.INFO, "torchrec_compress.convert.metrics"):
        methods = {"user": HashConfig(num_buckets=9), "item": Int8Config(), "*": DenseConfig()}
        compress(trained().embeddings, methods, curvature=found)
    (line,) = caplog.records
    assert "does nothing for methods that cannot use one: {'hash': ['user'], 'int8': ['item']}" in line.getMessage()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lookups": 0, "matrix": torch.zeros(8, 8, dtype=torch.float64)}, "it was never looked up"),
        ({"examples": 7}, "7 examples or look-ups say little about 8 directions"),
        ({"matrix": torch.zeros(8, 8, dtype=torch.float64)}, "the loss does not depend on it"),
        ({"matrix": torch.full((8, 8), 1e-320, dtype=torch.float64)}, "the loss does not depend on it"),
    ],
)
def test_too_little_falls_back_to_squared_error_with_a_line(change, reason, found, caplog):
    curvature = {"user": dataclasses.replace(found["user"], **change)}
    _, rows = compressed(METHODS["residual"], curvature)
    assert reason in caplog.text and "'user': fitted to squared error" in caplog.text
    assert torch.equal(rows, compressed(METHODS["residual"], None)[1])


def test_the_curvature_of_another_table_width_or_model_is_refused(found):
    def refused(curvature, message):
        with pytest.raises(ValueError, match=message):
            compressed(METHODS["residual"], curvature)

    refused({"user": found["item"]}, "table 'user': curvature must be its own, .* got that of 'item'")
    refused({"user": found["user"].matrix}, "table 'user': curvature must be its own, .* got Tensor")
    refused({"nobody": found["user"]}, r"curvature must name tables of .*, got \['nobody'\]")
    refused([found], "curvature must be a mapping")
    wide = dataclasses.replace(found["user"], num_embeddings=201)
    refused({"user": wide}, "curvature must be of the 200 x 8 table, got one of 201 x 8")
    other = copy.deepcopy(trained())
    weight_of(other, "user").data.mul_(1.1)  # as a little more training moves it
    theirs = measure_curvature(other, batches()[:1], logits_of)
    refused(theirs, "table 'user': curvature must be of the model that is compressed, but 8 of 8 bags")
    bags = torch.full_like(found["user"].witnesses.bags, torch.nan)  # which differ from all
    unknown = dataclasses.replace(found["user"], witnesses=found["user"].witnesses._replace(bags=bags))
    refused({"user": unknown}, "table 'user': curvature must be of the model that is compressed, but 8 of 8 bags")


def test_rows_that_are_read_one_table_at_a_time_are_compared_too(found):
    made = compressed(METHODS["residual"], None)[0]
    rows = UserDict({name: bag.weight.detach() * 1.1 for name, bag in trained().embeddings.embedding_bags.items()})
    seen = {"user": counts("user")}
    with pytest.raises(ValueError, match="curvature must be of the model that is compressed"):
        compress_into(made, rows, counts=seen, curvature=found)


def test_a_matrix_that_is_none_is_refused_before_a_fit():
    table = trained().embeddings.embedding_bag_configs()[0]
    rows = weight_of(trained(), "user").detach()
    wrong = {
        "must be a square matrix": torch.ones(8, 4, dtype=torch.float64),
        "must be of 8 columns": torch.eye(4, dtype=torch.float64),
        "must be finite": torch.full((8, 8), torch.nan, dtype=torch.float64),
        "must be symmetric": torch.eye(8, dtype=torch.float64) + torch.ones(8, 8, dtype=torch.float64).triu(),
        "must be positive semi-definite": -torch.eye(8, dtype=torch.float64),
        "must have a trace above 0": torch.zeros(8, 8, dtype=torch.float64),
    }
    for message, matrix in wrong.items():
        with pytest.raises(ValueError, match=f"table 'user': curvature:? {message}"):
            METHODS["narrow"].fit(table, TableData(rows, curvature=matrix))
