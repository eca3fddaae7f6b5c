"""The curvature against sums written out by hand, the loss it predicts against the one measured, and what it leaves."""

import copy
import io
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import nn
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
    KeyedTensor,
    PoolingType,
)
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from tests.convert.clicks import batches, counts, logits_of, logloss, trained, weight_of
from torchrec_compress import (
    CompressedEmbeddingBagCollection,
    Curvature,
    compress,
    measure_curvature,
    native_parameters,
    predicted_rise,
)
from torchrec_compress.convert.losses import probes_of
from torchrec_compress.methods import NarrowConfig, PQConfig

D, N = 4, 12
HUGE = torch.full((D, D), 1e308, dtype=torch.float64)  # its trace is infinite
LOSSES = {"bce": nn.functional.binary_cross_entropy_with_logits, "mse": nn.functional.mse_loss}


class Net(nn.Module):
    """Two tables, the first with two features, under a small net with a drop-out."""

    def __init__(self, pooling=PoolingType.SUM, is_weighted=False, num_logits=1, embeddings=None):
        super().__init__()
        torch.manual_seed(0)
        given = [("one", ["a", "b"]), ("two", ["b"])]
        options = {"num_embeddings": N, "embedding_dim": D, "pooling": pooling, "init_fn": nn.init.normal_}
        tables = [EmbeddingBagConfig(name=name, feature_names=names, **options) for name, names in given]
        self.embeddings = EmbeddingBagCollection(tables, is_weighted) if embeddings is None else embeddings
        self.over = nn.Sequential(nn.Linear(3 * D, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, num_logits))

    def combine(self, bags):
        logits = self.over(bags)
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def forward(self, features):
        return self.combine(self.embeddings(features).values())


def features_of(lengths, seed=0, is_weighted=False):
    """Return bags of features a and b; lengths are (2, B)."""
    generator, lengths = torch.Generator().manual_seed(seed), torch.tensor(lengths)
    ids = torch.randint(N, (int(lengths.sum()),), generator=generator)
    weights = torch.rand(len(ids), generator=generator) if is_weighted else None
    return KeyedJaggedTensor.from_lengths_sync(["a", "b"], ids, lengths.flatten(), weights)


def by_hand(model, features, bend):
    """Return the sums of each table's terms and its look-ups, id by id, each row a leaf of its own.

    `bend` is the second derivative of the loss by a logit.
    """
    model, sums, lookups = copy.deepcopy(model).eval().double(), {}, {}
    outputs = [("one", "a"), ("one", "b"), ("two", "b")]
    for example in range(features.stride()):
        bags, leaves = [], []
        for table, feature in outputs:
            config = next(t for t in model.embeddings.embedding_bag_configs() if t.name == table)
            bag, weight = features[feature].to_dense()[example], model.embeddings.embedding_bags[table].weight
            factors = torch.ones(len(bag), dtype=torch.float64)
            if features.weights_or_none() is not None:
                factors = features[feature].to_dense_weights()[example].double()
            if config.pooling == PoolingType.MEAN:
                factors /= max(len(bag), 1)
            rows = [weight[number].detach().clone().requires_grad_() for number in bag.tolist()]
            leaves += [(table, row) for row in rows]
            bags.append(sum((f * r for f, r in zip(factors, rows, strict=True)), torch.zeros(D, dtype=torch.float64)))
        logit = model.combine(torch.cat(bags)[None])[0]
        for (table, _), slope in zip(leaves, torch.autograd.grad(logit, [row for _, row in leaves]), strict=True):
            sums[table] = sums.get(table, 0) + bend(logit.detach()) * torch.outer(slope, slope)
            lookups[table] = lookups.get(table, 0) + 1
    return sums, lookups


BENDS = {"bce": lambda z: torch.sigmoid(z) * torch.sigmoid(-z), "mse": lambda z: 2.0}
PAIRS = strategies.tuples(strategies.integers(0, 3), strategies.integers(1, 3))
LENGTHS = strategies.lists(PAIRS, min_size=1, max_size=5)


@pytest.mark.parametrize("loss", ["bce", "mse"])
@pytest.mark.parametrize("form", ["sum", "mean", "weighted"])
@hypothesis.settings(max_examples=6)
@hypothesis.given(lengths=LENGTHS)
def test_every_look_up_is_a_term(lengths, form, loss):
    pooling = PoolingType.MEAN if form == "mean" else PoolingType.SUM
    model = Net(pooling, form == "weighted")
    parts = [features_of(list(zip(*lengths, strict=True)), seed, form == "weighted") for seed in (1, 2)]
    parts.append(features_of([[1, 2, 0], [1, 1, 1]], 3, form == "weighted"))  # of another size
    found = measure_curvature(model, parts, loss=loss)
    wanted = [by_hand(model, part, BENDS[loss]) for part in parts]
    for name in ("one", "two"):
        total = sum(lookups[name] for _, lookups in wanted)
        expected = sum(sums[name] for sums, _ in wanted) / total
        assert (found[name].lookups, found[name].examples) == (total, sum(part.stride() for part in parts))
        torch.testing.assert_close(found[name].matrix, expected, rtol=1e-4, atol=1e-7)


class WeightedMeans(EmbeddingBagCollection):
    """As FBGEMM pools them, sharded; torch refuses to."""

    def forward(self, features):
        bags, rows = features["a"], self.embedding_bags["one"].weight[features["a"].values()]
        sums = torch.segment_reduce(rows * bags.weights().unsqueeze(1), "sum", lengths=bags.lengths(), axis=0)
        return KeyedTensor(["a"], [D], sums / bags.lengths().clamp(min=1).unsqueeze(1))


def test_a_weighted_mean_is_divided_by_its_ids():
    table = EmbeddingBagConfig(
        name="one", num_embeddings=N, embedding_dim=D, feature_names=["a"], pooling=PoolingType.MEAN
    )
    model, weights = WeightedMeans([table], is_weighted=True), torch.tensor([3.0, 1.0, 2.0])
    batch = KeyedJaggedTensor.from_lengths_sync(["a"], torch.tensor([1, 2, 5]), torch.tensor([2, 0, 1]), weights)
    found = measure_curvature(model, [batch], lambda model, batch: model(batch)["a"].sum(dim=1), "mse")["one"]
    shares = torch.tensor([(3 / 2) ** 2, (1 / 2) ** 2, 2.0**2])  # of H = 2
    torch.testing.assert_close(found.matrix, torch.full((D, D), 2 * float(shares.mean()), dtype=torch.float64))
    found.check_rows(lambda ids: model.embedding_bags["one"].weight.detach()[ids])


def test_unpooled_rows_are_look_ups_of_their_own():
    torch.manual_seed(0)
    table = EmbeddingConfig(name="word", num_embeddings=N, embedding_dim=D, feature_names=["a"])

    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embeddings, self.over = EmbeddingCollection(tables=[table]), torch.randn(D)

        def forward(self, features):
            return self.embeddings(features)["a"].to_padded_dense(3).sum(dim=1).tanh() @ self.over

    model, features = Sequence(), features_of([[3, 0, 2], [1, 1, 1]])
    found = measure_curvature(model, [features], loss="mse")["word"]
    weight, terms = model.embeddings.embeddings["word"].weight.detach(), torch.zeros(D, D)
    for bag in features["a"].to_dense():
        slope = (1 - weight[bag].sum(dim=0).tanh() ** 2) * model.over
        terms += len(bag) * 2 * torch.outer(slope, slope)
    assert found.lookups == 5
    torch.testing.assert_close(found.matrix.float(), terms / 5)


def outer_products(output, loss, draws=4000):
    """Return the mean of the probes' outer products."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([probes_of(output, None, loss, None, generator)[1][0][0] for _ in range(draws)])
    return drawn.T @ drawn / draws


def test_probes_stand_for_the_curvature_of_many_logits():
    logits = torch.tensor([[0.3, -1.0, 2.0]])
    chances = logits.softmax(dim=1)[0]
    wanted = torch.diag(chances) - torch.outer(chances, chances)
    torch.testing.assert_close(outer_products(logits, "softmax"), wanted, rtol=0, atol=0.02)
    tasks = torch.diag((logits.sigmoid() * (1 - logits.sigmoid()))[0])
    torch.testing.assert_close(outer_products(logits, "bce"), tasks, rtol=0, atol=0.02)


def test_tasks_and_losses_add_up():
    model, part = Net(num_logits=2), features_of([[1] * 4, [1] * 4])

    def measure(loss, forward):
        found = [measure_curvature(model, [part], forward, loss, seed=seed)["two"].matrix for seed in range(200)]
        return torch.stack(found).mean(dim=0)

    first = measure_curvature(model, [part], lambda net, batch: net(batch)[:, 0], "bce")["two"].matrix
    second = measure_curvature(model, [part], lambda net, batch: net(batch)[:, 1], "mse")["two"].matrix
    both = measure(("bce", "mse"), lambda net, batch: net(batch).unbind(dim=1))
    torch.testing.assert_close(both, first + second, rtol=0, atol=float(0.15 * (first + second).norm()))


def test_any_other_loss_by_the_squares_of_its_slopes_and_with_weights():
    model, part = Net(), features_of([[1, 1, 2], [1, 1, 1]])
    weights, labels = torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0])

    def huber(logits, batch):
        return nn.functional.huber_loss(logits, labels, reduction="none", delta=100.0)

    found = measure_curvature(model, [part], None, huber, weights=lambda batch: weights)["two"]
    model.eval()
    residuals = (model(part).detach() - labels) * weights.sqrt()
    terms = torch.zeros(D, D)
    for example in (1, 2):
        bags = model.embeddings(part).values().detach().requires_grad_()
        slope = torch.autograd.grad(model.combine(bags)[example], bags)[0][example, 2 * D :]
        terms += residuals[example] ** 2 * torch.outer(slope, slope)
    torch.testing.assert_close(found.matrix.float(), terms / 3, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("table", ["user", "item"])
def test_the_predicted_rise_is_the_measured_one(table):
    model = copy.deepcopy(trained())
    found = measure_curvature(model, batches(), logits_of)[table]
    weight, before = weight_of(model, table).detach(), weight_of(model, table).detach().clone()
    start, generator, rises = logloss(model), torch.Generator().manual_seed(0), []
    for _ in range(4):
        errors = 0.05 * float(before.std()) * torch.randn(before.shape, generator=generator)
        both = []
        for sign in (1, -1):  # the loss's slope, which is of any sign, cancels
            weight.copy_(before + sign * errors)
            both.append(logloss(model) - start)
        rises.append((sum(both) / 2, predicted_rise(before, before + errors, counts(table), found)))
    measured, predicted = (sum(column) for column in zip(*rises, strict=True))
    assert measured > 0 and abs(predicted / measured - 1) < 0.1, rises
    assert found.moved < 0.2


def test_a_table_and_its_consumer_may_be_scaled():
    model, other = trained(), copy.deepcopy(trained())
    weight_of(other, "user").data *= 4

    def scaled(net, batch):
        pooled = net.embeddings(batch[0])
        values = torch.cat([pooled["user"] / 4, pooled.values()[:, 8:]], dim=1)
        return net.combine(values, None).squeeze(1)

    found = measure_curvature(model, batches()[:4], logits_of)["user"]
    theirs = measure_curvature(other, batches()[:4], scaled)["user"]
    errors = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    rises = [
        predicted_rise(torch.zeros(200, 8), scale * errors, counts("user"), each)
        for scale, each in ((1, found), (4, theirs))
    ]
    torch.testing.assert_close(rises[0], rises[1], rtol=1e-4, atol=0)


def test_matrices_are_symmetric_finite_and_positive():
    found = measure_curvature(trained(), batches()[:3], logits_of)
    assert list(found) == ["user", "item", "hour", "device", "region"]
    for each in found.values():
        assert each.matrix.dtype == torch.float64 and torch.equal(each.matrix, each.matrix.T)
        assert torch.isfinite(each.matrix).all() and torch.linalg.eigvalsh(each.matrix)[0] > -1e-12
        assert (each.examples, each.lookups) == (3000, 3000) and 0 < each.moved < 1


def test_nothing_is_predicted_of_a_table_that_was_not_read():
    model, nobody = Net(), features_of([[0, 0], [1, 1]])
    model.embeddings = EmbeddingBagCollection(
        [EmbeddingBagConfig(name=name, num_embeddings=N, embedding_dim=D, feature_names=[name]) for name in "ab"]
    )
    found = measure_curvature(model, [nobody], lambda net, batch: net.embeddings(batch)["b"].sum(dim=1))
    assert found["a"].lookups == 0 and not found["a"].matrix.any() and found["a"].moved == 0
    with pytest.raises(ValueError, match="table 'a': must be read to predict anything"):
        predicted_rise(torch.zeros(N, D), torch.ones(N, D), torch.ones(N), found["a"])
    assert found["a"].too_little == "it was never looked up"


def compressed_net():
    tables = Net().embeddings.embedding_bag_configs()
    methods = {"one": NarrowConfig(width=4, bits=8), "two": PQConfig(num_codes=2, codebook_size=4)}
    return Net(embeddings=CompressedEmbeddingBagCollection(tables, compression=methods))


@pytest.mark.parametrize("make", [Net, compressed_net])
def test_the_model_is_left_as_it_was(make):
    model, features = make(), features_of([[1, 2, 0], [1, 3, 1]])
    model.train()
    model.over[2].eval()
    model.over[0].bias.requires_grad_(False)
    apply_optimizer_in_backward(torch.optim.Adagrad, native_parameters(model), {"lr": 0.1})
    hooks, calls = len(model.over._forward_hooks), []
    model.embeddings.register_forward_hook(lambda *_: calls.append(1))
    model(features).sum().backward()  # gradients, which stay
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    with torch.no_grad():
        measure_curvature(model, [features] * 3)
        assert not torch.is_grad_enabled()
    assert len(calls) == 4 and len(model.embeddings._forward_hooks) == 1 and len(model.over._forward_hooks) == hooks
    assert model.training and model.embeddings.training and not model.over[2].training
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (name != "over.0.bias")
        assert (parameter.grad is None) == (gradients[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name]), name


def test_steps_that_kernels_count_in_every_forward_are_given_back():
    model = Net()
    model.register_buffer("iter", torch.tensor([7]))  # as FBGEMM's kernels do, Adam's on a GPU

    def counting(net, batch):
        net.iter += 1
        return net(batch)

    measure_curvature(model, [features_of([[1], [1]])], counting)
    assert int(model.iter) == 7


def test_it_is_left_so_by_an_error_too():
    model = Net().train()

    def fail(net, batch):
        net(batch)
        raise RuntimeError("no logits")

    with pytest.raises(RuntimeError, match="no logits"):
        measure_curvature(model, [features_of([[1], [1]])], fail)
    assert model.training and model.over.training and not model.embeddings._forward_hooks


def test_a_gradient_that_is_not_finite_names_table_and_batch():
    model, parts = Net(), [features_of([[1, 1], [1, 1]], seed) for seed in range(3)]
    factors = iter([1.0, 1.0, math.inf])
    with pytest.raises(ValueError, match=r"table '(one|two)': gradients must be finite, .* in batch 3 \(counted"):
        measure_curvature(model, parts, lambda net, batch: net(batch) * next(factors), "mse")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss": "hinge"}, "loss must be a function, one of"),
        ({"loss": "softmax"}, r"logits must be \(B, classes\) with softmax"),
        ({"loss": lambda logits, batch: logits.sum()}, "loss must return one number per example"),
        ({"loss": ("bce", "mse")}, "a list of one for each of several logits"),
        ({"forward": lambda net, batch: net(batch).detach()}, "logits must depend on embeddings"),
        ({"forward": lambda net, batch: (net(batch), None)}, "forward must return logits"),
        ({"weights": lambda batch: torch.ones(7)}, "weights must be 2 finite numbers >= 0"),
        ({"batches": []}, "batches must hold at least one example"),
        ({"model": nn.Linear(1, 1)}, "model must hold embedding collections"),
        ({"model": nn.ModuleList([Net(), Net()])}, r"got tables \['one', 'two'\] in several"),
        ({"seed": -1}, "seed must be an int"),
    ],
)
def test_what_is_no_model_loss_or_batch_is_refused(arguments, message):
    given = {"model": Net(), "batches": [features_of([[1, 1], [1, 1]])], **arguments}
    with pytest.raises(ValueError, match=message):
        measure_curvature(**given)


def test_a_saved_curvature_is_data():
    found = measure_curvature(Net(), [features_of([[1, 9], [1, 1]])])["one"]
    file = io.BytesIO()
    torch.save(found.to_dict(), file)
    file.seek(0)
    plain = torch.load(file, weights_only=True)
    again = Curvature.from_dict(plain)
    assert torch.equal(again.matrix, found.matrix) and again.to_dict().keys() == plain.keys()
    wrong = {
        "matrix": [torch.ones(D, D), torch.full((D, D), math.nan, dtype=torch.float64), -found.matrix, [1.0], HUGE],
        "examples": [-1, 2.0, True],
        "moved": [math.nan],
        "table": [7],
        "witness_ids": [plain["witness_ids"] + N, plain["witness_ids"] - 2, plain["witness_ids"][:, 1:]],
        "witness_bags": [torch.full_like(plain["witness_bags"], math.nan)],
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match="curvature"):
                Curvature.from_dict({**plain, name: value})
    with pytest.raises(ValueError, match="curvature: must have"):
        Curvature.from_dict({"matrix": found.matrix})


def test_a_compressed_model_is_measured_as_the_dense_one_that_it_serves():
    model = compressed_net()
    dense = Net()
    dense.over.load_state_dict(model.over.state_dict())
    with torch.no_grad():
        for name in ("one", "two"):
            rows = model.embeddings.table_rows(name, torch.arange(N))
            dense.embeddings.embedding_bags[name].weight.copy_(rows)
    parts = [features_of([[1, 2, 0], [1, 3, 1]], seed) for seed in range(2)]
    ours, theirs = measure_curvature(model, parts), measure_curvature(dense, parts)
    for name in ("one", "two"):
        torch.testing.assert_close(ours[name].matrix, theirs[name].matrix, rtol=1e-4, atol=1e-8)
    compress(dense.embeddings, PQConfig(num_codes=2, codebook_size=4), curvature=ours)
