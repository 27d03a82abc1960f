"""English sentences that every Python brings along: those of its language reference, `pydoc_data`."""

from __future__ import annotations

import re

import numpy as np

# A whole sentence of plain words, neither a heading nor a piece of code.
_SENTENCE = re.compile(r"[A-Z][A-Za-z ,;’'()-]+\.")
_WORDS = range(8, 41)


def sentences(seed: int = 0) -> list[str]:
    """Distinct sentences of 8 to 40 words, some 600, in an order drawn with `seed`.

    Their number and words differ a little from version to version of Python.
    """
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            parts = re.split(r"(?<=[.?!]) (?=[A-Z])", " ".join(paragraph.split()))
            found.update((part, None) for part in parts if len(part.split()) in _WORDS and _SENTENCE.fullmatch(part))
    ordered = list(found)
    return [ordered[index] for index in np.random.default_rng(seed).permutation(len(ordered))]
