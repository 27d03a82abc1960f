"""Photographs, prepared as EfficientNet-Lite was trained to see them, and the names of ImageNet's classes.

The photographs are the two that scikit-learn ships, china.jpg and flower.jpg. The class names are the WordNet
lemmas of the ImageNet-1k synsets in the order of their ids, taken from the data files of the wheel `timm`
1.0.31 (Apache-2.0).
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np

PHOTOGRAPHS = ("china.jpg", "flower.jpg")


def photograph(name: str) -> np.ndarray:
    """One of PHOTOGRAPHS as uint8[427, 640, 3].

    Raises:
        ModuleNotFoundError: scikit-learn or Pillow is not installed.
    """
    try:
        import PIL  # noqa: F401
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the photographs need scikit-learn and Pillow: pip install "jaxinfer[zoo]"'
        ) from error
    return load_sample_image(name)


def preprocess(image: np.ndarray, size: int = 224) -> np.ndarray:
    """An image as EfficientNet-Lite expects it.

    The shorter side is resized to size · 256 / 224 with bicubic interpolation, the middle square cut out, and
    every channel mapped by x ↦ (x − 127) / 128.

    Args:
        image: uint8[height, width, 3], RGB.
        size: side of the result, in pixels.

    Returns:
        float32[size, size, 3], in [−1, 1].
    """
    from PIL import Image

    picture = Image.fromarray(image)
    factor = size * 256 / 224 / min(picture.size)
    picture = picture.resize([round(side * factor) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    cut = picture.crop((left, top, left + size, top + size))
    return (np.asarray(cut, np.float32) - 127) / 128


def crops(name: str, count: int, seed: int, size: int = 224) -> np.ndarray:
    """Random crops of one of PHOTOGRAPHS, as networks are shown them in training.

    Each covers 35 to 100 % of the area at an aspect ratio of 3/4 to 4/3, is resized with bicubic interpolation,
    mirrored half of the time, and made up to 20 % darker or brighter.

    Args:
        name: of the photograph.
        count: how many.
        seed: they are drawn with.
        size: side of the result, in pixels.

    Returns:
        float32[count, size, size, 3], in [−1, 1].
    """
    from PIL import Image

    image, rng = photograph(name), np.random.default_rng(seed)
    height, width, _ = image.shape
    found = []
    for _ in range(count):
        area, ratio = height * width * rng.uniform(0.35, 1), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        across, down = min(round((area * ratio) ** 0.5), width), min(round((area / ratio) ** 0.5), height)
        left, top = rng.integers(0, width - across + 1), rng.integers(0, height - down + 1)
        cut = Image.fromarray(image[top : top + down, left : left + across])
        pixels = np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC), np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        found.append((np.clip(pixels * rng.uniform(0.8, 1.2), 0, 255) - 127) / 128)
    return np.stack(found).astype(np.float32)


def photographs(size: int = 224) -> np.ndarray:
    """All PHOTOGRAPHS, prepared: float32[2, size, size, 3]."""
    return np.stack([preprocess(photograph(name), size) for name in PHOTOGRAPHS])


def class_names() -> list[str]:
    """Names of the 1,000 ImageNet classes: synonyms, separated by commas."""
    return (files("jaxinfer.models") / "imagenet_classes.txt").read_text(encoding="utf-8").splitlines()


def top(logits: np.ndarray, count: int = 5) -> list[tuple[str, float]]:
    """The likeliest classes and their probabilities, best first.

    Args:
        logits: [1000], of one image.
        count: how many.
    """
    shifted = np.exp(np.asarray(logits, np.float64) - np.max(logits))
    probabilities = shifted / shifted.sum()
    names = class_names()
    best = np.argsort(-probabilities, kind="stable")[:count]
    return [(names[index].split(",")[0], float(probabilities[index])) for index in best]
