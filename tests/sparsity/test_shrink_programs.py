"""Every program of the lists and every model of the zoo: pruned by whole units, shrunk, compared at two batch sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import PROGRAMS
from programs_base import Made
from programs_later import LATER
from shrinking import TOLERANCE, error, precision, pruned, rounding

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load
from jaxinfer.sparsity.groups import Group, Groups

# A few that hold most structures run each time; all of them in `make test-all`.
QUICK = {"flax_vae", "jax_remat", "flax_scan_over_layers", "jax2onnx_depthwise_conv"}
BATCHES = (2, 3)


def of_zoo(name: str) -> Callable[[Any], Made]:
    def make(dtype: Any) -> Made:
        model = load(name, tiny=True, dtype=dtype)
        return Made(model.apply, model.variables, model.make_inputs)

    return make


EVERYTHING = {**{p.name: p.make for p in (*PROGRAMS, *LATER)}, **{f"zoo-{name}": of_zoo(name) for name in ZOO}}


def left_of(group: Group, report: Any) -> int:
    """How many units of a group still own something of the small arrays, for every parameter the most."""
    shapes = {leaf.name: leaf.small for leaf in report.leaves}
    most = 0
    for member in group.members:
        owned = np.bincount(member.unit_of[member.unit_of >= 0], minlength=group.size)
        others = int((member.unit_of < 0).sum())
        most = max(most, int(np.ceil((shapes[member.name][member.axis] - others) / owned.max())))
    return most


def lost_share(groups: Groups, report: Any) -> float:
    """The share of all units that are gone from the arrays, by the sizes of these."""
    left = {group.name: min(left_of(group, report), group.size) for group in groups}
    return 1 - sum(left.values()) / sum(group.size for group in groups)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in EVERYTHING])
def test_a_shrunk_program_equals_the_masked_one(name: str, dtype: Any) -> None:
    with precision(dtype):
        made = EVERYTHING[name](dtype)
        groups = autoinfer.channel_groups(made.fun, made.params, *made.inputs(BATCHES[0]))
        masks, kept = pruned(groups, 0.4)
        masked_one = made.fun, made.params, masks
        small, small_params = autoinfer.shrink(*masked_one, *made.inputs(BATCHES[0]))
        for batch in BATCHES:
            inputs = made.inputs(batch)
            limit, found = TOLERANCE[jnp.dtype(dtype).name], error(*masked_one, small, small_params, *inputs)
            # Statistics of a small batch can turn the last place of float32 into more than that in any order of sums.
            assert found <= limit or (dtype == jnp.float32 and found <= rounding(*masked_one, *inputs))
    # Every slice of a removed unit is gone, so the arrays hold what no mask touches.
    whole = sum(x.size for x in jax.tree.leaves(made.params))
    masked_entries = sum(int((~m).sum()) for m in jax.tree.leaves(masks))
    assert sum(x.size for x in jax.tree.leaves(small_params)) <= whole - masked_entries
    assert lost_share(groups, small.report) >= 0.3
    assert sum(int((~k).sum()) for k in kept.values()) >= 0.3 * sum(k.size for k in kept.values())
