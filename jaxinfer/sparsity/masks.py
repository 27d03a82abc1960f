"""Trees of masks: checked against the parameters they belong to."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from jaxinfer.graph.retrace import leaf_name


def mask_leaves(params: Any, masks: Any) -> list[np.ndarray | None]:
    """The mask of each leaf of ``params``.

    Args:
        params: a tree of arrays.
        masks: a tree like it of bool arrays of the same shapes, True where an entry is kept. None stands for a leaf,
            or for everything below it, that is kept whole.

    Returns:
        For each leaf of ``params``, in order, its mask, or None where all of it is kept.

    Raises:
        ValueError: if masks have another structure, or a mask another shape than its parameter.
        TypeError: if a mask is not of bool.
    """
    given = jax.tree_util.tree_flatten_with_path(masks, is_leaf=lambda x: x is None)[0]
    by_path = dict(given)
    used: set[Any] = set()
    found: list[np.ndarray | None] = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        at = next((path[:i] for i in range(len(path), -1, -1) if path[:i] in by_path), None)
        name = leaf_name(path)
        if at is None:
            raise ValueError(
                f"masks have nothing for {name}: give it a bool array of shape {np.shape(leaf)}, or None to keep it"
            )
        used.add(at)
        mask = by_path[at]
        if mask is None:
            found.append(None)
            continue
        if at != path:
            raise ValueError(f"masks have an array in place of the subtree that holds {name}")
        found.append(_checked(name, leaf, mask))
    # Where params has no leaves at all, None is as good as nothing.
    extra = [leaf_name(p) for p, m in given if p not in used and m is not None]
    if extra:
        raise ValueError(f"masks have {', '.join(extra)}, which is no parameter")
    return found


def _checked(name: str, leaf: Any, mask: Any) -> np.ndarray | None:
    if not hasattr(mask, "shape") or not hasattr(mask, "dtype"):
        raise TypeError(f"the mask of {name} is {mask!r}: masks are bool arrays")
    if tuple(mask.shape) != tuple(np.shape(leaf)):
        raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter {tuple(np.shape(leaf))}")
    if mask.dtype != np.bool_:
        raise TypeError(f"the mask of {name} is {mask.dtype}: masks are bool, True where an entry is kept")
    flags = np.asarray(mask)
    return None if flags.all() else flags
