"""Criteo's click logs: NumPy files as TorchRec's own data set reads them, or the TSV that its converter takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torchrec.datasets.criteo import (
    CAT_FEATURE_COUNT,
    DEFAULT_CAT_NAMES,
    INT_FEATURE_COUNT,
    BinaryCriteoUtils,
    InMemoryBinaryCriteoIterDataPipe,
)

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data import ClickData, Split

_KINDS = ("dense", "sparse", "labels")


def read_criteo(config: DataConfig) -> ClickData:
    """Read Criteo's files.

    A TSV (the Kaggle or the one-terabyte set) is converted once by TorchRec's `tsv_to_npys`, into a folder beside it.
    A folder must hold `*_dense.npy`, `*_sparse.npy` and `*_labels.npy`, as `InMemoryBinaryCriteoIterDataPipe` reads.

    Args:
        config: path, hash_size or contiguous ids, and the shares of the drawn split.

    Returns:
        26 id features and 13 dense ones, the latter as log(x + 4) where the files hold raw counts.

    Raises:
        ValueError: files that are missing, empty or of the wrong shape, NaN, negative ids, labels other than 0 and 1.
    """
    path = Path(str(config.path))
    folder = path if path.is_dir() else _convert(path)
    paths = {kind: sorted(str(file) for file in folder.glob(f"*_{kind}.npy")) for kind in _KINDS}
    if not paths["dense"] or len({len(files) for files in paths.values()}) != 1:
        raise ValueError(
            f"{folder}: must hold as many *_dense.npy, *_sparse.npy and *_labels.npy files, got "
            f"{ {kind: len(files) for kind, files in paths.items()} }"
        )
    for file in paths["sparse"]:
        shape = np.load(file, mmap_mode="r").shape
        if len(shape) != 2 or shape[0] == 0 or shape[1] != CAT_FEATURE_COUNT:
            raise ValueError(f"{file}: must have rows of {CAT_FEATURE_COUNT} ids, got the shape {shape}")
    hashes = None if config.hash_size is None else [config.hash_size] * CAT_FEATURE_COUNT
    files = InMemoryBinaryCriteoIterDataPipe(
        "train", paths["dense"], paths["sparse"], paths["labels"], batch_size=1, rank=0, world_size=1, hashes=hashes
    )
    dense, ids = np.concatenate(files.dense_arrs).astype(np.float32), np.concatenate(files.sparse_arrs)
    labels = np.concatenate(files.labels_arrs).reshape(-1)
    _check(folder, dense, ids, labels)
    if dense.min() >= -3 and dense.max() > 50:  # raw counts, of which the Kaggle set has some at -3
        dense = np.log(dense + 4)
    return _split(config, dense, ids, labels)


def _convert(path: Path) -> Path:
    """Convert a TSV by TorchRec's own code and return the folder of the NumPy files."""
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"data.path: must be a folder of NumPy files or a TSV with rows, got {str(path)!r}")
    folder = path.with_name(path.name + ".npy")
    outputs = {kind: folder / f"rows_{kind}.npy" for kind in _KINDS}
    if not all(file.is_file() for file in outputs.values()):
        folder.mkdir(exist_ok=True)
        parts = {kind: folder / f"part_{kind}" for kind in _KINDS}  # renamed when whole
        # its "criteo_kaggle" is the unlabelled test file; the labelled Kaggle file has the same columns as the 1 TB set
        BinaryCriteoUtils.tsv_to_npys(str(path), *(str(parts[kind]) for kind in _KINDS), dataset_name="criteo_1tb")
        for kind in _KINDS:
            parts[kind].rename(outputs[kind])
    return folder


def _check(folder: Path, dense: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> None:
    if not len(dense) == len(ids) == len(labels):
        raise ValueError(f"{folder}: files must have equally many rows, got {len(dense)}, {len(ids)}, {len(labels)}")
    if dense.shape[1] != INT_FEATURE_COUNT:
        raise ValueError(f"{folder}: must have {INT_FEATURE_COUNT} dense columns, got {dense.shape[1]}")
    if not np.isfinite(dense).all():
        raise ValueError(f"{folder}: dense values must be finite, got NaN or infinity")
    if ids.min() < 0:
        raise ValueError(f"{folder}: ids must not be negative, got {ids.min()}; set data.hash_size for hashed ids")
    if not set(np.unique(labels).tolist()) <= {0, 1}:
        raise ValueError(f"{folder}: labels must be 0 or 1, got {np.unique(labels)[:5].tolist()}")


def _split(config: DataConfig, dense: np.ndarray, ids: np.ndarray, labels: np.ndarray) -> ClickData:
    """Draw the split and make it tensors."""
    size = config.hash_size
    vocab = [size if size else config.vocab.get(n, int(ids[:, i].max()) + 1) for i, n in enumerate(DEFAULT_CAT_NAMES)]
    over = [name for i, name in enumerate(DEFAULT_CAT_NAMES) if int(ids[:, i].max()) >= vocab[i]]
    if over:
        raise ValueError(f"data.vocab: must be over the largest id, but columns {over} have bigger ids")
    rng = np.random.default_rng(config.split_seed)
    if config.subsample < 1:
        kept = rng.random(len(labels)) < config.subsample
        dense, ids, labels = dense[kept], ids[kept], labels[kept]
    number = np.searchsorted(np.cumsum(config.fractions), rng.random(len(labels)), side="right")
    parts = []
    for split in range(3):
        rows = np.flatnonzero(number == split)
        if len(rows) == 0:
            raise ValueError(f"data.path: every split must have rows, got {len(labels)} rows in all")
        parts.append(
            Split(
                torch.from_numpy(ids[rows].astype(np.int32)),
                torch.from_numpy(labels[rows].astype(np.float32)),
                torch.from_numpy(dense[rows]),
            )
        )
    return ClickData(list(DEFAULT_CAT_NAMES), vocab, INT_FEATURE_COUNT, *parts)
