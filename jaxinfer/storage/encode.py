"""Arrays as bytes: as they are, in fewer bits, or without their zeros, whichever is smallest. Nothing is rounded.

An encoding is a description in JSON types and a few named parts. ``plain`` is the array itself. ``packed`` writes
integers as what they exceed the smallest by, in as many bits as the largest of those needs: a mask takes one bit, int4
at most four, and so do int8 values that were quantized to 16 levels. ``sparse`` writes the elements whose bits are not
all zero (−0.0 is such an element), and where they stand: as a bitmap, or as an Elias–Fano list, which takes two bits
for each element and the logarithm of the distance between them.

Reference: Elias 1974, Efficient Storage and Retrieval by Content and Address of Static Files; Fano 1971.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.storage.container import StorageError

# Smaller than this an array is written as it is.
_SMALL_BYTES = 64
# An encoding is worth its decoding from this part of the plain size on.
_WORTH = 0.9
# Elements of which bits are moved at a time; a multiple of eight.
_BLOCK = 1 << 16
_WIDEST = 32

# What readers of safetensors call the element types they know.
FOREIGN_NAMES = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@dataclass(frozen=True, eq=False)
class Encoded:
    """An array ready to be written.

    Attributes:
        how: the encoding, in JSON types.
        parts: what :func:`decode` asks for, by name.
    """

    how: dict[str, Any]
    parts: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())


def encode(array: np.ndarray) -> Encoded:
    """The smallest encoding of an array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    plain = Encoded({"kind": "plain"}, {"": flat})
    # Types of less than a byte have no place in other readers, nor any use for the rest of theirs.
    narrow = flat.dtype.name not in FOREIGN_NAMES
    if flat.nbytes < _SMALL_BYTES and not narrow:
        return plain
    dense = _dense(flat)
    sparse = _sparse(flat, dense.nbytes)
    best = min((plain, dense, *([sparse] if sparse else [])), key=lambda e: e.nbytes)
    return best if best.nbytes <= _WORTH * plain.nbytes else plain


def decode(how: Mapping[str, Any], part: Callable[[str], np.ndarray], count: int, dtype: np.dtype) -> np.ndarray:
    """The array that was encoded, flat.

    Args:
        how: the encoding.
        part: gives the bytes of a part by its name.
        count: how many elements the array has.
        dtype: their type.

    Raises:
        StorageError: if the encoding is unknown or its parts do not fit.
    """
    kind = how["kind"]
    try:
        if kind == "plain":
            return part("").view(dtype).reshape(count)
        if kind == "packed":
            return _unpack(part("packed"), count, how["bits"], how["offset"], dtype)
        if kind == "sparse":
            number = how["nonzeros"]
            positions = _POSITIONS[how["positions"]["kind"]](how["positions"], part, number)
            array = np.zeros(count, _unsigned(dtype))
            values = decode(how["values"], lambda name: part(f"values.{name}" if name else "values"), number, dtype)
            array[positions] = values.view(array.dtype)
            return array.view(dtype)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"an array does not fit its encoding {dict(how)}: {error}") from error
    raise StorageError(f"arrays are encoded as {kind!r}, which this release does not know: upgrade jaxinfer")


# -- fewer bits -------------------------------------------------------------------------------------------------------


def _dense(flat: np.ndarray) -> Encoded:
    """Every element, in fewer bits where it is an integer or no wider than a byte."""
    if flat.size and (_integer(flat.dtype) or flat.itemsize == 1):
        wide = _as_integers(flat)
        low, high = int(wide.min()), int(wide.max())
        bits = (high - low).bit_length()
        if bits <= min(_WIDEST, 8 * flat.itemsize - 1):
            unsigned = _unsigned(wide.dtype)
            codes = wide.view(unsigned) - _modulo(low, unsigned)
            return Encoded({"kind": "packed", "bits": bits, "offset": low}, {"packed": pack_bits(codes, bits)})
    return Encoded({"kind": "plain"}, {"": flat})


def _unpack(data: np.ndarray, count: int, bits: int, offset: int, dtype: np.dtype) -> np.ndarray:
    unsigned = _unsigned(dtype)
    codes = unpack_bits(data, count, bits, unsigned) + _modulo(offset, unsigned)
    if dtype == np.bool_ or not _integer(dtype):
        return codes.view(dtype)
    return codes.view(_standard(dtype)).astype(dtype, copy=False)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned integers one after the other, each in ``bits`` bits, the lowest first; bytes, filled up with zeros."""
    if not bits or not codes.size:
        return np.empty(0, np.uint8)
    shifts = np.arange(bits, dtype=codes.dtype)
    blocks = [
        np.packbits(((codes[i : i + _BLOCK, None] >> shifts) & 1).astype(np.uint8).reshape(-1), bitorder="little")
        for i in range(0, codes.size, _BLOCK)
    ]
    return np.concatenate(blocks)


def unpack_bits(data: np.ndarray, count: int, bits: int, dtype: np.dtype) -> np.ndarray:
    """The ``count`` numbers that :func:`pack_bits` packed, as integers of a type."""
    codes = np.zeros(count, dtype)
    if data.size != -(-count * bits // 8):
        raise ValueError(f"{count} numbers of {bits} bits do not take {data.size} bytes")
    for i in range(0, count if bits else 0, _BLOCK):
        size = min(_BLOCK, count - i)
        start = i * bits // 8
        stream = np.unpackbits(data[start : start - (-size * bits // 8)], count=size * bits, bitorder="little")
        for j in range(bits):
            codes[i : i + size] |= stream[j::bits].astype(dtype) << dtype.type(j)
    return codes


def _integer(dtype: np.dtype) -> bool:
    return dtype == np.bool_ or bool(jnp.issubdtype(dtype, jnp.integer))


def _standard(dtype: np.dtype) -> np.dtype:
    """The type of NumPy's own that holds the numbers of an integer type."""
    return dtype if dtype.name in FOREIGN_NAMES else np.dtype(np.int8)


def _as_integers(flat: np.ndarray) -> np.ndarray:
    if flat.dtype == np.bool_ or not _integer(flat.dtype):
        return flat.view(np.uint8)
    return flat.astype(_standard(flat.dtype), copy=False)


def _modulo(number: int, unsigned: np.dtype) -> Any:
    """A number as arithmetic of a width sees it."""
    return unsigned.type(number % (1 << 8 * unsigned.itemsize))


# -- without zeros ----------------------------------------------------------------------------------------------------


def _sparse(flat: np.ndarray, enough: int) -> Encoded | None:
    """Positions and values of what is not zero; None where that takes more than ``enough`` bytes in any case."""
    bits = flat.view(_unsigned(flat.dtype))
    marks = bits["f0"] | bits["f1"] if bits.dtype.names else bits
    count, size = int(np.count_nonzero(marks)), flat.size
    low = max(0, (size // count).bit_length() - 1) if count else 0
    list_bytes = -(-count * low // 8) + (-(-(count + (size >> low)) // 8) if count else 0)
    if min(list_bytes, -(-size // 8)) + count // 8 > enough:
        return None
    where = np.flatnonzero(marks)
    values = _dense(flat[where])
    if list_bytes <= -(-size // 8):
        positions: dict[str, Any] = {"kind": "elias-fano", "low": low}
        parts = _write_list(where, size, low)
    else:
        positions, parts = {"kind": "bitmap"}, {"bitmap": np.packbits(_marks(where, size), bitorder="little")}
    parts.update({f"values.{name}" if name else "values": part for name, part in values.parts.items()})
    return Encoded({"kind": "sparse", "nonzeros": count, "positions": positions, "values": values.how}, parts)


def _write_list(where: np.ndarray, size: int, low: int) -> dict[str, np.ndarray]:
    """An Elias–Fano list: the high parts of ascending numbers in unary, the low ``low`` bits of each as they are."""
    if not where.size:
        return {}
    high = (where >> low) + np.arange(where.size)
    upper = np.packbits(_marks(high, where.size + (size >> low)), bitorder="little")
    return {"high": upper, **({"low": pack_bits(where & ((1 << low) - 1), low)} if low else {})}


def _read_list(how: Mapping[str, Any], part: Callable[[str], np.ndarray], count: int) -> np.ndarray:
    if not count:
        return np.empty(0, np.int64)
    low = how["low"]
    high = np.flatnonzero(np.unpackbits(part("high"), bitorder="little")) - np.arange(count)
    return (high << low) + (unpack_bits(part("low"), count, low, np.dtype(np.int64)) if low else 0)


def _read_bitmap(how: Mapping[str, Any], part: Callable[[str], np.ndarray], count: int) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(part("bitmap"), bitorder="little"))


_POSITIONS = {"elias-fano": _read_list, "bitmap": _read_bitmap}


def _marks(where: np.ndarray, size: int) -> np.ndarray:
    marks = np.zeros(size, np.uint8)
    marks[where] = 1
    return marks


def _unsigned(dtype: np.dtype) -> np.dtype:
    """A type of the same width to look at bits with."""
    return np.dtype("u8,u8" if dtype.itemsize == 16 else f"u{dtype.itemsize}")


# -- zstd -------------------------------------------------------------------------------------------------------------


def squeeze(encoded: Encoded, level: int = 19) -> Encoded:
    """Puts the parts of an encoded array through zstd where that makes them smaller.

    Raises:
        StorageError: if the package for it is missing.
    """
    compressor = zstd().ZstdCompressor(level=level)
    parts, sizes = {}, {}
    for name, part in encoded.parts.items():
        data = compressor.compress(np.ascontiguousarray(part).reshape(-1).view(np.uint8))
        if len(data) <= _WORTH * part.nbytes:
            parts[name], sizes[name] = np.frombuffer(data, np.uint8), part.nbytes
        else:
            parts[name] = part
    return Encoded({**encoded.how, "zstd": sizes}, parts) if sizes else encoded


def loosen(data: np.ndarray, size: int) -> np.ndarray:
    """The ``size`` bytes that :func:`squeeze` compressed.

    Raises:
        StorageError: if the package for it is missing, or the data are something else.
    """
    module = zstd()
    try:
        return np.frombuffer(bytearray(module.ZstdDecompressor().decompress(data, max_output_size=size)), np.uint8)
    except module.ZstdError as error:
        raise StorageError(f"a compressed array cannot be decompressed: {error}") from error


def zstd() -> Any:
    """The package for zstd."""
    try:
        import zstandard
    except ImportError as error:
        raise StorageError('zstd needs a package: pip install "jaxinfer[zstd]"') from error
    return zstandard
