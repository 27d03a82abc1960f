"""Kernels in C that XLA calls, for what its CPU backend does slowly.

The sources lie beside this file. They are compiled once for the processor at hand, by whatever C compiler there is;
without one none of their operations is offered, and everything works as before. Each operation is a JAX primitive that
says itself in plain JAX as well: so it is lowered for other platforms, exported, and computed in other dtypes.
"""

from jaxinfer.native.convolution import Tail, Window, depthwise_convolution, pack, packed_convolution
from jaxinfer.native.integer import integer_offsets, integer_product, pack_integers
from jaxinfer.native.library import TARGETS, Library, library, why_missing
from jaxinfer.native.loop import Instruction, Place, VectorLoop, vector_loop
from jaxinfer.native.primitive import NAMES, exports_with_kernels, is_portable

# What rules and reports know the kernels by.
KERNELS = frozenset(NAMES)

__all__ = [
    "KERNELS",
    "TARGETS",
    "Instruction",
    "Library",
    "Place",
    "Tail",
    "VectorLoop",
    "Window",
    "depthwise_convolution",
    "exports_with_kernels",
    "integer_offsets",
    "integer_product",
    "is_portable",
    "library",
    "pack",
    "pack_integers",
    "packed_convolution",
    "vector_loop",
    "why_missing",
]
