"""Dense layers in low rank: of what they return (`compress_dense`), and of their weights at the same ranks.

Run: python benchmarks/dense_layers.py --keep /tmp/choose      (trains and keeps the models of choose.py)

The DeepFM of the embedded generator, layers of 160 x 128 and 128 x 64, three seeds, nothing trained after; fitted on
20,000 rows of validation. Gaps of AUC and logloss on test to the model of the same seed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path

import torch
from choose import trained
from curvature import evaluate
from torch import nn

from torchrec_compress import compress_dense
from torchrec_compress.train.config import GeneratorConfig
from torchrec_compress.train.models.click import ClickModel


@torch.no_grad()
def of_weights(model: ClickModel, small: nn.Module) -> ClickModel:
    """Return a copy whose layers have weights of the ranks that another one's layers have, nearest to its own."""
    found = copy.deepcopy(model)
    for path, layer in found.named_modules():
        thin = dict(small.named_modules()).get(path)
        if isinstance(layer, nn.Linear) and isinstance(thin, nn.Sequential):
            left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
            rank = thin[0].out_features
            layer.weight.copy_(left[:, :rank] * values[:rank] @ right[:rank])
    return found


def main() -> None:
    """Compress the dense layers of three models at several ratios and print a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, required=True, help="folder of trained models")
    given = parser.parse_args()
    torch.set_num_threads(1)
    known = [trained(GeneratorConfig(), seed, given.keep / f"demo_{seed}.pt") for seed in (0, 1, 2)]
    print(
        "| ratio | weights of both layers | of what they return: AUC gap, logloss gap | of weights |\n|---|---|---|---|"
    )
    for ratio in (2.0, 4.0, 8.0, 16.0):
        gaps: list[list[tuple[float, float]]] = [[], []]
        left = 0
        for each in known:
            auc, loss = evaluate(each.model, each.layout, each.data.test)
            rows = each.data.valid.ids[:20_000].split(4096)
            batches = [each.layout.to_features(ids) for ids in rows]
            small = compress_dense(each.model, batches, ratio)
            left = sum(w.numel() for name, w in small.named_parameters() if w.dim() == 2 and "embeddings" not in name)
            for mine, other in zip(gaps, (small, of_weights(each.model, small)), strict=True):
                now = evaluate(other, each.layout, each.data.test)  # type: ignore[arg-type]
                mine.append((now[0] - auc, now[1] - loss))
        cells = []
        for mine in gaps:
            (a, b), (c, d) = ((statistics.mean(x), statistics.stdev(x)) for x in zip(*mine, strict=True))
            cells.append(f"{a:+.4f} ± {b:.4f}, {c:+.4f} ± {d:.4f}")
        print(f"| {ratio:g}x | {left:,} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
