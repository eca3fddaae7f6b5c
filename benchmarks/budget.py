"""Time of measuring a frontier, and how near its estimates are to fits of their own.

Run: python benchmarks/budget.py            (the time: tables as globo_news has them, 323,000 and twice 46,000 rows)
     python benchmarks/budget.py --own      (the estimates of one table beside fits of their own, minutes)
     python benchmarks/budget.py --tables 1000 --rows 5000      (many small tables)

Rows are clustered, columns of falling scale, turned; look-ups fall by a power of the rank: steeply for two of the three
tables. One thread; seconds are of the CPU.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from torchrec_compress import compress
from torchrec_compress.compression import measure_frontier
from torchrec_compress.compression.candidates import Tried
from torchrec_compress.compression.measuring import measure_candidates, sample_of
from torchrec_compress.compression.rows import rows_of
from torchrec_compress.fit.popularity import popularity_weights
from torchrec_compress.methods import PQConfig


def made(num_rows: int, seed: int, power: float, lookups: float, width: int = 64) -> tuple[Tensor, Tensor]:
    """Return rows and look-ups per id, in random order.

    Args:
        num_rows: N.
        seed: of everything.
        power: look-ups fall as rank^-power.
        lookups: per row, in the mean.
        width: D.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1).pow(-0.4)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    centres = torch.randn(2000, width, generator=generator)
    choice = torch.randint(2000, (num_rows,), generator=generator)
    rows = (0.7 * centres[choice] + 0.7 * torch.randn(num_rows, width, generator=generator)) * scale @ turn
    share = torch.arange(1, num_rows + 1).double().pow(-power)
    counts = torch.poisson(share / share.sum() * num_rows * lookups, generator=generator).long()
    return 0.1 * rows, counts[torch.randperm(num_rows, generator=generator)]


def time_frontier(tables: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Print the time of the measurement and of choices, and the choices themselves."""
    rows, counts = ({name: each[n] for name, each in tables.items()} for n in (0, 1))
    dense = sum(4 * each.numel() for each in rows.values())
    start = time.process_time()
    frontier = measure_frontier(rows, counts)
    print(f"measured in {time.process_time() - start:.1f} s")
    for ratio in (15, 30, 60):
        start = time.process_time()
        choice = frontier.choose(dense / ratio)
        seconds = time.process_time() - start
        print(f"\n{ratio}x, {seconds:.3f} s; {choice.error:.4g} {choice.unit}, at most {choice.excess:.2g} too much")
        if len(tables) < 10:
            print(choice)


def compare_own(rows: Tensor, counts: Tensor) -> None:
    """Print estimates over the errors of fits of their own on all rows, for several codes and heads."""
    size = len(rows)
    table = EmbeddingBagConfig(name="t", num_embeddings=size, embedding_dim=rows.shape[1], feature_names=["t"])
    start = time.process_time()
    found = measure_candidates(
        sample_of(rows_of("benchmark", {"t": rows})["t"], counts, 0, None), Tried(num_codes=(1, 2, 4, 8))
    )
    print(f"measured in {time.process_time() - start:.1f} s")
    dense, weights = EmbeddingBagCollection([table]), popularity_weights(counts, "count", size).double()
    with torch.no_grad():
        dense.embedding_bags["t"].weight.copy_(rows)  # type: ignore[operator]
    print("| method | hot rows | bytes | own error, of the table's | estimate / own |\n|---|---|---|---|---|")
    all_of_it = float(rows.square().sum(1).double() @ weights)
    for each in found:
        config = each.option
        if isinstance(config, PQConfig) and (not config.num_hot_rows or config.hot_dtype == "int8"):
            if config.num_hot_rows not in (0, *(round(size * share) for share in (0.003, 0.02, 0.1, 0.25))):
                continue
            served = compress(dense, config, counts={"t": counts}).table_rows("t", torch.arange(size)).detach()
            error = float((rows - served).square().sum(1).double() @ weights)
            what = f"{config.structure} M={config.num_codes}"
            cells = [what, f"{config.num_hot_rows:,}", f"{each.num_bytes:,}", f"{error / all_of_it:.4f}"]
            print(f"| {' | '.join(cells)} | {each.error / error:.3f} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--own", action="store_true", help="compare with fits of their own")
    parser.add_argument("--rows", type=int, default=46_000, help="of a small table, or of the one with --own")
    parser.add_argument("--power", type=float, default=1.2, help="of the falling look-ups of those")
    parser.add_argument("--tables", type=int, help="so many tables of --rows in place of the three")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    small = [made(arguments.rows, 1 + n, arguments.power, 50) for n in range(arguments.tables or 2)]
    if arguments.own:
        compare_own(*small[0])
    elif arguments.tables:
        time_frontier({f"table{n}": each for n, each in enumerate(small)})
    else:
        time_frontier({"user": made(323_000, 0, 0.5, 8), "article": small[0], "previous": small[1]})


if __name__ == "__main__":
    main()
