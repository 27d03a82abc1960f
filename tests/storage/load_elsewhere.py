"""Run by test_stored_models in a process of its own: loads stored programs and writes down what they return.

    python load_elsewhere.py FOLDER

Every FOLDER/NAME.program is called with the arrays of each FOLDER/NAME.*.npz, and the results go to a file beside it.
No code of models may be imported here.
"""

import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("error")
FORBIDDEN = ("flax", "equinox", "jaxinfer.models")


class Refuse:
    """Finds no module of a model's code."""

    def find_spec(self, name, path=None, target=None):
        if name.startswith(FORBIDDEN):
            raise AssertionError(f"{name} was imported")


sys.meta_path.insert(0, Refuse())
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from jaxinfer import autoinfer  # noqa: E402

folder = Path(sys.argv[1])
for file in sorted(folder.glob("*.program")):
    loaded = autoinfer.load(file)
    for inputs in sorted(folder.glob(f"{file.stem}.*.npz")):
        with np.load(inputs, allow_pickle=False) as arrays:
            results = loaded(*(arrays[name] for name in arrays))
        np.savez(inputs.with_suffix(".results"), *map(np.asarray, jax.tree.leaves(results)))
        os.replace(inputs.with_suffix(".results.npz"), inputs.with_suffix(".results"))
print("loaded without", *FORBIDDEN)
