"""Photographs and class names."""

import numpy as np
import pytest

from jaxinfer.models import images


def test_photographs_are_prepared():
    assert images.photograph("china.jpg").shape == (427, 640, 3)
    pictures = images.photographs()
    assert pictures.shape == (2, 224, 224, 3) and pictures.dtype == np.float32
    assert pictures.min() >= -127 / 128 and pictures.max() <= 1
    assert images.photographs(32).shape == (2, 32, 32, 3)


def test_preprocess_cuts_the_middle_and_scales():
    image = np.full((512, 640, 3), 127, np.uint8)
    image[:, 330:] = 255
    prepared = images.preprocess(image, 224)
    # Half the size, so column 330 becomes 165; the middle 224 of 320 columns start at 48.
    np.testing.assert_array_equal(prepared[:, :115], 0)
    np.testing.assert_array_equal(prepared[:, 119:], 1)


def test_class_names_are_in_the_order_of_imagenet():
    names = images.class_names()
    assert len(names) == 1000
    known = {0: "tench", 207: "golden retriever", 281: "tabby", 698: "palace", 985: "daisy", 999: "toilet tissue"}
    assert {index: names[index].split(",")[0] for index in known} == known


def test_top_is_a_sorted_softmax():
    logits = np.full(1000, -np.inf)
    logits[[3, 1, 2]] = np.log([5.0, 3.0, 2.0]) + 700
    assert images.top(logits, 3) == [
        ("tiger shark", pytest.approx(0.5)),
        ("goldfish", pytest.approx(0.3)),
        ("great white shark", pytest.approx(0.2)),
    ]
