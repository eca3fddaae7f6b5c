"""Criteo's click logs in the NumPy files that TorchRec's own scripts make of the TSV."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchrec.datasets.criteo import CAT_FEATURE_COUNT, DEFAULT_CAT_NAMES, INT_FEATURE_COUNT, BinaryCriteoUtils

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.dataset import Dataset, Split


def criteo(config: DataConfig) -> Dataset:
    """Read Criteo day files: `*_dense.npy`, `*_sparse.npy`, `*_labels.npy` as TorchRec's converter writes them.

    A TSV file beside them without its NumPy files is converted first, by TorchRec's `BinaryCriteoUtils.tsv_to_npys`.
    Sparse values are hashed feature values: they are re-numbered per feature by first appearance. Dense values are
    log(x + 3) as TorchRec leaves them. The last tenth of the rows is test, the tenth before it validation.

    Args:
        config: `path` is the folder.

    Returns:
        26 features and 13 dense ones, in memory.

    Raises:
        ValueError: no files, or arrays that do not fit together.
    """
    folder = Path(config.path)
    where = f"data.path {config.path!r}"
    for tsv in sorted(folder.glob("*.tsv")):
        paths = [tsv.with_name(f"{tsv.stem}_{part}.npy") for part in ("dense", "sparse", "labels")]
        if not all(path.exists() for path in paths):
            BinaryCriteoUtils.tsv_to_npys(str(tsv), *map(str, paths))
    stems = sorted(path.name.removesuffix("_sparse.npy") for path in folder.glob("*_sparse.npy"))
    if not stems:
        raise ValueError(f"{where}: must hold Criteo *.tsv or *_dense/_sparse/_labels.npy files, found none")
    arrays = {
        part: np.concatenate([np.load(folder / f"{stem}_{part}.npy", mmap_mode="r") for stem in stems])
        for part in ("dense", "sparse", "labels")
    }
    sparse, dense, labels = arrays["sparse"], arrays["dense"], arrays["labels"].reshape(-1)
    if sparse.shape[1:] != (CAT_FEATURE_COUNT,) or dense.shape[1:] != (INT_FEATURE_COUNT,):
        raise ValueError(f"{where}: must have 26 sparse and 13 dense columns, got {sparse.shape} and {dense.shape}")
    if not len(labels) == len(sparse) == len(dense) or not len(labels):
        raise ValueError(f"{where}: all parts must have equally many rows, got {len(labels)}, {len(sparse)}, {len(dense)}")
    ids, vocab = np.empty((CAT_FEATURE_COUNT, len(labels)), dtype=np.int32), {}
    for number, name in enumerate(DEFAULT_CAT_NAMES):
        values, ids[number] = np.unique(sparse[:, number], return_inverse=True)
        vocab[name] = len(values)
    bounds = (0, int(len(labels) * 0.8), int(len(labels) * 0.9), len(labels))
    splits = [
        Split(
            torch.from_numpy(ids[:, first:last].copy()),
            torch.from_numpy(dense[first:last].astype(np.float32)),
            torch.from_numpy(labels[first:last].astype(np.float32)),
            None,
        )
        for first, last in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    return Dataset(list(DEFAULT_CAT_NAMES), vocab, *splits)
