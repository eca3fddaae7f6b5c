"""Codes of the embedded generator's tables, fitted to squared error and in the metric of the loss, at equal bytes.

Run: python benchmarks/curvature.py --model /tmp/demo.pt        (trains and keeps the model unless the file is there)

A DeepFM of width 32 learns a million clicks; the tables of users and items are stored as codes, the rest stays dense,
and nothing is trained after. Beside the AUC and the logloss lost on the test rows stand the rise that was measured on
100,000 training rows and the one that `predicted_rise` says, from a curvature of validation rows.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection

from torchrec_compress import Curvature, compress, measure_curvature, predicted_rise
from torchrec_compress.methods import DenseConfig, MECConfig, MethodConfig, NarrowConfig, PQConfig
from torchrec_compress.train.config import GeneratorConfig, ModelConfig
from torchrec_compress.train.data.batch import Layout
from torchrec_compress.train.data.generator import generate
from torchrec_compress.train.data.memory import ClickData, Split
from torchrec_compress.train.models.click import ClickModel, make_model, tables_of

CODED = ("user", "item")
METHODS: dict[str, MethodConfig] = {
    f"{structure} M={number}": PQConfig(num_codes=number, structure=structure, popularity="count")
    for number in (1, 2, 4)
    for structure in ("product", "residual")
    if number > 1 or structure == "residual"  # of one code they are the same
}
METHODS |= {"mec M=2": MECConfig(num_codes=2), "narrow r=8": NarrowConfig(width=8)}


def evaluate(model: ClickModel, layout: Layout, split: Split) -> tuple[float, float]:
    """Return AUC and logloss."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(layout.to_features(ids)).logits for ids in split.ids.split(16384)]).double()
    labels = split.labels.double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    ranks = torch.empty_like(logits)
    ranks[logits.argsort()] = torch.arange(1, len(logits) + 1, dtype=torch.float64)
    positive = labels.sum()
    auc = (ranks[labels > 0].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive))
    return float(auc), float(loss)


def train(model: ClickModel, layout: Layout, data: ClickData, epochs: int) -> None:
    """Train in place, and keep the epoch of the best AUC on validation."""
    rows = list(model.embeddings.parameters())  # type: ignore[union-attr, operator]
    mine = {id(parameter) for parameter in rows}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in mine]
    optimizers = [torch.optim.Adagrad(rows, lr=0.05), torch.optim.Adam(rest, lr=1e-3)]
    best, state = 0.0, model.state_dict()
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train)).split(4096):
            for optimizer in optimizers:
                optimizer.zero_grad()
            logits = model(layout.to_features(data.train.ids[batch])).logits
            torch.nn.functional.binary_cross_entropy_with_logits(logits, data.train.labels[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
        auc, _ = evaluate(model, layout, data.valid)
        if auc > best:
            best, state = auc, copy.deepcopy(model.state_dict())
    model.load_state_dict(state)


def prediction(
    model: ClickModel, served: dict[str, Tensor], counts: dict[str, Tensor], found: dict[str, Curvature]
) -> float:
    """Return the predicted rise of the logloss over all coded tables."""
    bags = model.embeddings.embedding_bags  # type: ignore[union-attr]
    return sum(predicted_rise(bags[name].weight, rows, counts[name], found[name]) for name, rows in served.items())  # type: ignore[union-attr, index]


def main() -> None:
    """Train, measure, and print a row for every fit."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--only", default="", help="part of a method's name")
    arguments = parser.parse_args()
    data = generate(GeneratorConfig())
    sizes = dict(zip(data.features, data.vocab, strict=True))
    layout, config = Layout(data.features, (1,) * len(sizes)), ModelConfig(embedding_dim=32, hidden=[128, 64])
    torch.manual_seed(0)
    model = make_model(EmbeddingBagCollection(tables_of(config, sizes)), 0, config)
    if arguments.model.exists():
        model.load_state_dict(torch.load(arguments.model, weights_only=True))
    else:
        train(model, layout, data, epochs=2)
        torch.save(model.state_dict(), arguments.model)
    known = data.train.take(slice(0, 100_000))
    (auc, loss), (_, known_loss) = evaluate(model, layout, data.test), evaluate(model, layout, known)
    counts = {name: torch.bincount(data.train.ids[:, n].long(), minlength=sizes[name]) for n, name in enumerate(sizes)}
    batches = [layout.to_features(ids) for ids in data.valid.ids.split(4096)]
    found = measure_curvature(model, batches, lambda net, batch: net(batch).logits, progress=True)
    print(f"full: AUC {auc:.4f}, logloss {loss:.4f}; curvature moved {max(each.moved for each in found.values()):.3f}")
    print("| fit | smaller | AUC | logloss | training logloss | predicted |")
    for name, method in METHODS.items():
        for metric in (None, found) if arguments.only in name else ():
            methods = {**dict.fromkeys(CODED, method), "*": DenseConfig()}
            other = copy.deepcopy(model)
            other.embeddings = made = compress(model.embeddings, methods, counts=counts, curvature=metric)  # type: ignore[call-overload]
            served = {name: made.table_rows(name, torch.arange(sizes[name])).detach() for name in CODED}
            now, on_known = evaluate(other, layout, data.test), evaluate(other, layout, known)
            rises = (now[0] - auc, now[1] - loss, on_known[1] - known_loss, prediction(model, served, counts, found))
            label = name if metric is None else f"{name}, in the metric"
            columns = [label, f"{made.footprint().ratio:.1f}x", *(f"{rise:+.4f}" for rise in rises)]
            print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
