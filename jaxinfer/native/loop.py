"""Loops over vectors as one operation: a list of instructions that is run for each step.

Vectors are numbered in spaces: space 0 is memory of the loop's own, then come the operands, then the results. An
operand or result of which each step has its own row moves on by that row's length from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.native.convolution import unpacked
from jaxinfer.native.primitive import kernel_primitive

# In the order of the kernel's own list.
OPERATIONS = ("copy", "neg", "abs", "exp", "tanh", "logistic", "add", "sub", "mul", "div", "max", "min", "product")
MOST_SPACES = 64

_UNARY = ("neg", "abs", "exp", "tanh", "logistic")


class Place(NamedTuple):
    """Where a vector begins.

    Attributes:
        space: which space.
        offset: after so many numbers of it.
    """

    space: int
    offset: int


class Instruction(NamedTuple):
    """to = operation(a, b).

    Attributes:
        operation: one of :data:`OPERATIONS`.
        size: elements of the result.
        depth: of a product, elements of ``a``; ``b`` are packed weights[size / panel, 1, 1, depth, panel].
        to: where the result goes.
        a: the first operand.
        b: the second operand; where there is none, any place.
    """

    operation: str
    size: int
    depth: int
    to: Place
    a: Place
    b: Place


class VectorLoop(NamedTuple):
    """A loop.

    Attributes:
        first: instructions before the first step.
        step: those of each step.
        last: those after the last step.
        steps: how many steps there are.
        backwards: whether they run from the last row to the first.
        memory: numbers in space 0.
        results: shapes of the results.
        moves: for each operand and then each result, whether its first axis is that of the steps.
    """

    first: tuple[Instruction, ...]
    step: tuple[Instruction, ...]
    last: tuple[Instruction, ...]
    steps: int
    backwards: bool
    memory: int
    results: tuple[tuple[int, ...], ...]
    moves: tuple[bool, ...]


def vector_loop(loop: VectorLoop, operands: Sequence[Any]) -> list[Any]:
    """Runs a loop.

    Args:
        loop: the loop.
        operands: arrays of one dtype, at least one.

    Returns:
        The results, of that dtype.
    """
    return list(vector_loop_p.bind(*operands, loop=loop))


# -- the same in JAX's own operations ---------------------------------------------------------------------------------


def _plain(*operands: Any, loop: VectorLoop) -> list[Any]:
    dtype = operands[0].dtype
    results = [jnp.zeros(shape, dtype) for shape in loop.results]
    spaces = (jnp.zeros(loop.memory, dtype), *operands, *results)
    steps = range(loop.steps)
    spaces = _run(loop, loop.first, spaces, steps[-1] if loop.backwards else 0)

    def step(spaces: Any, i: Any) -> Any:
        return _run(loop, loop.step, spaces, i), None

    order = jnp.arange(loop.steps)
    spaces, _ = lax.scan(step, spaces, order[::-1] if loop.backwards else order)
    return list(_run(loop, loop.last, spaces, 0)[1 + len(operands) :])


def _run(loop: VectorLoop, instructions: Sequence[Instruction], spaces: Any, step: Any) -> Any:
    held = list(spaces)
    for operation, size, depth, to, a, b in instructions:
        if operation == "product":
            result = _read(loop, held, a, depth, step) @ unpacked(held[b.space], size)[0, 0]
        else:
            result = _read(loop, held, a, size, step)
            if operation in _UNARY:
                result = getattr(lax, operation)(result)
            elif operation != "copy":
                result = getattr(lax, operation)(result, _read(loop, held, b, size, step))
        space = held[to.space]
        if to.space and loop.moves[to.space - 1]:
            row = space[step].reshape(-1).at[to.offset : to.offset + size].set(result)
            held[to.space] = space.at[step].set(row.reshape(space.shape[1:]))
        else:
            flat = space.reshape(-1).at[to.offset : to.offset + size].set(result)
            held[to.space] = flat.reshape(space.shape)
    return tuple(held)


def _read(loop: VectorLoop, spaces: Sequence[Any], place: Place, size: int, step: Any) -> Any:
    array = spaces[place.space]
    if place.space and loop.moves[place.space - 1]:
        array = array[step]
    return array.reshape(-1)[place.offset : place.offset + size]


# -- the primitive ----------------------------------------------------------------------------------------------------


def _kernel(ctx: Any, operands: Sequence[Any], loop: VectorLoop) -> Any:
    shapes = [*(aval.shape for aval in ctx.avals_in), *loop.results]
    advance = [0, *(int(np.prod(s[1:])) if moves else 0 for s, moves in zip(shapes, loop.moves))]
    code = [
        (OPERATIONS.index(i.operation), i.size, i.depth, *i.to, *i.a, *i.b)
        for i in (*loop.first, *loop.step, *loop.last)
    ]
    parts = [len(loop.first), len(loop.step), len(loop.last), loop.steps, loop.backwards, loop.memory]
    return jax.ffi.ffi_lowering("jaxinfer_loop")(
        ctx,
        *operands,
        code=np.array(code, np.int32).reshape(-1),
        parts=np.array(parts, np.int64),
        advance=np.array(advance, np.int64),
    )


def _abstract(*avals: Any, loop: VectorLoop) -> list[Any]:
    return [jax.core.ShapedArray(shape, avals[0].dtype) for shape in loop.results]


vector_loop_p = kernel_primitive("vector_loop", _plain, _abstract, _kernel, multiple_results=True)
