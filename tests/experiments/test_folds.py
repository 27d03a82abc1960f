"""Folds hold every item out once; bounds on what is lost are those of the textbook."""

import numpy as np
import pytest
from scipy import stats

from jaxinfer.experiments.folds import paired_loss, stratified_folds


def test_every_item_is_held_out_once_and_classes_are_shared_evenly():
    labels = np.random.default_rng(0).permutation(np.repeat([3, 1, 7], [50, 20, 30]))
    folds = stratified_folds(labels, 5, seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate([f.held_out for f in folds])), np.arange(100))
    for fold in folds:
        np.testing.assert_array_equal(np.sort(np.concatenate(fold)), np.arange(100))
        assert np.bincount(labels[fold.held_out], minlength=8)[[3, 1, 7]].tolist() == [10, 4, 6]


def test_folds_depend_on_the_seed_alone():
    labels = np.repeat(np.arange(4), 25)
    first, again, other = (stratified_folds(labels, 5, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a.held_out, b.held_out) for a, b in zip(first, again))
    assert not all(np.array_equal(a.held_out, b.held_out) for a, b in zip(first, other))


def test_too_few_items_of_a_class():
    with pytest.raises(ValueError, match="class 1 has 2 items, fewer than 3 folds"):
        stratified_folds(np.array([0, 0, 0, 1, 1]), 3, 0)


def test_bounds_are_those_of_a_one_sided_paired_test():
    rng = np.random.default_rng(0)
    before = [rng.random(40) < 0.9 for _ in range(5)]
    after = [b & (rng.random(40) < 0.95) for b in before]
    loss = paired_loss(before, after)
    b, a = (100 * np.concatenate(x).astype(float) for x in (before, after))
    assert loss.points == pytest.approx(b.mean() - a.mean())
    # The bound is the loss at which a one-sided paired t-test has p = 5 %.
    assert stats.ttest_rel(b, a + loss.bound, alternative="less").pvalue == pytest.approx(0.05)
    per_fold = [100 * (x.mean() - y.mean()) for x, y in zip(before, after)]
    assert stats.ttest_1samp(per_fold, loss.folds_bound, alternative="less").pvalue == pytest.approx(0.05)
    assert loss.spread == pytest.approx(np.std(per_fold, ddof=1))


def test_a_better_model_loses_less_than_nothing():
    wrong, right = np.zeros(10, bool), np.ones(10, bool)
    assert paired_loss([wrong, right], [right, right]).points == -50


def test_a_single_fold_has_no_spread():
    with pytest.raises(ValueError, match="at least two folds"):
        paired_loss([np.ones(3, bool)], [np.ones(3, bool)])
