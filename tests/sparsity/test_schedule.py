"""The cubic schedule against its formula."""

import numpy as np
import pytest

from jaxinfer.sparsity.learning.schedule import Cubic


def test_what_is_left_follows_the_formula():
    schedule = Cubic(begin=0.2, end=0.8, every=10)
    steps, target = 1000, 0.05
    for step in range(0, steps + 1, 50):
        sparsity = 1 - target
        progress = np.clip((step - 200) / 600, 0, 1)
        expected = 1 - (sparsity + (0 - sparsity) * (1 - progress) ** 3)  # equation 1 with an initial sparsity of 0
        assert float(schedule.left(step, steps, target)) == pytest.approx(expected, rel=1e-5)


def test_updates_come_every_so_often_and_at_the_end():
    schedule = Cubic(begin=0.1, end=0.55, every=20)
    assert [s for s in range(101) if schedule.is_update(s, 100)] == [20, 40, 55]


@pytest.mark.parametrize("wrong", [{"begin": 0.5, "end": 0.2}, {"end": 1.5}, {"begin": -0.1}, {"every": 0}])
def test_nonsense(wrong):
    with pytest.raises(ValueError):
        Cubic(**wrong)
