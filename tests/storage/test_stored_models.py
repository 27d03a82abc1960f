"""Every model of the zoo through a file, in a process without its code: the same bits, at other batch sizes too."""

import itertools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from jaxinfer import autoinfer
from jaxinfer.models.zoo import ZOO, load

QUICK = ("mlp", "mobilenetv2", "encoder", "two_tower")
HERE = Path(__file__).parent


def bits(tree):
    return [(np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def live(model, batch):
    return model.make_inputs(batch)[model.frozen_inputs :]


def any_size(fun, model):
    """The function for any batch, as JAX itself exports it."""
    scope = export.SymbolicScope()
    types = [
        jax.ShapeDtypeStruct((*export.symbolic_shape("batch", scope=scope), *x.shape[1:]), x.dtype)
        for x in live(model, 1)
    ]
    return jax.jit(export.export(jax.jit(lambda *args: fun(*args)))(*types).call)


def store(folder, name, program, model, wanted):
    """Saves a program, and the inputs it is to be called with elsewhere."""
    autoinfer.save(program, folder / f"{name}.program", *live(model, 1), batch_axes=0)
    for batch in wanted:
        np.savez(folder / f"{name}.{batch}.npz", *map(np.asarray, live(model, batch)))
    return {(name, batch): bits(results) for batch, results in wanted.items()}


def loaded_elsewhere(folder):
    command = [sys.executable, str(HERE / "load_elsewhere.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = {}
    for file in folder.glob("*.results"):
        name, batch = file.stem.split(".")
        with np.load(file, allow_pickle=False) as arrays:
            results[name, int(batch)] = bits([arrays[key] for key in arrays])
    return results


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param([name for name in ZOO if name not in QUICK], id="others", marks=pytest.mark.slow),
    ],
)
def test_models_are_the_same_in_a_process_without_their_code(tmp_path, names):
    """Batches of one and two were called before, so they run as they did; any other is the program for any size."""
    expected = {}
    for name in names:
        model = load(name, tiny=True)
        frozen = autoinfer.optimize(model.apply, tune="off", verify=False).freeze(*model.known)
        wanted = {batch: frozen(*live(model, batch)) for batch in (1, 2)}
        fresh = autoinfer.optimize(model.apply, tune="off", verify=False).freeze(*model.known)
        wanted[3] = any_size(fresh, model)(*live(model, 3))
        expected |= store(tmp_path, f"{name}-frozen", frozen, model, wanted)

        known = lambda params, *args, apply=model.apply: apply(*params, *args)  # noqa: E731
        wanted = {batch: jax.jit(model.apply)(*model.known, *live(model, batch)) for batch in (1, 3)}
        expected |= store(tmp_path, f"{name}-written", (known, model.known), model, wanted)
    assert loaded_elsewhere(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_full_sizes_are_the_same_and_files_are_as_large_as_the_weights(tmp_path, name):
    model = load(name, pretrained=False)
    frozen = autoinfer.optimize(model.apply, tune="off", verify=False).freeze(*model.known)
    wanted = {1: frozen(*live(model, 1))}
    autoinfer.save(frozen, tmp_path / "frozen.program")
    np.savez(tmp_path / "frozen.1.npz", *map(np.asarray, live(model, 1)))
    assert loaded_elsewhere(tmp_path) == {("frozen", 1): bits(wanted[1])}
    weights = sum(x.nbytes for x in autoinfer.load(tmp_path / "frozen.program").arrays.values())
    size = (tmp_path / "frozen.program").stat().st_size
    print(f"\n{name}: {size:,} bytes for {weights:,} bytes of weights")
    assert size < 1.02 * weights + 100_000


@pytest.mark.slow
def test_measured_programs_are_the_same_in_another_process(tmp_path):
    """Forms, compiler options and loops as timing chose them."""
    expected = {}
    for name in ("mobilenetv2", "lstm", "gcn"):
        model = load(name, pretrained=False)
        frozen = autoinfer.optimize(model.apply, tune=5.0).freeze(*model.known)
        wanted = {1: frozen(*live(model, 1))}
        autoinfer.save(frozen, tmp_path / f"{name}.program")
        np.savez(tmp_path / f"{name}.1.npz", *map(np.asarray, live(model, 1)))
        expected[name, 1] = bits(wanted[1])
    assert loaded_elsewhere(tmp_path) == expected


def test_a_pruned_and_quantized_network_takes_a_thirtieth(tmp_path):
    """LeNet-300-100 in int8 with one weight in twenty, against its float32 weights."""
    rng = np.random.default_rng(0)
    sizes = (784, 300, 100, 10)
    params, plain = [], 0
    for fan_in, fan_out in itertools.pairwise(sizes):
        kernel = rng.normal(size=(fan_in, fan_out)) * 40
        kernel[rng.random(kernel.shape) >= 0.05] = 0
        params.append((kernel.clip(-127, 127).astype(np.int8), rng.random(fan_out, np.float32), np.float32(0.01)))
        plain += 4 * fan_out * (fan_in + 1)

    def network(params, x):
        for i, (kernel, bias, scale) in enumerate(params):
            x = x @ (kernel.astype(jnp.float32) * scale) + bias
            x = jax.nn.relu(x) if i < 2 else x
        return x

    x = jnp.ones((1, 784))
    autoinfer.save((network, params), tmp_path / "lenet", x, batch_axes=0)
    size = (tmp_path / "lenet").stat().st_size
    autoinfer.save((network, params), tmp_path / "smaller", x, batch_axes=0, zstd=True)
    print(f"\n{plain / size:.1f}× smaller than float32, with zstd {plain / (tmp_path / 'smaller').stat().st_size:.1f}×")
    assert size < plain / 30
    assert bits(autoinfer.load(tmp_path / "lenet")(x)) == bits(jax.jit(network)(params, x))
