"""What is no model, no batch and no table: an error that names the caller, not one of an attribute that is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagConfig, EmbeddingConfig

from tests.cases import batch, dense_collection, fresh
from torchrec_compress import (
    CompressedEmbeddingBag,
    CompressedEmbeddingBagCollection,
    CompressedEmbeddingCollection,
    after_step,
    compress_dense,
    compress_into,
    discard,
    get_default_sharders,
    measure_curvature,
    native_parameters,
    optimizer_bytes,
)
from torchrec_compress.compression import parse
from torchrec_compress.methods import MEmComConfig, PQConfig
from torchrec_compress.sharding import compressed_sharders

PQ = PQConfig(num_codes=4, codebook_size=16)
SIZES: Any = {"name": "item", "num_embeddings": 100, "embedding_dim": 16}
WRONG = pytest.mark.parametrize("wrong", [None, 3, "x", [1], {"a": 1}, torch.ones(2)], ids=lambda each: str(type(each)))


@WRONG
def test_no_model(wrong):
    for name, call in {
        "native_parameters": native_parameters,
        "after_step": lambda model: after_step(model, 0),
        "discard": discard,
        "measure_curvature": lambda model: measure_curvature(model, [batch([[1]])]),
        "compress_dense": lambda model: compress_dense(model, [torch.ones(2, 16)], 2.0),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name}: model must be a torch\.nn\.Module, got"):
            call(wrong)
    with pytest.raises(ValueError, match=r"^optimizer_bytes: must be given an optimizer, got"):
        optimizer_bytes(wrong)


@pytest.mark.parametrize("wrong", [None, 3, "x", {"a": 1}, torch.ones(2)], ids=lambda each: str(type(each)))
def test_no_batches(wrong):
    for name, call in {
        "measure_curvature": lambda batches: measure_curvature(dense_collection(), batches),
        "compress_dense": lambda batches: compress_dense(nn.Sequential(nn.Linear(16, 16)), batches, 2.0),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: batches must be a list or an iterator of batches, got one"):
            call(wrong)


@pytest.mark.parametrize("wrong", [3, "x", [1]])
def test_no_forward_no_layers_no_ratio(wrong):
    layers, batches = nn.Sequential(nn.Linear(16, 16)), [torch.randn(40, 16)]
    with pytest.raises(ValueError, match=r"^compress_dense: forward must be a function of model and batch"):
        compress_dense(layers, batches, 2.0, wrong)
    with pytest.raises(ValueError, match=r"^measure_curvature: forward must be a function"):
        measure_curvature(dense_collection(), [batch([[1]])], wrong)
    if not isinstance(wrong, str):
        with pytest.raises(ValueError, match=r"^compress_dense: layers must be a path or pattern, or a list of them"):
            compress_dense(layers, batches, 2.0, layers=wrong)
    if not isinstance(wrong, int):
        with pytest.raises(ValueError, match=r"^compress_dense: ratio must be above 1, got"):
            compress_dense(layers, batches, wrong)
    with pytest.raises(ValueError, match=r"^compress_dense: batch 1: inputs of '0' must be \(..., 16\), got"):
        compress_dense(layers, [wrong], 2.0)


@pytest.mark.parametrize(
    ("kind", "config", "other"),
    [
        (CompressedEmbeddingBagCollection, EmbeddingBagConfig, EmbeddingConfig),
        (CompressedEmbeddingCollection, EmbeddingConfig, EmbeddingBagConfig),
    ],
)
def test_no_tables(kind, config, other):
    for wrong in (None, 3, "x", {"item": 1}, torch.ones(2)):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: tables must be a list of {config.__name__}, got"):
            kind(wrong, compression=PQ)
    for each in (None, 3, "x", other(**SIZES, feature_names=["item"])):
        with pytest.raises(ValueError, match=f"^{kind.__name__}: every table must be an {config.__name__}, got"):
            kind([config(**SIZES, feature_names=["item"]), each], compression=PQ)
    with pytest.raises(ValueError, match="table 'item': feature_names must be a list of names, got 'abc'"):
        kind([config(**SIZES, feature_names="abc")], compression=PQ)


@WRONG
def test_no_settings(wrong):
    if not isinstance(wrong, dict):
        with pytest.raises(ValueError, match=r"^compression: must be a mapping"):
            parse(wrong)
    if wrong is not None and not isinstance(wrong, dict):
        for make in (get_default_sharders, compressed_sharders):
            with pytest.raises(ValueError, match=f"^{make.__name__}: qcomm_codecs_registry must be a dict of codecs"):
                make(qcomm_codecs_registry=wrong)


@pytest.mark.parametrize("config", [PQ, MEmComConfig(num_buckets=40)], ids=lambda config: config.method)
def test_rows_that_are_read_as_none(config):
    with pytest.raises(ValueError, match="rows"):
        compress_into(fresh(config), {"item": lambda ids: None})


def test_weights_in_a_list():
    bag = CompressedEmbeddingBag(100, 16, "sum", compression=PQ)
    with pytest.raises(ValueError, match="per_sample_weights must be a tensor, got list"):
        bag(torch.tensor([[1, 2]]), None, [[1.0, 2.0]])
