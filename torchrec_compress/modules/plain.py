"""`CompressedEmbedding` and `CompressedEmbeddingBag`: one compressed table that is called as PyTorch's own modules are.

Padding is a weight of zero or a row that is put in its place, never an id that is taken out: no shape depends on the
values of a batch, so that graphs are compiled and exported whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Literal, TypeGuard

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig, PoolingType
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_compress.methods import MethodConfig
from torchrec_compress.modules.collection import CompressedParts, as_device
from torchrec_compress.modules.decoder import bag_means
from torchrec_compress.modules.embedding import CompressedEmbeddingCollection
from torchrec_compress.modules.embedding_bag import CompressedEmbeddingBagCollection
from torchrec_compress.modules.footprint import Footprint
from torchrec_compress.ops import check_ids, check_offsets

torch.fx.wrap("batch_of_bags")
torch.fx.wrap("batch_of_ids")
torch.fx.wrap("finished_bags")
torch.fx.wrap("padded_rows")


@dataclass(frozen=True)
class Call:
    """How a module reads the tensors of a call.

    Args:
        name: of table and feature.
        where: names the module in errors.
        num_checked: ids must be below it; None where the collection looks at them.
        padding_idx: whose weight is zero, or None.
        mode: of bags.
        has_last: whether offsets end with the number of ids.
        is_weighted: whether the collection takes weights.
    """

    name: str
    where: str
    num_checked: int | None
    padding_idx: int | None = None
    mode: str = "sum"
    has_last: bool = False
    is_weighted: bool = False

    def check_type(self, name: str, numbers: Tensor) -> None:
        """Raise ValueError unless ids or offsets are of a type that kernels read."""
        if not isinstance(numbers, Tensor):
            raise ValueError(f"{self.where}: {name} must be a tensor, got {type(numbers).__name__}")
        if numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{self.where}: {name} must be int32 or int64, got {numbers.dtype}; call {name}.long()")

    def check_range(self, ids: Tensor) -> Tensor:
        """Return ids, (L,), or raise ValueError where one is out of range that nobody else looks at."""
        where = f"table {self.name!r}, feature {self.name!r}"
        return ids if self.num_checked is None else check_ids(ids, self.num_checked, where)


class _OneTable(nn.Module):
    """What both modules are: a collection of one table, which a feature of its name looks up, and a padding row."""

    padding_row: Tensor | None

    def __init__(self, collection: CompressedParts, padding_idx: int | None, device: torch.device | None) -> None:
        super().__init__()
        (table,) = collection.blueprint.tables
        self.collection = collection
        self.num_embeddings: int = table.num_embeddings
        self.embedding_dim: int = table.embedding_dim
        self.padding_idx = padding_idx
        self.name: str = table.name
        row = torch.zeros(self.embedding_dim, dtype=torch.float32, device=device)
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
        """The whole decoded table, (N, D) float32, made anew at each reading; with `padding_row` at `padding_idx`.

        For models that score all items, as `hidden @ item_embedding.weight.T`: read it once a batch, and not at all
        where a table is too large to be held. Gradients flow to what the method trains by them, never to the padding
        row, nor to rows that train in the backward of their look-up alone (`NarrowConfig(bits=8)`); managers count
        look-ups alone. Writing to it changes nothing.

        Raises:
            ValueError: the table is sharded.
        """
        ids = torch.arange(self.num_embeddings, device=self.collection.decoder.get_buffer("layout").device)
        rows = self.collection.table_rows(self.name, ids).float()
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

    Attributes:
        collection: the `CompressedEmbeddingCollection` of the one table.
        padding_row: buffer, (D,) float32, zeros at first; None without a padding id.

    Shapes: ids of any shape S, int32 or int64; the output is (*S, D) float32.

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
    ) -> None:
        where = type(self).__name__
        _check_table(num_embeddings, embedding_dim, compression, where)
        padding = _padding_id(padding_idx, num_embeddings, where)
        placed = as_device(device, where)
        table = EmbeddingConfig(
            name=name, num_embeddings=num_embeddings, embedding_dim=embedding_dim, feature_names=[name]
        )
        collection = CompressedEmbeddingCollection(
            [table], placed, compression=compression, seed=seed, will_fit=will_fit
        )
        super().__init__(collection, padding, placed)

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows of ids of any shape S, (*S, D)."""
        features = batch_of_ids(input, self._call)
        return padded_rows(self.collection(features)[self.name].values(), input, self.padding_row, self.padding_idx)


class CompressedEmbeddingBag(_OneTable):
    """Look up sums or means of bags of rows of one compressed table: called as `torch.nn.EmbeddingBag` is.

    Rows start as the method's do (uniform in +-1 / sqrt(N) where it stores any), not from a normal distribution.

    Args:
        num_embeddings: N, rows of the table.
        embedding_dim: D, their width.
        mode: "sum" or "mean". "max" is refused: rows are pooled before they are decoded, which must be linear.
        padding_idx: id that is left out of bags, and of what means are divided by; negative ones count from the end.
        include_last_offset: whether offsets end with the number of ids.
        compression, name, device, seed, will_fit: as for `CompressedEmbedding`.

    Attributes:
        collection: the `CompressedEmbeddingBagCollection` of the one table.
        padding_row: buffer, (D,) float32, zeros at first: what `weight` holds for the padding id; no bag reads it.

    Shapes: ids, int32 or int64, are (B, N), or (L,) with offsets (B,), (B + 1,) where they include the last; weights
        are of the ids' shape and any float dtype, taken as float32. The output is (B, D) float32; an empty bag is
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
    ) -> None:
        where = type(self).__name__
        _check_table(num_embeddings, embedding_dim, compression, where)
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
            pooling=PoolingType.MEAN if is_mean else PoolingType.SUM,
        )
        collection = CompressedEmbeddingBagCollection(
            [table], placed, is_weighted=not is_mean, compression=compression, seed=seed, will_fit=will_fit
        )
        super().__init__(collection, padding, placed)
        self.mode, self.include_last_offset = mode, include_last_offset
        self._call = replace(self._call, mode=mode, has_last=include_last_offset, is_weighted=not is_mean)

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return the bags of ids, (B, N), or (L,) cut at offsets, as (B, D)."""
        features = batch_of_bags(input, offsets, per_sample_weights, self._call)
        return finished_bags(self.collection(features).values(), features, input, offsets, self._call)

    def extra_repr(self) -> str:
        """Return what the module's line of text says, as PyTorch's do, and its method."""
        last = ", include_last_offset=True" if self.include_last_offset else ""
        return f"{super().extra_repr()}, mode={self.mode!r}{last}"


def batch_of_ids(ids: Tensor, call: Call) -> KeyedJaggedTensor:
    """Return ids of any shape as one bag of one feature: to unpooled rows, bags mean nothing.

    Raises:
        ValueError: they are no integers, or one is out of range.
    """
    call.check_type("input", ids)
    flat = call.check_range(ids.reshape(-1))
    return _one_feature(call.name, flat, None, torch.arange(2, device=ids.device) * flat.shape[0])


def batch_of_bags(ids: Tensor, offsets: Tensor | None, weights: Tensor | None, call: Call) -> KeyedJaggedTensor:
    """Return bags as a batch of one feature; where there are none, a batch of one empty bag.

    Args:
        ids: (B, N), or (L,) with offsets.
        offsets: (B,), or (B + 1,) where they include the last; or None.
        weights: of the ids' shape, or None; a padding id's becomes zero.
        call: how the module reads them.

    Raises:
        ValueError: they do not go together, or an id is out of range.
    """
    _check_bags(ids, offsets, weights, call)
    flat = call.check_range(ids.reshape(-1))
    if offsets is None:
        offsets = torch.arange(ids.shape[0] + 1, device=ids.device) * ids.shape[1]
    else:
        end = torch.full((0 if call.has_last else 1,), flat.shape[0], dtype=offsets.dtype, device=offsets.device)
        offsets = torch.cat([offsets, end])
        check_offsets(offsets, flat.shape[0], call.where)
    if offsets.shape[0] == 1:  # TorchRec's own tables fail on a batch of no bags
        offsets = torch.cat([offsets, offsets])
    if call.is_weighted:
        weights = torch.ones_like(flat, dtype=torch.float32) if weights is None else weights.reshape(-1)
        if call.padding_idx is not None:
            weights = weights.masked_fill(flat == call.padding_idx, 0.0)
    return _one_feature(call.name, flat, weights, offsets)


def finished_bags(
    pooled: Tensor, features: KeyedJaggedTensor, ids: Tensor, offsets: Tensor | None, call: Call
) -> Tensor:
    """Return the bags that were asked for, (B, D): means are divided by how many of their ids are no padding."""
    if call.mode == "mean" and call.is_weighted:
        kept = nn.functional.pad((features.values() != call.padding_idx).cumsum(0), (1, 0))
        pooled = bag_means(pooled, kept.index_select(0, features.offsets()).diff())
    num_bags = ids.shape[0] if offsets is None else offsets.shape[0] - int(call.has_last)
    return pooled if num_bags else pooled[:0]


def padded_rows(rows: Tensor, ids: Tensor, padding_row: Tensor | None, padding_idx: int | None) -> Tensor:
    """Return rows, (L, D), in the shape of their ids, (*S, D), with the padding row in place of a padding id's."""
    shaped = rows.reshape(*ids.shape, rows.shape[1])
    if padding_row is None:
        return shaped
    return torch.where((ids == padding_idx).unsqueeze(-1), padding_row.to(rows.dtype), shaped)


def _one_feature(name: str, ids: Tensor, weights: Tensor | None, offsets: Tensor) -> KeyedJaggedTensor:
    counts = {"stride": offsets.shape[0] - 1, "length_per_key": [ids.shape[0]], "offset_per_key": [0, ids.shape[0]]}
    # told how many ids there are, TorchRec asks no tensor: no device is waited for, no graph is cut
    return KeyedJaggedTensor([name], ids, weights, lengths=offsets.diff(), offsets=offsets, **counts)


def _check_bags(ids: Tensor, offsets: Tensor | None, weights: Tensor | None, call: Call) -> None:
    """Raise ValueError where `torch.nn.EmbeddingBag` would for the shapes of a batch, or for weights of means."""
    call.check_type("input", ids)
    if ids.dim() not in (1, 2):
        raise ValueError(f"{call.where}: input must have 1 or 2 dimensions, got shape {list(ids.shape)}")
    if ids.dim() == 2 and offsets is not None:
        raise ValueError(
            f"{call.where}: offsets must be None with input of 2 dimensions, whose rows are the bags, got shape "
            f"{list(offsets.shape)}; leave them out, or flatten the input"
        )
    if ids.dim() == 1 and offsets is None:
        raise ValueError(
            f"{call.where}: offsets must be given with input of 1 dimension, got None; give where each bag begins, or "
            "input of 2 dimensions"
        )
    if offsets is not None:
        call.check_type("offsets", offsets)
        if offsets.dim() != 1:
            raise ValueError(f"{call.where}: offsets must have 1 dimension, got shape {list(offsets.shape)}")
    if weights is None:
        return
    if call.mode != "sum":
        raise ValueError(
            f"{call.where}: per_sample_weights must be None with mode {call.mode!r}, as in torch.nn.EmbeddingBag, got "
            f"shape {list(weights.shape)}; make the module with mode='sum'"
        )
    if weights.shape != ids.shape:
        raise ValueError(
            f"{call.where}: per_sample_weights must have the shape of input, {list(ids.shape)}, got "
            f"{list(weights.shape)}; give one per id"
        )


def _check_table(num_embeddings: object, embedding_dim: object, compression: object, where: str) -> None:
    if not isinstance(compression, MethodConfig):
        raise ValueError(
            f"{where}: compression must be one method, such as PQConfig(num_codes=8), got {compression!r}; give the "
            "method of this table alone"
        )
    for name, size in (("num_embeddings", num_embeddings), ("embedding_dim", embedding_dim)):
        if not _is_int(size) or size < 1:
            raise ValueError(f"{where}: {name} must be an int of at least 1, got {size!r}")


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
