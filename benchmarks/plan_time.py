"""Seconds to plan compressed tables, by number of tables and ranks: `python benchmarks/plan_time.py`.

Each case runs in a process of its own, and reports CPU seconds, since planning is one thread; wall-clock seconds are
those on an idle core. The tables are spread over the methods in turn; 1,000 of them hold 1.7 * 10**11 rows. Ranks have
a terabyte each, so that all of them fit on 8; with `--hbm 80` they do not, and the time is that to the advice.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
import warnings

METHODS = "mec, pq with hot rows, int8, memcom, hash, dense"


def choose(num_tables: int, world_size: int) -> None:
    """Choose among six ways for each table once and print a row."""
    import torch
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
    from torchrec.distributed.planner import Topology

    from torchrec_compress.compression import Frontier
    from torchrec_compress.compression.knapsack import Candidate
    from torchrec_compress.methods import DenseConfig, Int4Config, Int8Config, PQConfig
    from torchrec_compress.planner import EmbeddingShardingPlanner

    tables = [
        EmbeddingBagConfig(name=f"t{n}", num_embeddings=10_000 + 1000 * n, embedding_dim=64, feature_names=[f"t{n}"])
        for n in range(num_tables)
    ]
    model = torch.nn.ModuleDict({"sparse": EmbeddingBagCollection(tables, device=torch.device("meta"))})
    ways = [*(PQConfig(num_codes=codes) for codes in (2, 4, 8)), Int4Config(), Int8Config(), DenseConfig()]
    candidates = {
        table.name: [Candidate(way.stored_bytes(table), (1 + n % 7) * 10.0**-k, way) for k, way in enumerate(ways)]
        for n, table in enumerate(tables)
    }
    frontier = Frontier({table.name: (table.num_embeddings, 64) for table in tables}, candidates, "loss")
    topology = Topology(world_size=world_size, local_world_size=8, compute_device="cuda", hbm_cap=6 * 2**30)
    planner = EmbeddingShardingPlanner(topology, stats=[])
    start = time.process_time()
    choice = planner.choose(model, frontier)
    spent = time.process_time() - start
    print(f"| {num_tables} x {len(ways)} | {world_size} | {spent:.1f} | {choice.planned_bytes / 2**30:.1f} |")


def one(num_tables: int, world_size: int, hbm: int, stock: bool, limit: int) -> None:
    """Plan once and print a row of the table."""
    import torch
    from torchrec import EmbeddingBagConfig
    from torchrec.distributed.planner import EmbeddingShardingPlanner as StockPlanner
    from torchrec.distributed.planner import Topology
    from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation

    from torchrec_compress import CompressedEmbeddingBagCollection
    from torchrec_compress.methods import DenseConfig, HashConfig, Int8Config, MECConfig, MEmComConfig, PQConfig
    from torchrec_compress.planner import EmbeddingShardingPlanner
    from torchrec_compress.planner.advice import InsufficientStorageError
    from torchrec_compress.sharding import get_default_sharders

    kinds = [
        MECConfig(num_codes=8),
        PQConfig(num_codes=4, num_hot_rows=1000),
        Int8Config(),
        MEmComConfig(num_buckets=10_000),
        HashConfig(num_buckets=10_000),
        DenseConfig(),
    ]
    start = time.process_time()
    names = [f"t{n}" for n in range(num_tables)]
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=200_000_000 if n % 6 < 5 else 2_000_000,
            embedding_dim=64,
            feature_names=[name],
        )
        for n, name in enumerate(names)
    ]
    methods = {name: kinds[n % 6] for n, name in enumerate(names)}
    model = torch.nn.ModuleDict(
        {"sparse": CompressedEmbeddingBagCollection(tables, torch.device("meta"), compression=methods)}
    )
    built = time.process_time() - start
    machines = Topology(
        world_size=world_size, local_world_size=8, compute_device="cuda", hbm_cap=hbm * 2**30, ddr_cap=256 * 2**30
    )
    reservation = FixedPercentageStorageReservation(0.15)
    start, most = time.process_time(), ""
    if stock:
        planner = StockPlanner(
            machines, batch_size=4096, storage_reservation=reservation, stats=[], timeout_seconds=limit
        )
        planner.plan(model, get_default_sharders())
    else:
        kept = EmbeddingShardingPlanner(machines, 4096, storage_reservation=reservation, stats=[])
        try:
            kept.plan(model)
            assert kept.report is not None
            most = f"{max(rank.device_bytes for rank in kept.report.ranks) / 2**30:.1f}"
        except InsufficientStorageError as error:
            most = f"none fits; advice for {len(error.advice.changes)} tables"
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    name = "TorchRec" if stock else "ours"
    print(f"| {name} | {num_tables} | {world_size} | {built:.2f} | {seconds:.1f} | {memory:.1f} | {most} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", type=int, nargs="+", default=[26, 100, 1000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--hbm", type=int, default=1024, help="GiB of a rank")
    parser.add_argument("--stock", action="store_true", help="TorchRec's own planner, estimators and proposers")
    parser.add_argument("--limit", type=int, default=120, help="seconds after which TorchRec's planner stops searching")
    parser.add_argument("--choose", action="store_true", help="among six ways for each table, in this process")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.choose:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        for num_tables in given.tables:
            choose(num_tables, given.ranks[0])
        return
    if given.one:
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
        one(given.tables[0], given.ranks[0], given.hbm, given.stock, given.limit)
        return
    print(f"Methods in turn: {METHODS}.\n")
    print("| planner | tables | ranks | model, s | plan, CPU s | memory, GiB | fullest rank, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for num_tables in given.tables:
        for world_size in given.ranks:
            case = {"tables": num_tables, "ranks": world_size, "hbm": given.hbm, "limit": given.limit}
            options = [f"--{key}={value}" for key, value in case.items()]
            command = [sys.executable, __file__, "--one", *options, *(["--stock"] if given.stock else [])]
            done = subprocess.run(command, check=False)
            if done.returncode:
                print(f"| | {num_tables} | {world_size} | | no plan | | |", flush=True)


if __name__ == "__main__":
    main()
