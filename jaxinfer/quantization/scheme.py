"""Schemes as data: which arrays are stored or computed with in fewer bits, and how.

A :class:`Format` says how one array is written, a :class:`Scheme` which format weights and activations get, and an
:class:`Override` what is treated otherwise.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jaxinfer.quantization.observers import AbsMax, Observer

Number = Literal["int8", "int4", "fp8_e4m3", "fp8_e5m2", "bf16", "f16"]

_STORED = {
    "int8": "int8",
    "int4": "int4",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "bf16": "bfloat16",
    "f16": "float16",
}
_BITS = {"int8": 8, "int4": 4}


class SchemeError(ValueError):
    """A scheme that contradicts itself, or that does not fit the program it was given for."""


@dataclass(frozen=True)
class Group:
    """One scale for so many entries that are summed one after the other, in each channel.

    Attributes:
        size: how many; the last group of an axis may be smaller.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SchemeError(f"Group({self.size}): a group has one entry at least")


@dataclass(frozen=True)
class Format:
    """How one array is written.

    Integers stand for ``scale * (values - zero_point)``, 8-bit floats for ``scale * values``, 16-bit floats for
    themselves.

    Attributes:
        number: type of the values.
        per: what shares a scale: all of the array (``"tensor"``); of weights what goes into one channel of the result
            (``"channel"``), or a :class:`Group` of that; of activations what is multiplied with one column of the
            weights (``"token"``: a row of a product, an image of a convolution).
        affine: integers with a zero point, for values that are not symmetric about zero.
    """

    number: Number = "int8"
    per: Literal["tensor", "channel", "token"] | Group = "channel"
    affine: bool = False

    def __post_init__(self) -> None:
        if self.number not in _STORED:
            raise SchemeError(f"number={self.number!r}: choose one of {', '.join(_STORED)}")
        if not isinstance(self.per, Group) and self.per not in ("tensor", "channel", "token"):
            raise SchemeError(f"per={self.per!r}: choose 'tensor', 'channel', 'token' or Group(size)")
        if self.affine and not self.is_integer:
            raise SchemeError(f"affine: {self.number} is no integer and has no zero point")

    @property
    def is_integer(self) -> bool:
        """Whether values are integers."""
        return self.number in _BITS

    @property
    def has_scale(self) -> bool:
        """Whether values are scaled: all but 16-bit floats."""
        return self.number not in ("bf16", "f16")

    @property
    def bits(self) -> int:
        """Bits of one value."""
        return _BITS.get(self.number) or 8 * self.dtype.itemsize

    @property
    def dtype(self) -> np.dtype:
        """Element type of the values before they are packed; that of int4 is ``int8``."""
        return np.dtype(jnp.dtype("int8" if self.is_integer else _STORED[self.number]))

    @property
    def low(self) -> float:
        """The least value."""
        return -(2.0 ** (self.bits - 1)) if self.is_integer else -self.high

    @property
    def high(self) -> float:
        """The greatest value."""
        return 2.0 ** (self.bits - 1) - 1 if self.is_integer else float(jnp.finfo(self.dtype).max)

    def __str__(self) -> str:
        per = f"group of {self.per.size}" if isinstance(self.per, Group) else self.per
        return f"{self.number}{f' per {per}' if self.has_scale else ''}{', affine' if self.affine else ''}"


@dataclass(frozen=True)
class Override:
    """What is treated otherwise than the scheme says.

    Attributes:
        match: a parameter by its key path, as a glob (``"*/attention/*"``) or a compiled regular expression, which is
            searched for; or products by their position in the program, in the order they are computed (from 0; from the
            end where negative; or a slice of them).
        scheme: the scheme there; None leaves it in floating point.
    """

    match: str | re.Pattern[str] | int | slice
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, (str, re.Pattern, int, slice)) or isinstance(self.match, bool):
            raise SchemeError(
                f"match={self.match!r}: it takes a glob, a compiled regular expression, an int or a slice"
            )
        if self.scheme is not None and self.scheme.overrides:
            raise SchemeError("the scheme of an override has overrides itself: put them beside it")

    def fits(self, name: str | None, position: int | None, count: int) -> bool:
        """Whether it means this layer.

        Args:
            name: key path of its parameter, None where it has none.
            position: that of its product; None where the parameter is read by other operations only.
            count: how many products there are.
        """
        if isinstance(self.match, str):
            return name is not None and fnmatch.fnmatchcase(name, self.match)
        if isinstance(self.match, re.Pattern):
            return name is not None and self.match.search(name) is not None
        if position is None:
            return False
        if isinstance(self.match, int):
            return position == (self.match if self.match >= 0 else count + self.match)
        return position in range(count)[self.match]


@dataclass(frozen=True)
class Scheme:
    """What is written in fewer bits.

    Attributes:
        weights: format of parameters that products read; None leaves them.
        activations: format of what they are multiplied with; None keeps it in floating point (weight-only).
        dynamic: activations are scaled by what they are in each call, instead of what they were in calibration.
        observer: how static ranges of activations are found.
        overrides: exceptions; the first that fits decides.
        unmatched: what happens to overrides that fit nothing.
    """

    weights: Format | None = Format()
    activations: Format | None = None
    dynamic: bool = False
    observer: Observer = field(default_factory=AbsMax)
    overrides: tuple[Override, ...] = ()
    unmatched: Literal["warn", "error"] = "warn"

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", tuple(self.overrides))
        if self.weights is None and self.activations is None and not self.overrides:
            raise SchemeError("a scheme for neither weights nor activations does nothing")
        if self.weights is not None and self.weights.per == "token":
            raise SchemeError("weights have no tokens: choose per='tensor', 'channel' or Group(size)")
        if self.dynamic and self.activations is None:
            raise SchemeError("dynamic says how activations are scaled: give their format")
        if self.unmatched not in ("warn", "error"):
            raise SchemeError(f"unmatched={self.unmatched!r}: choose 'warn' or 'error'")
        self._check_activations()

    def _check_activations(self) -> None:
        activations, weights = self.activations, self.weights
        if activations is None:
            return
        if isinstance(activations.per, Group) or activations.per == "channel":
            raise SchemeError(
                f"activations per {activations.per}: a sum over channels has one scale, 'tensor' or 'token'"
            )
        if activations.per == "token" and not self.dynamic:
            raise SchemeError("activations per token have a scale for each row of a call: they are dynamic")
        if not activations.has_scale:
            return
        if weights is None or weights.is_integer != activations.is_integer:
            raise SchemeError(f"a product of {activations.number} takes weights of the same kind, not {weights}")
        if weights.affine:
            raise SchemeError("weights of integer products are symmetric: only activations have zero points")
        if isinstance(weights.per, Group):
            raise SchemeError("weights in groups are multiplied in floating point: leave activations=None")

    def with_overrides(self, *overrides: Override) -> Scheme:
        """The scheme with further exceptions, which come first."""
        return replace(self, overrides=(*overrides, *self.overrides))

    def at(self, name: str | None, position: int | None, count: int) -> tuple[Scheme | None, Override | None]:
        """What holds for a layer (see :meth:`Override.fits`), and the exception that says so."""
        for override in self.overrides:
            if override.fits(name, position, count):
                return override.scheme, override
        return self, None

    def __str__(self) -> str:
        if self.activations is None:
            return f"weights {self.weights}"
        return f"weights {self.weights}, {'dynamic' if self.dynamic else 'static'} activations {self.activations}"


def Int8(
    *, affine: bool = True, observer: Observer | None = None, overrides: Sequence[Override] = (), **options: Any
) -> Scheme:
    """int8 weights per channel and int8 activations whose ranges come from calibration.

    Args:
        affine: activations have a zero point (they are rarely symmetric: think of what follows a ReLU).
        observer: how ranges are found.
        overrides: exceptions.
        **options: further attributes of :class:`Scheme`.
    """
    return Scheme(
        Format("int8"),
        Format("int8", "tensor", affine),
        observer=observer or AbsMax(),
        overrides=tuple(overrides),
        **options,
    )


def Int8Dynamic(*, per: Literal["tensor", "token"] = "token", overrides: Sequence[Override] = ()) -> Scheme:
    """int8 weights per channel and int8 activations scaled in each call; needs no calibration data."""
    return Scheme(Format("int8"), Format("int8", per), dynamic=True, overrides=tuple(overrides))


def Int8Weights(*, overrides: Sequence[Override] = ()) -> Scheme:
    """int8 weights per channel; products in floating point."""
    return Scheme(Format("int8"), overrides=tuple(overrides))


def Int4(group: int | None = 64, *, affine: bool = False, overrides: Sequence[Override] = ()) -> Scheme:
    """int4 weights, two in a byte, in groups of so many (None: per channel); products in floating point."""
    return Scheme(Format("int4", "channel" if group is None else Group(group), affine), overrides=tuple(overrides))


def FP8(kind: Literal["e4m3", "e5m2"] = "e4m3", *, overrides: Sequence[Override] = ()) -> Scheme:
    """8-bit floating-point weights per channel; products in floating point."""
    return Scheme(Format("fp8_e4m3" if kind == "e4m3" else "fp8_e5m2"), overrides=tuple(overrides))


def BF16(*, overrides: Sequence[Override] = ()) -> Scheme:
    """Weights in bfloat16; products in floating point."""
    return Scheme(Format("bf16", "tensor"), overrides=tuple(overrides))


def F16(*, overrides: Sequence[Override] = ()) -> Scheme:
    """Weights in float16; products in floating point."""
    return Scheme(Format("f16", "tensor"), overrides=tuple(overrides))
