"""Where the bytes of a tensor lie in a zip archive of torch's inside another file; nothing that it names is called."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, BinaryIO, NamedTuple

import torch

_LOCAL_HEADER = 30  # bytes, before a name and an extra field of any length
_SMALL = 1 << 20  # of a pickle that describes one tensor


# torch's own names of storages by type; the attributes of its classes warn that they are old
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class Found(NamedTuple):
    """A contiguous tensor.

    Attributes:
        start: of its bytes in the file.
        dtype, shape: of it.
    """

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class _Piece(io.RawIOBase):
    """A part of a file, to be read only."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the part."""
        self._at = max(0, offset + {0: 0, 1: self._at, 2: self._length}[whence])
        return self._at

    def tell(self) -> int:
        """Return the place in the part."""
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return bytes, none behind the end of the part."""
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        found = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(found)
        return found


class _Storage(NamedTuple):
    key: str
    dtype: torch.dtype | None
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype | None


class _Unpickler(pickle.Unpickler):
    """An unpickler of the description of one tensor; all that is called is in this file."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v3")):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name == "UntypedStorage":
            return None  # its numbers are bytes; the tensor says the type
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"must not name {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"must name a storage, got {kind!r}")
        return _Storage(str(key), dtype, int(numel))


def _tensor(storage: _Storage, offset: int, shape: Any, stride: Any, *rest: Any) -> _Tensor:
    dtype = rest[2] if len(rest) > 2 and isinstance(rest[2], torch.dtype) else storage.dtype
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, stride)), dtype)


def _parameter(data: _Tensor, *_: Any) -> _Tensor:
    return data


def find_tensor(file: BinaryIO, start: int, length: int) -> Found:
    """Return where a tensor lies that torch.save wrote into a part of a file.

    Args:
        file: opened.
        start, length: of the part.

    Raises:
        ValueError: the part is cut short, or holds anything but one contiguous tensor.
    """
    try:
        with zipfile.ZipFile(_Piece(file, start, length)) as archive:  # type: ignore[arg-type]
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise ValueError("must be little-endian")
            if members["data.pkl"].file_size > _SMALL:
                raise ValueError("must describe one tensor")
            found = _Unpickler(io.BytesIO(archive.read(members["data.pkl"]))).load()
    except Exception as error:  # noqa: BLE001 (bytes of a stranger raise whatever they like)
        raise ValueError(f"must be a tensor that torch saved, got {type(error).__name__}: {error}") from None
    if not isinstance(found, _Tensor) or not isinstance(found.dtype, torch.dtype):
        raise ValueError(f"must be a tensor that torch saved, got {type(found).__name__}")
    numel, wanted = 1, []
    for size in reversed(found.shape):
        wanted.append(numel)
        numel *= size
    packed = all(size <= 1 or a == b for size, a, b in zip(found.shape, found.stride, reversed(wanted), strict=True))
    if numel and not packed:
        raise ValueError(
            f"must be a contiguous tensor, got strides {found.stride}; call contiguous() before it is saved"
        )
    info = members.get(f"data/{found.storage.key}")
    first, size = found.offset * found.dtype.itemsize, numel * found.dtype.itemsize
    if info is None or info.compress_type != zipfile.ZIP_STORED or found.offset < 0 or first + size > info.file_size:
        raise ValueError(f"must hold the {size} bytes of its tensor, got fewer or packed ones")
    file.seek(start + info.header_offset)
    header = file.read(_LOCAL_HEADER)
    skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    at = info.header_offset + _LOCAL_HEADER + skipped + first
    if at + size > length:
        raise ValueError(f"must hold the {size} bytes of its tensor, got fewer")
    return Found(start + at, found.dtype, found.shape)
