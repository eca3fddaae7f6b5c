"""Dense layers in low rank: against the covariance of what they return, and what a model keeps."""

import copy
import logging

import pytest
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.models.dlrm import DLRM

from torchrec_compress import compress_dense
from torchrec_compress.convert import dense_layers


def net(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(48, 64, **options), nn.ReLU(), nn.Linear(64, 40, **options), nn.Linear(40, 1, **options)
    )


def correlated(rows=3000, seed=1):
    """Return inputs whose variances fall fast, around a mean that is not zero, as (rows, 48) float32."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(48, 48, generator=torch.Generator().manual_seed(7))
    scales = torch.linspace(0, -5, 48).exp()
    return (torch.randn(rows, 48, generator=generator) * scales) @ mixing + 3.0


def weights_of(model):
    return sum(weight.numel() for weight in model.parameters() if weight.dim() == 2)


def layer_of(rank):
    """Return a layer whose inputs, and those inputs, vary in a few directions."""
    torch.manual_seed(1)
    inputs = torch.randn(500, rank) @ torch.randn(rank, 48) + 2.0
    return nn.Sequential(nn.Linear(48, 64)), inputs


def test_what_varies_in_few_directions_is_kept_whole():
    model, inputs = layer_of(5)
    small = compress_dense(model, inputs.split(100), ratio=4.0)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert weights_of(small) == 6 * (48 + 64)  # as many ranks as a quarter of the weights has room for


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_lost_is_what_the_covariance_says(bias, caplog):
    model, inputs = nn.Sequential(nn.Linear(48, 64, bias=bias)), correlated()
    inputs = inputs + torch.linspace(0, 30, len(inputs))[:, None]  # the first batch tells little of the mean
    with caplog.at_level(logging.INFO, dense_layers.__name__):
        small = compress_dense(model, inputs.split(500), ratio=3.0)
    rank = small[0][0].out_features
    wanted, got = model(inputs).detach().double(), small(inputs).detach().double()
    values = torch.linalg.eigvalsh(torch.cov(wanted.T, correction=0)).flip(0)
    assert rank == int(48 * 64 / 3 / (48 + 64))
    torch.testing.assert_close((got - wanted).square().sum(1).mean(), values[rank:].sum(), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(got.mean(0), wanted.mean(0), rtol=1e-4, atol=1e-4)
    assert f"rank {rank}, {100 * float(values[rank:].sum() / values.sum()):.3g} %" in caplog.text


def test_it_beats_the_low_rank_of_the_weights_on_inputs_it_has_not_seen():
    model, fresh = net(), correlated(seed=2)
    small = compress_dense(model, [correlated()], ratio=3.0)
    by_weights = copy.deepcopy(model)
    for mine, layer in zip(small, by_weights, strict=True):
        if isinstance(mine, nn.Sequential):
            left, values, right = torch.linalg.svd(layer.weight.detach())
            rank = mine[0].out_features
            layer.weight.data = left[:, :rank] * values[:rank] @ right[:rank]
    wanted = model(fresh)
    errors = [(other(fresh) - wanted).square().mean() for other in (small, by_weights)]
    assert errors[0] < 0.1 * errors[1]


def test_weights_go_where_they_save_most():
    """As many as there is room for, and none could be moved to another layer for less variance lost."""
    model, inputs = net(), correlated()
    small = compress_dense(model, [inputs], ratio=4.0)
    whole, left = 48 * 64 + 64 * 40, weights_of(small) - 40  # the last layer is too narrow to get smaller
    assert whole / 4 - (48 + 64) < left <= whole / 4
    first, second = model[0](inputs), model[2](model[1](model[0](inputs)))
    shares = [torch.linalg.eigvalsh(torch.cov(each.double().T)).flip(0) for each in (first, second)]
    shares = [each / each.sum() for each in shares]
    ranks, sizes = [small[0][0].out_features, small[2][0].out_features], (48 + 64, 64 + 40)
    for mine, other in ((0, 1), (1, 0)):
        last, gained = shares[mine][ranks[mine] - 1] / sizes[mine], shares[other][ranks[other]] / sizes[other]
        assert last >= gained or ranks[mine] == 1
    assert isinstance(small[3], nn.Linear)


def test_a_layer_that_a_ratio_leaves_room_for_stays_whole():
    model, inputs = net(), torch.randn(3000, 48)  # so that the first layer's outputs vary in all directions
    model[2].weight.data = torch.randn(40, 2) @ torch.randn(2, 64)
    small = compress_dense(model, [inputs], ratio=1.15)
    assert [type(each) for each in small] == [nn.Linear, nn.ReLU, nn.Sequential, nn.Linear]
    assert small[0] is not model[0] and weights_of(small) - 40 <= (48 * 64 + 64 * 40) / 1.15


def test_a_copy_or_the_model_itself():
    for inplace in (False, True):
        model = net().train()
        model[1].eval()
        model[0].weight.requires_grad_(False)
        before = copy.deepcopy(model.state_dict())
        small = compress_dense(model, [correlated()], ratio=2.0, layers=["0", "2"], inplace=inplace)
        assert (small is model) == inplace
        assert [part.training for part in small] == [True, False, True, True]
        assert [[weight.requires_grad for weight in part.parameters()] for part in small] == [
            [False, False, True], [], [True, True, True], [True, True]
        ]  # fmt: skip
        assert not any(part._forward_hooks for part in model.modules())
        if not inplace:
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
            assert model.training and not model[1].training
        out = small(correlated(8))
        out.sum().backward()
        assert small[2][0].weight.grad is not None and small[0][0].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_types_stay(dtype):
    model, inputs = net(dtype=dtype), correlated().to(dtype)
    small = compress_dense(model, [inputs], ratio=2.0)
    assert {weight.dtype for weight in small.parameters()} == {dtype}
    lost = (small(inputs) - model(inputs)).double().var() / model(inputs).double().var()
    assert lost < 0.1


def test_a_dlrm():
    """Its layers are found, its tables are not touched, and it is called as before."""
    torch.manual_seed(0)
    table = EmbeddingBagConfig(name="item", num_embeddings=100, embedding_dim=32, feature_names=["item"])
    model = DLRM(EmbeddingBagCollection([table]), 8, [64, 32], [64, 1])
    ids = KeyedJaggedTensor.from_lengths_sync(["item"], torch.arange(100), torch.ones(100, dtype=torch.int64))
    batches = [(torch.randn(100, 8), ids) for _ in range(3)]
    small = compress_dense(model, batches, 1.5, lambda model, batch: model(*batch))
    torch.testing.assert_close(small(*batches[0]), model(*batches[0]), rtol=0.1, atol=0.1)
    assert sum(isinstance(each, nn.Sequential) and len(each) == 2 for each in small.modules()) >= 2
    with pytest.raises(ValueError, match=r"layers must name an nn.Linear each, got 'sparse_arch.\*'"):
        compress_dense(model, batches, 1.5, layers="sparse_arch.*")


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)
    return model


def compiled(model):
    model[0].compile(backend="eager")
    return model


def tied(model):
    model.append(nn.Linear(48, 64))
    model[4].weight = model[0].weight
    return model


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def held(model):
    model.others = [model[0]]
    return model


class FullyShardedDataParallel(nn.Sequential):
    pass


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (net, {"ratio": 1.0}, "ratio must be above 1, got 1.0"),
        (net, {"ratio": float("nan")}, "ratio must be above 1, got nan"),
        (net, {"ratio": 60.0}, r"ratio must be at most 26\.\d+, a rank of 1 for all layers, got 60"),
        (net, {"layers": ["0", "1"]}, "layers must name an nn.Linear each, got '1'"),
        (net, {"layers": "3"}, r"a layer must get smaller by it, got \['3'\], which are too narrow"),
        (net, {"batches": []}, "batches must hold one, got none"),
        (net, {"batches": correlated(5)}, r"must be a list or an iterator of batches, got one Tensor; write \[batch\]"),
        (
            net,
            {"batches": [correlated(5) * float("nan")]},
            "outputs must be finite, got NaN or infinity of '0', call 1",
        ),
        (
            net,
            {"forward": lambda model, batch: None},
            r"must be called by the forward, got \['0', '2'\] that never are",
        ),
        (
            net,
            {"forward": lambda model, batch: model[0](batch), "layers": ["0", "2"]},
            r"must be called by the forward, got \['2'\] that never are",
        ),
        (
            net,
            {"batches": [correlated(5), torch.ones(5, 47)]},
            r"batch 2: inputs of '0' must be .* 48\), got \(5, 47\)",
        ),
        (net, {"batches": [correlated(5), torch.ones(())]}, r"batch 2: inputs of '0' must be \(..., 48\), got \(\)"),
        (
            net,
            {"forward": lambda model, batch: model[3](model[0](batch)), "layers": "0"},
            r"batch 1: inputs of '3' must be \(..., 40\), got \(100, 64\)",
        ),
        (lambda: compiled(net()), {}, "'0' must not be compiled, as others take its place"),
        (lambda: hooked(net()), {}, "'0' must have no hooks, parametrization or forward of its own"),
        (lambda: tied(net()), {}, r"layers must not share weights, got \['0.weight', '4.weight'\] tied"),
        (lambda: held(net()), {"inplace": True}, "'0' must be held as a submodule alone"),
        (lambda: FullyShardedDataParallel(net()), {}, "must not be wrapped by FullyShardedDataParallel"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_changed(model, options, said):
    model = model().train()
    before = copy.deepcopy(model.state_dict())
    hooks = [len(part._forward_hooks) for part in model.modules()]
    with pytest.raises(ValueError, match=f"compress_dense: .*{said}"):
        compress_dense(model, **{"batches": [correlated(100)], "ratio": 2.0, **options})
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [len(part._forward_hooks) for part in model.modules()] == hooks
    assert all(part.training for part in model.modules())


def test_a_parametrized_layer_is_none_of_the_class():
    model = parametrized(net())
    small = compress_dense(model, [correlated()], ratio=2.0)
    assert type(small[0]) is type(model[0]) and isinstance(small[2], nn.Sequential)


def test_layers_that_are_never_called_stay(caplog):
    small = compress_dense(net(), [correlated()], 2.0, lambda model, batch: model[0](batch))
    assert "layers ['2'] are never called by the forward, and stay as they are" in caplog.text
    assert isinstance(small[0], nn.Sequential) and isinstance(small[2], nn.Linear)


def test_outputs_that_do_not_vary_need_one_direction():
    model = nn.Sequential(nn.Linear(48, 64))
    inputs = torch.ones(10, 48)
    small = compress_dense(model, [inputs], ratio=2.0)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-4, atol=1e-4)
