"""Examples: the embedded generator, Parquet, Criteo."""

from torchrec_compress.train.config import DataConfig
from torchrec_compress.train.data.dataset import Batch, Batches, Dataset, Split

__all__ = ["Batch", "Batches", "Dataset", "Split", "load"]


def load(config: DataConfig) -> Dataset:
    """Read or make the data set that a config asks for.

    Example:
        >>> len(load(DataConfig(num_examples=1000)).test)
        100
    """
    if config.source == "synthetic":
        from torchrec_compress.train.data.synthetic import synthetic

        return synthetic(config.num_examples, config.seed)
    if config.source == "parquet":
        from torchrec_compress.train.data.parquet import parquet

        return parquet(config)
    if config.source == "criteo":
        from torchrec_compress.train.data.criteo import criteo

        return criteo(config)
    raise ValueError(f"data.source: must be 'synthetic', 'parquet' or 'criteo', got {config.source!r}")
