"""What an earlier process found out about the same program with the same weights on this machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer import _jax
from jaxinfer.graph import Graph
from jaxinfer.pipeline import Settings, platform_now, rules_digest
from jaxinfer.search.cache import default_cache, key
from jaxinfer.search.device import environment_key


class Verdict:
    """The entry of one program in the cache.

    Args:
        name: its key.
    """

    def __init__(self, name: str):
        self.name = name

    @classmethod
    def of(cls, original: Graph, settings: Settings) -> Verdict | None:
        """The entry of a program as written, with its weights; None where none may be read or kept."""
        fingerprint = original.fingerprint
        if fingerprint is None or settings.tune in ("off", "full"):
            return None
        environment = environment_key(rules_digest(settings.active_rules(platform_now())))
        contents = _digest(w.value for w in original.weights)
        return cls(key("program", environment, fingerprint, contents, settings.numerics, settings.verify))

    def load(self) -> dict[str, Any] | None:
        """What was kept; None where there is nothing, or nothing that could have been."""
        stored = default_cache().get(self.name)
        if not isinstance(stored, dict) or not {"form", "reason"} <= set(stored):
            return None
        return {**stored, "form": stored["form"] and tuple(stored["form"])}

    def save(self, found: Mapping[str, Any]) -> None:
        """Keeps what was found: name and fingerprint of the ``"form"`` to run or None, the ``"reason"``, and more."""
        default_cache().put(self.name, dict(found))


def _digest(arrays: Iterable[Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        data = jax.random.key_data(array) if _jax.is_extended(array.dtype) else array
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(np.asarray(data)).view(np.uint8).data)
    return digest.hexdigest()
