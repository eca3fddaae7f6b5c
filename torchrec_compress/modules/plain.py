"""`CompressedEmbedding` and `CompressedEmbeddingBag`: one compressed table, called as PyTorch's own modules are."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType, dtype_to_data_type

from torchrec_compress.methods import MethodConfig
from torchrec_compress.modules.collection import CompressedParts, as_device
from torchrec_compress.modules.embedding import CompressedEmbeddingCollection
from torchrec_compress.modules.embedding_bag import CompressedEmbeddingBagCollection
from torchrec_compress.modules.footprint import Footprint
from torchrec_compress.modules.plain_calls import Call, batch_of_bags, batch_of_ids, finished_bags, padded_rows

torch.fx.wrap("batch_of_bags")
torch.fx.wrap("batch_of_ids")
torch.fx.wrap("finished_bags")
torch.fx.wrap("padded_rows")


class _OneTable(nn.Module):
    """What both modules are: a collection of one table, which a feature of its name looks up, and a padding row."""

    padding_row: Tensor | None

    def __init__(
        self, collection: CompressedParts, padding_idx: int | None, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        (table,) = collection.blueprint.tables
        self.collection = collection
        self.dtype = dtype
        self.num_embeddings: int = table.num_embeddings
        self.embedding_dim: int = table.embedding_dim
        self.padding_idx = padding_idx
        self.name: str = table.name
        row = torch.zeros(self.embedding_dim, dtype=dtype, device=device)
        self.register_buffer("padding_row", None if padding_idx is None else row)
        # torch looks at the ids of a dense table, in its own words; all other parts do in ours
        num_checked = self.num_embeddings if collection.blueprint.parts[self.name].dense else None
        self._call = Call(self.name, f"{type(self).__name__} {self.name!r}", num_checked, padding_idx)

    @property
    def method(self) -> MethodConfig:
        """How the table is stored; dense where its method would not have saved bytes."""
        return self.collection.methods()[self.name]

    @property
    def weight(self) -> Tensor:
        """The whole decoded table, (N, D) of `dtype`, made anew at each reading; with `padding_row` at `padding_idx`.

        For models that score all items, as `hidden @ item_embedding.weight.T`: read it once a batch, and not at all
        where a table is too large to be held. Gradients flow to what the method trains by them, never to the padding
        row, nor to rows that train in the backward of their look-up alone (`NarrowConfig(bits=8)`); managers count
        look-ups alone. Writing to it changes nothing.

        Raises:
            ValueError: the table is sharded.
        """
        ids = torch.arange(self.num_embeddings, device=self.collection.decoder.get_buffer("layout").device)
        rows = self.collection.table_rows(self.name, ids).to(self.dtype)
        return padded_rows(rows, ids, self.padding_row, self.padding_idx)

    def reset_parameters(self) -> None:
        """Initialise everything, start codes included, and fill the padding row with zeros."""
        self.collection.reset_parameters()
        if self.padding_row is not None:
            self.padding_row.zero_()

    def footprint(self) -> Footprint:
        """Return the bytes of the table, the padding row's among those of the decoder; on the meta device too."""
        table = self.collection.footprint().tables[self.name]
        padding = 0 if self.padding_row is None else self.padding_row.nbytes
        return Footprint({self.name: replace(table, decoder_bytes=table.decoder_bytes + padding)})

    def extra_repr(self) -> str:
        """Return what the module's line of text says, as PyTorch's do, and its method."""
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        padding += "" if self.dtype == torch.float32 else f", dtype={self.dtype}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, name={self.name!r}, method={self.method}"


class CompressedEmbedding(_OneTable):
    """Look up rows of one compressed table: called as `torch.nn.Embedding` is.

    Rows start as the method's do (uniform in +-1 / sqrt(N) where it stores any), not from a normal distribution.

    Args:
        num_embeddings: N, rows of the table.
        embedding_dim: D, their width.
        padding_idx: id that is served `padding_row` and trains nothing; negative ones count from the end.
        compression: the method of the table. One that would not shrink it leaves it dense.
        name: of the table, in errors and state-dict keys; one that a module can have, so without ".".
        device: of all tensors, default CPU; "meta" allocates nothing.
        seed: of start codes and hashes, which are a pure function of (seed, name, id).
        will_fit: whether the caller fits the table next: one that needs a fit stays empty until it comes.
        dtype: of the output, float32 (default), float16 or bfloat16; float16 is also what rows that lie in a table of
            TorchRec's are stored as (hashed, shared, narrow, dense), which cannot hold bfloat16 ones.

    Attributes:
        collection: the `CompressedEmbeddingCollection` of the one table.
        padding_row: buffer, (D,) of dtype, zeros at first; None without a padding id.

    Shapes: ids of any shape S, int32 or int64; the output is (*S, D) of dtype, whatever parameters are cast to.

    Raises:
        ValueError: bad arguments at construction; at forward ids of another type, or an id out of range.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> embedding = CompressedEmbedding(10_000, 64, padding_idx=0, compression=PQConfig(num_codes=4))
        >>> rows = embedding(torch.tensor([[3, 99], [7, 0]]))
        >>> rows.shape, bool(rows[1, 1].any()), embedding.weight.shape
        (torch.Size([2, 2, 64]), False, torch.Size([10000, 64]))
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        compression: MethodConfig,
        name: str = "embedding",
        device: torch.device | str | None = None,
        seed: int = 0,
        will_fit: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        _check_table(num_embeddings, embedding_dim, compression, where)
        kind = _checked_dtype(dtype, where)
        padding = _padding_id(padding_idx, num_embeddings, where)
        placed = as_device(device, where)
        table = EmbeddingConfig(
            name=name,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            feature_names=[name],
            data_type=dtype_to_data_type(kind),
        )
        collection = CompressedEmbeddingCollection(
            [table], placed, compression=compression, seed=seed, will_fit=will_fit
        )
        super().__init__(collection, padding, placed, kind)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ids of any shape S, (*S, D)."""
        features = batch_of_ids(input, self._call)
        rows = self.collection(features)[self.name].values().to(self.dtype)
        return padded_rows(rows, input, self.padding_row, self.padding_idx)


class CompressedEmbeddingBag(_OneTable):
    """Look up sums or means of bags of rows of one compressed table: called as `torch.nn.EmbeddingBag` is.

    Rows start as the method's do (uniform in +-1 / sqrt(N) where it stores any), not from a normal distribution.

    Args:
        num_embeddings: N, rows of the table.
        embedding_dim: D, their width.
        mode: "sum" or "mean". "max" is refused: rows are pooled before they are decoded, which must be linear.
        padding_idx: id that is left out of bags, and of what means are divided by; negative ones count from the end.
        include_last_offset: whether offsets end with the number of ids.
        compression, name, device, seed, will_fit, dtype: as for `CompressedEmbedding`; sums are float32 until cast.

    Attributes:
        collection: the `CompressedEmbeddingBagCollection` of the one table.
        padding_row: buffer, (D,) of dtype, zeros at first: what `weight` holds for the padding id; no bag reads it.

    Shapes: ids, int32 or int64, are (B, N), or (L,) with offsets (B,), (B + 1,) where they include the last; weights
        are of the ids' shape and any float dtype, taken as float32. The output is (B, D) of dtype; an empty bag is
        zeros.

    Raises:
        ValueError: bad arguments at construction; at forward wrong types or shapes, weights of means, a weight that is
            not finite, an id out of range, offsets that decrease or do not run from 0 to L.

    Example:
        >>> from torchrec_compress.methods import PQConfig
        >>> bags = CompressedEmbeddingBag(10_000, 64, mode="sum", compression=PQConfig(num_codes=4))
        >>> bags(torch.tensor([3, 99, 7]), torch.tensor([0, 2, 2])).shape, round(bags.footprint().ratio, 1)
        (torch.Size([3, 64]), 24.3)
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        mode: Literal["sum", "mean"] = "mean",
        padding_idx: int | None = None,
        include_last_offset: bool = False,
        *,
        compression: MethodConfig,
        name: str = "embedding",
        device: torch.device | str | None = None,
        seed: int = 0,
        will_fit: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        _check_table(num_embeddings, embedding_dim, compression, where)
        kind = _checked_dtype(dtype, where)
        _check_mode(mode, where)
        padding = _padding_id(padding_idx, num_embeddings, where)
        placed = as_device(device, where)
        # a mean that leaves ids out is a weighted sum, divided behind it
        is_mean = mode == "mean" and padding is None
        table = EmbeddingBagConfig(
            name=name,
            num_embeddings=num_embeddings,
            embedding_dim=embedding_dim,
            feature_names=[name],
            data_type=dtype_to_data_type(kind),
            pooling=PoolingType.MEAN if is_mean else PoolingType.SUM,
        )
        collection = CompressedEmbeddingBagCollection(
            [table], placed, is_weighted=not is_mean, compression=compression, seed=seed, will_fit=will_fit
        )
        super().__init__(collection, padding, placed, kind)
        self.mode, self.include_last_offset = mode, include_last_offset
        self._call = replace(self._call, mode=mode, has_last=include_last_offset, is_weighted=not is_mean)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the bags of ids, (B, N), or (L,) cut at offsets, as (B, D)."""
        features = batch_of_bags(input, offsets, per_sample_weights, self._call)
        bags = finished_bags(self.collection(features).values(), features, input, offsets, self._call)
        return bags.to(self.dtype)

    def extra_repr(self) -> str:
        """Return what the module's line of text says, as PyTorch's do, and its method."""
        last = ", include_last_offset=True" if self.include_last_offset else ""
        return f"{super().extra_repr()}, mode={self.mode!r}{last}"


def _check_table(num_embeddings: object, embedding_dim: object, compression: object, where: str) -> None:
    if not isinstance(compression, MethodConfig):
        raise ValueError(
            f"{where}: compression must be one method, such as PQConfig(num_codes=8), got {compression!r}; give the "
            "method of this table alone"
        )
    for name, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
        if not _is_int(size) or size < 1:
            raise ValueError(f"{where}: {name} must be an int of at least 1, got {size!r}")


def _checked_dtype(dtype: torch.dtype | None, where: str) -> torch.dtype:
    if dtype not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{where}: dtype must be float32, float16 or bfloat16, got {dtype!r}; cast what it returns")
    return torch.float32 if dtype is None else dtype


def _check_mode(mode: object, where: str) -> None:
    if mode not in ("sum", "mean"):
        raise ValueError(
            f"{where}: mode must be 'sum' or 'mean', got {mode!r}; rows are pooled before they are decoded, which must "
            "be linear: for a maximum look rows up by CompressedEmbedding and take rows.amax(dim=1)"
        )


def _padding_id(padding_idx: int | None, num_embeddings: int, where: str) -> int | None:
    """Return a padding id in [0, N), or None."""
    if padding_idx is None:
        return None
    if not _is_int(padding_idx) or not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"{where}: padding_idx must be None or an int in [-{num_embeddings}, {num_embeddings}), got {padding_idx!r}"
        )
    return int(padding_idx) % num_embeddings


def _is_int(number: object) -> TypeGuard[int]:
    return isinstance(number, Integral) and not isinstance(number, bool)
