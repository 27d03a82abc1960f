"""A run of mask learning on disk, so that another process can take it up where it was.

Orbax writes each checkpoint to a temporary folder and renames it when it is complete: whenever the process dies, the
last complete one is found again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax


class CheckpointMismatch(ValueError):
    """A folder holds the checkpoints of a run with other settings."""


class Store:
    """The checkpoints of one run.

    Args:
        folder: where they are; made if it is not there.
        settings: what the run is defined by, as JSON takes it.
        keep: how many of the latest checkpoints are kept.

    Attributes:
        folder: where they are.

    Raises:
        ImportError: Orbax is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], keep: int = 2):
        try:
            import orbax.checkpoint as ocp
        except ImportError as error:
            raise ImportError(
                "checkpoints need Orbax: pip install orbax-checkpoint, or jaxinfer[sparsity]; or leave checkpoint= out"
            ) from error
        self._ocp = ocp
        # As JSON gives it back, so that settings compare equal.
        self._settings = json.loads(json.dumps(settings))
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "run"))

    def save(self, step: int, carry: Any, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes what a run carries after ``step`` steps; returns once it is on disk."""
        if step in self._manager.all_steps():
            return
        arrays = {f"{i:05d}": _stored(x) for i, x in enumerate(jax.tree.leaves(carry))}
        run = {"settings": self._settings, "history": [dict(row) for row in history]}
        args = self._ocp.args
        self._manager.save(step, args=args.Composite(state=args.StandardSave(arrays), run=args.JsonSave(run)))
        self._manager.wait_until_finished()

    @property
    def latest(self) -> int | None:
        """The number of steps after which the latest complete checkpoint was made."""
        return self._manager.latest_step()

    def load(self, step: int, like: Any) -> tuple[Any, list[dict[str, Any]]]:
        """What a run carried after ``step`` steps, and its history.

        Args:
            step: see :attr:`latest`.
            like: a carry, or its shapes, of the same structure.

        Raises:
            CheckpointMismatch: it is the checkpoint of a run with other settings.
        """
        args = self._ocp.args
        run = self._manager.restore(step, args=args.Composite(run=args.JsonRestore()))["run"]
        self._check(run["settings"])
        treedef: Any
        leaves, treedef = jax.tree.flatten(like)
        wanted = {f"{i:05d}": jax.eval_shape(_stored, x) for i, x in enumerate(leaves)}
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device) for k, x in wanted.items()}
        found = self._manager.restore(step, args=args.Composite(state=args.StandardRestore(wanted)))["state"]
        arrays = [_restored(found[f"{i:05d}"], x) for i, x in enumerate(leaves)]
        return treedef.unflatten(arrays), list(run["history"])

    def close(self) -> None:
        """Lets go of the folder."""
        self._manager.close()

    def _check(self, found: Mapping[str, Any]) -> None:
        for name, mine in self._settings.items():
            if found.get(name) != mine:
                raise CheckpointMismatch(
                    f"{self.folder} holds a run with another {name}: {found.get(name)!r} there, {mine!r} here; "
                    "give another folder, or the same settings"
                )


def _stored(x: Any) -> Any:
    """An array as it is written: random keys as their data."""
    return jax.random.key_data(x) if _jax.is_extended(x.dtype) else x


def _restored(x: Any, like: Any) -> Any:
    # Arrays of Orbax's own making are copied into memory of JAX's, which compiled steps may take over.
    array = jax.numpy.asarray(np.asarray(x))
    return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if _jax.is_extended(like.dtype) else array
