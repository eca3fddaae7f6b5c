"""How well sums of Adagrad stand in for look-ups: `counts: optimizer` of a conversion against real counts.

Run: python benchmarks/count_proxy.py   (prints what docs/convert.md has)

Clicks of the embedded generator, one model a seed and optimizer, trained dense; its two large tables compressed by
real counts, by the sums, and by nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from torchrec_compress import compress
from torchrec_compress.methods import DenseConfig, MethodConfig, PQConfig
from torchrec_compress.seams import optimizers_in_backward
from torchrec_compress.train.config import GeneratorConfig
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.evaluate.metrics import auc, logloss

LARGE, DIM, BATCH = ("user", "item"), 32, 4096
OPTIMIZERS = {"row-wise": (RowWiseAdagrad, 0.1), "element-wise": (torch.optim.Adagrad, 0.05)}


class Clicks(nn.Module):
    """Tables and a net over them, side by side."""

    def __init__(self, data: ClickData) -> None:
        super().__init__()
        tables = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=DIM, feature_names=[name])
            for name, rows in zip(data.features, data.vocab, strict=True)
        ]
        self.sparse: nn.Module = EmbeddingBagCollection(tables)
        self.net = nn.Sequential(nn.Linear(DIM * len(tables), 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Return logits, (B,)."""
        return self.net(self.sparse(features).values()).squeeze(1)


def batch_of(data: ClickData, split: Split, rows: Tensor) -> tuple[KeyedJaggedTensor, Tensor]:
    """Return ids and labels of some rows."""
    ids = split.ids[rows].T.reshape(-1).long()
    lengths = torch.ones(len(ids), dtype=torch.int64)
    return KeyedJaggedTensor.from_lengths_sync(data.features, ids, lengths), split.labels[rows]


def trained(data: ClickData, kind: str, seed: int, epochs: int) -> tuple[Clicks, dict[str, Tensor]]:
    """Return a trained model, and the sums of the optimizer by table, a number a row."""
    torch.manual_seed(seed)
    model = Clicks(data)
    optimizer, rate = OPTIMIZERS[kind]
    apply_optimizer_in_backward(optimizer, model.sparse.parameters(), {"lr": rate})
    dense = torch.optim.Adam(model.net.parameters(), lr=0.001)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train)).split(BATCH):
            features, labels = batch_of(data, data.train, rows)
            dense.zero_grad()
            nn.functional.binary_cross_entropy_with_logits(model(features), labels).backward()
            dense.step()
    sums = {}
    for name, bag in model.sparse.embedding_bags.items():  # type: ignore[union-attr]
        (found,) = optimizers_in_backward(bag.weight)
        (state,) = found.state.values()
        rows = state["sum"].reshape(len(bag.weight), -1).mean(1)
        sums[name] = rows / rows[rows > 0].mean()  # as a conversion takes them
    return model, sums


@torch.no_grad()
def measure(model: nn.Module, data: ClickData) -> tuple[float, float]:
    """Return AUC and logloss of the test split."""
    found = [model(batch_of(data, data.test, rows)[0]) for rows in torch.arange(len(data.test)).split(8192)]
    logits, labels = torch.cat(found).numpy(), data.test.labels.numpy()
    return auc(labels, logits), logloss(labels, logits)


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Return Spearman's, of values whose ties are in any order."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each way to weigh ids."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args(arguments)
    data = generate(GeneratorConfig())
    columns = zip(data.features, data.vocab, data.train.ids.T, strict=True)
    real = {name: torch.bincount(ids.long(), minlength=rows) for name, rows, ids in columns}
    for kind in OPTIMIZERS:
        lines: dict[str, list[tuple[float, float]]] = {}
        for seed in options.seeds:
            model, sums = trained(data, kind, seed, options.epochs)
            lines.setdefault("full", []).append(measure(model, data))
            for name in LARGE:
                hot = len(real[name]) // 50
                both = set(real[name].topk(hot).indices.tolist()) & set(sums[name].topk(hot).indices.tolist())
                told = rank_correlation(real[name], sums[name])
                shared = f"hottest 2 % in common {len(both) / hot:.2f}"
                print(f"{kind}, seed {seed}, {name}: rank correlation {told:.3f}, {shared}")
            for what, counts in (("look-ups", real), ("sums", sums), ("nothing", None)):
                plain = PQConfig(num_codes=2, structure="residual", codebook_size=64)
                tail: dict[str, MethodConfig] = {name: plain for name in LARGE}
                if counts is not None:
                    tail = {
                        name: PQConfig(
                            num_codes=2, structure="residual", codebook_size=64, popularity="count",
                            num_hot_rows=len(real[name]) // 50,
                        )
                        for name in LARGE
                    }  # fmt: skip
                given = None if counts is None else {name: counts[name] for name in LARGE}
                small = compress(model, {**tail, "*": DenseConfig()}, counts=given, seed=seed)
                lines.setdefault(what, []).append(measure(small, data))
        for what, found in lines.items():
            values = torch.tensor(found)
            (area, loss), (area_spread, loss_spread) = values.mean(0).tolist(), values.std(0).tolist()
            print(f"| {kind} | {what} | {area:.4f} ± {area_spread:.4f} | {loss:.4f} ± {loss_spread:.4f} |")


if __name__ == "__main__":
    main()
