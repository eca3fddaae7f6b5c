from __future__ import annotations

import dataclasses

import pytest
import torch
from torchrec.models.dlrm import DLRM_DCN
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_compress.train.config import ModelConfig
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.models.click import make_model
from torchrec_compress.train.models.kinds import make_tables


def _with_dense(data: ClickData) -> ClickData:
    splits = {
        name: dataclasses.replace(getattr(data, name), dense=torch.randn(len(getattr(data, name)), 3))
        for name in ("train", "valid", "test")
    }
    return dataclasses.replace(data, num_dense=3, **splits)


@pytest.mark.parametrize("name", ["deepfm", "dlrm", "dcnv2", "dlrm_dcnv2"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_every_parameter_gets_a_gradient(data, name, dense, plain):
    data = _with_dense(data) if dense else data
    extra = {} if plain else {"dropout": 0.1, "batch_norm": True, "embedding_dropout": 0.1, "bfloat16": True}
    config = ModelConfig(name=name, embedding_dim=8, hidden=[12, 6], **extra)
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, data)), data.num_dense, config)
    batch = next(data.batches("train", 64, 0).epoch(0))
    output = model(batch.features, batch.dense)
    assert output.logits.shape == (64,) and output.logits.dtype == torch.float32
    assert output.embeddings.shape == (64, 40)
    output.logits.square().sum().backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key


def test_deepfm_sums_dot_products_of_all_pairs_of_fields(data):
    config = ModelConfig(embedding_dim=4, hidden=[3], init_scale=1.0)
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, data)), 0, config)
    for parameter in model.deep.parameters():
        torch.nn.init.zeros_(parameter)
    batch = next(data.batches("train", 5, 0).epoch(0))
    output = model(batch.features)
    fields = output.embeddings.view(5, 5, 4)
    pairs = sum((fields[:, i] * fields[:, j]).sum(1) for i in range(5) for j in range(i))
    torch.testing.assert_close(output.logits, pairs)


def test_dropout_of_the_deep_nets_input_leaves_the_pairs_of_fields_whole(data):
    config = ModelConfig(embedding_dim=4, hidden=[3], init_scale=1.0, input_dropout=0.5)
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, data)), 0, config)
    for parameter in model.deep.parameters():
        torch.nn.init.zeros_(parameter)
    batch = next(data.batches("train", 64, 0).epoch(0))
    assert torch.equal(model(batch.features).logits, model(batch.features).logits)


@pytest.mark.parametrize("name", ["deepfm", "dlrm", "dcnv2", "dlrm_dcnv2"])
@pytest.mark.parametrize("where", ["dropout", "embedding_dropout", "input_dropout"])
def test_dropout_is_in_training_alone_and_leaves_the_embeddings_that_are_returned(data, name, where):
    config = ModelConfig(name=name, embedding_dim=8, hidden=[12, 6], init_scale=1.0, **{where: 0.5})
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, data)), 0, config)
    batch = next(data.batches("train", 64, 0).epoch(0))
    one, other = model(batch.features), model(batch.features)
    assert not torch.equal(one.logits, other.logits)
    assert torch.equal(one.embeddings, other.embeddings)
    assert 0.2 < float(one.embeddings.detach().abs().max()) <= 1.0  # drawn within init_scale, none dropped and scaled
    model.eval()
    assert torch.equal(model(batch.features).logits, model(batch.features).logits)


def test_widths_may_differ_only_with_dcnv2(data):
    config = ModelConfig(name="dcnv2", embedding_dim=8, widths={"hour": 4}, hidden=[6])
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, data)), 0, config)
    batch = next(data.batches("train", 5, 0).epoch(0))
    assert model(batch.features).embeddings.shape == (5, 36)
    with pytest.raises(ValueError, match=r"model\.widths"):
        make_tables(dataclasses.replace(config, name="dlrm"), data)


def test_dlrm_dcnv2_equals_torchrec(data):
    data = _with_dense(data)
    config = ModelConfig(
        name="dlrm_dcnv2", embedding_dim=8, bottom=[6, 8], hidden=[12, 5], num_cross_layers=2, cross_rank=3
    )
    embeddings = EmbeddingBagCollection(tables=make_tables(config, data))
    ours, theirs = make_model(embeddings, 3, config), DLRM_DCN(embeddings, 3, [6, 8], [12, 5, 1], 2, 3)
    pairs = [
        (theirs.dense_arch, ours.bottom),
        (theirs.inter_arch.crossnet, ours.cross),
        (theirs.over_arch, ours.deep),
    ]
    for source, target in pairs:
        ordered = zip(target.parameters(), source.parameters(), strict=True)
        for mine, value in ordered:
            mine.data.copy_(value)
    batch = next(data.batches("train", 33, 0).epoch(0))
    torch.testing.assert_close(ours(batch.features, batch.dense).logits, theirs(batch.dense, batch.features).squeeze(1))


def test_rows_with_several_ids_are_summed(data):
    ids = torch.tensor([[1, 2, 2], [3, 4, 5]], dtype=torch.int32)
    rows = Split(ids, torch.zeros(2))
    source = ClickData(["one", "many"], [9, 9], 0, rows, rows, rows, widths=(1, 2))
    config = ModelConfig(name="dlrm_dcnv2", embedding_dim=4, hidden=[3])
    model = make_model(EmbeddingBagCollection(tables=make_tables(config, source)), 0, config)
    found = model(next(source.batches("train", 2, None).epoch(0)).features).embeddings
    weight = model.embeddings.embedding_bags["many"].weight
    torch.testing.assert_close(found[:, 4:], torch.stack([2 * weight[2], weight[4] + weight[5]]))


@pytest.mark.parametrize(
    ("name", "bottom", "num_dense"), [("dcnv2", [8], 3), ("dlrm", [8], 0), ("dlrm_dcnv2", [8, 7], 3)]
)
def test_a_bottom_net_that_does_not_fit_is_refused(data, name, bottom, num_dense):
    config = ModelConfig(name=name, embedding_dim=8, bottom=bottom)
    with pytest.raises(ValueError, match=r"model\.bottom: must"):
        make_model(EmbeddingBagCollection(tables=make_tables(config, data)), num_dense, config)


@pytest.mark.parametrize(
    ("change", "key"),
    [({"embedding_dim": 6}, "embedding_dim"), ({"widths": {"x": 4}}, "widths"), ({"hidden": []}, "hidden")],
)
def test_bad_models_name_their_key(data, change, key):
    config = dataclasses.replace(ModelConfig(), **change)
    with pytest.raises(ValueError, match=rf"model\.{key}"):
        make_model(EmbeddingBagCollection(tables=make_tables(config, data)), 0, config)
