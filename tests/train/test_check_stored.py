"""What nothing would train is found before anything is trained."""

from __future__ import annotations

import pytest

from torchrec_compress.train.check import check_config, check_run, check_tables, compression_of
from torchrec_compress.train.config import RunConfig, override

INT8 = {"method": "int8"}


@pytest.mark.parametrize(("method", "part"), [("int8", "tables"), ("int8", "codebooks"), ("hash", "codebooks")])
def test_a_stage_trains_something_of_these_methods(method, part):
    options = {"num_buckets": 9} if method == "hash" else {}
    flags = {f"retrain.train_{name}": name == part for name in ("dense", "tables", "codebooks")}
    config = override(
        RunConfig(), {"compression": {"*": {"method": method, **options}}, "retrain.epochs": 1.0, **flags}
    )
    with pytest.raises(ValueError, match=r"^retrain: must train something, got train_dense false"):
        check_tables(config, compression_of(config.compression), {"user": 400, "item": 300})
    for codes in ({"method": "pq", "num_codes": 2}, {"method": "narrow", "width": 8}):
        fine = override(config, {"compression": {"*": codes}, "retrain.train_codebooks": True})
        check_tables(fine, compression_of(fine.compression), {"user": 400, "item": 300})


def test_what_would_take_as_much_as_dense_is_nothing_to_train(data):
    method = {"method": "pq", "structure": "residual", "num_codes": 2, "codebook_dtype": "int8"}
    compression = {"user": {**method, "codebook_size": 150}, "item": {**method, "codebook_size": 64}}
    only = {"retrain.train_dense": False, "retrain.train_tables": False, "retrain.epochs": 1.0}
    changes = {"compression": {**compression, "*": INT8}, "model.embedding_dim": 8, "retrain.dequantize": True, **only}
    config = override(RunConfig(), changes)
    with pytest.raises(ValueError, match=r"^retrain: must train something, got train_dense false"):
        check_run(config, check_config(config), data)


def test_codebooks_of_few_bits_are_something_to_train_where_they_are_dequantized(data):
    method = {"method": "pq", "num_codes": 2, "codebook_size": 16, "codebook_dtype": "int8"}
    only = {"retrain.train_dense": False, "retrain.train_tables": False, "retrain.epochs": 1.0}
    config = override(RunConfig(), {"compression": {"*": method}, **only})
    with pytest.raises(ValueError, match=r"^retrain: must train something, got train_dense false"):
        check_run(config, check_config(config), data)
    config = override(config, {"retrain.dequantize": True})
    check_run(config, check_config(config), data)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "partial_rowwise_adam"])
def test_rows_that_add_up_no_squares_cannot_average_them(data, optimizer):
    narrow = {"method": "narrow", "width": 4, "bits": 8}
    changes = {"pretrain_compression": {"*": narrow}, "pretrain.optim.average_squares": True}
    for chosen in (narrow, {**narrow, "optimizer": "adagrad"}):
        fine = override(RunConfig(), {**changes, "pretrain_compression": {"*": chosen}})
        check_run(fine, check_config(fine), data)
    bad = override(RunConfig(), {**changes, "pretrain_compression": {"*": {**narrow, "optimizer": optimizer}}})
    with pytest.raises(ValueError, match=rf"pretrain\.optim\.average_squares: table '\w+': .* by '{optimizer}'"):
        check_run(bad, check_config(bad), data)


def test_rows_without_a_state_have_no_bits_of_one(data):
    narrow = {"method": "narrow", "width": 4, "bits": 8, "state_bits": 8}
    config = override(RunConfig(), {"pretrain_compression": {"*": narrow}, "pretrain.optim.tables": "sgd"})
    with pytest.raises(ValueError, match=r"pretrain\.optim\.tables: table '\w+': state_bits must be left out .* got 8"):
        check_run(config, check_config(config), data)
    fine = override(config, {"pretrain_compression": {"*": {**narrow, "state_bits": 32}}})
    check_run(fine, check_config(fine), data)
