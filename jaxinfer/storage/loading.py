"""Files → programs."""

from __future__ import annotations

import functools
import os
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import export

from jaxinfer import _jax
from jaxinfer.arguments import Options
from jaxinfer.native import library
from jaxinfer.pipeline import platform_now
from jaxinfer.search.options import known
from jaxinfer.storage.arrays import StoredArrays, needs_x64
from jaxinfer.storage.container import Container, StorageError
from jaxinfer.storage.stored_call import stored_call
from jaxinfer.storage.structure import describe, describe_static, describe_type, rebuild, rebuild_static, shape_of


def load(path: str | os.PathLike[str]) -> Loaded:
    """Opens what :func:`jaxinfer.storage.saving.save` wrote. The model's code is not needed.

    Arrays are read and programs compiled when they are first used; every byte is checked before anything is made of
    it. The hashes tell a damaged file from a sound one and are no signature: a program is code, so load files that you
    trust.

    Args:
        path: the file. It stays open until the result is dropped, and may be replaced meanwhile.

    Returns:
        The program, called as the saved function was.

    Raises:
        StorageError: if the file is missing, incomplete, damaged, of another kind, made by a newer release, or not for
            this platform; also later, when a part of it that turns out to be damaged is used.
    """
    return Loaded(_Stored(Container(path)))


class _OtherCall(Exception):
    """Raised by a run: it is for another kind of call."""


class _Stored:
    """What a file says, and what was made of it so far."""

    def __init__(self, container: Container):
        self.container, content = container, container.content
        try:
            self.name: str = content["name"]
            self.scheme: Any = content["scheme"]
            self.versions: Mapping[str, str] = content["versions"]
            platforms = sorted({entry["platform"] for entry in content["entries"]})
            entries = [entry for entry in content["entries"] if entry["platform"] == platform_now()]
            used = {name for entry in entries for name in entry["weights"]}
            self.arrays = StoredArrays(container, {k: v for k, v in content["arrays"].items() if k in used})
            dtypes = [dtype for entry in entries for _, dtype, _ in (*entry["types"], *entry["result_types"])]
            dtypes += [content["arrays"][name]["dtype"] for name in used]
            self.entries = [_Entry(self, entry) for entry in entries]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{container.path} was not written by autoinfer.save: {error!r}") from error
        if not entries:
            raise StorageError(
                f"{container.path} holds programs for {', '.join(platforms)}, and JAX runs on {platform_now()} here: "
                f'save it with platforms=[..., "{platform_now()}"]'
            )
        if needs_x64(dtypes) and not jax.config.jax_enable_x64:
            raise StorageError(
                f'{container.path} needs 64-bit types: call jax.config.update("jax_enable_x64", True) at the beginning'
            )

    def entry(self, args: Sequence[Any], kwargs: dict[str, Any]) -> _Entry:
        """The program for a call: one for its sizes, else one for any.

        Raises:
            TypeError: if there is none.
        """
        entries = sorted(self.entries, key=lambda e: e.is_symbolic)
        for weak_types in (True, False):
            for entry in entries:
                if entry.takes(args, kwargs, weak_types):
                    return entry
        given = jax.tree.map(lambda x: describe_type(*_shape_and_dtype(x)), (args, kwargs))
        raise TypeError(
            f"{self.container.path} holds no program for the arguments {given}: it has "
            f"{'; '.join(map(str, entries))}. Save with an example of this kind, or with batch_axes"
        )


class _Entry:
    """One kind of call on this platform."""

    def __init__(self, stored: _Stored, entry: Mapping[str, Any]):
        self._stored, self._program, self._compiler = stored, entry["program"], dict(entry["options"])
        kernels = library() if "kernel_program" in entry else None
        same = kernels is not None and kernels.kind == entry["kernels"]
        self._kernel_program: str | None = entry["kernel_program"] if same else None
        self.form: str = entry["form"]
        self._holds_weights: bool = entry.get("holds_weights", False)
        self._arguments = shape_of(entry["arguments"])
        self.types = [(tuple(shape), dtype, weak) for shape, dtype, weak in entry["types"]]
        self._results, self._result_types = entry["results"], entry["result_types"]
        self.weights: list[str] = entry["weights"]
        self.static = [[(key, rebuild_static(value)) for key, value in part] for part in entry["static"]]
        self._static_text = str(entry["static"])
        self._options = Options(*entry["static_places"])

    def takes(self, args: Sequence[Any], kwargs: dict[str, Any], weak_types: bool) -> bool:
        """Whether a call is of this kind; symbolic sizes take any."""
        data, static = self._options.split(args, kwargs)
        leaves, tree = jax.tree.flatten(data)
        return (
            len(leaves) == len(self.types)
            and all(_takes(x, *kind, weak_types) for x, kind in zip(leaves, self.types))
            and shape_of(describe(tree)) == self._arguments
            and self._static_text == str([[[k, describe_static(v)] for k, v in part] for part in static or ((), ())])
        )

    @property
    def is_symbolic(self) -> bool:
        """Whether it takes more than one size."""
        return any(isinstance(d, str) for shape, _, _ in self.types for d in shape)

    def compiled(self, weights: list[Any]) -> Callable[..., Any]:
        """The program as a jitted function, which refuses calls of any other kind."""
        if not self._holds_weights or not all(map(_jax.is_concrete, weights)):
            return functools.partial(self._jitted, weights)
        run = functools.wraps(self._run)(functools.partial(self._run, weights))
        return self._options.jit(run, self._compiler_options(), donates=False)

    @functools.cached_property
    def _jitted(self) -> Callable[..., Any]:
        return self._options.shifted(1).jit(self._run, self._compiler_options(), donates=False)

    @functools.cached_property
    def _run(self) -> Callable[..., Any]:
        """The program as ``run(weights, *args, **kwargs)``."""
        call = self._call

        def run(weights: list[Any], *args: Any, **kwargs: Any) -> Any:
            if self._stored.entry(args, kwargs) is not self:
                raise _OtherCall
            (data, named), _ = self._options.split(args, kwargs)
            results = call(weights, *jax.tree.leaves((data, named)))
            return rebuild(self._results, iter([_typed(x, *t) for x, t in zip(results, self._result_types)]))

        run.__name__ = run.__qualname__ = self._stored.name
        return run

    @functools.cached_property
    def _call(self) -> Callable[..., Any]:
        if self._kernel_program is None:
            return self.exported.call
        call = stored_call(self._read(self._kernel_program), self.exported)
        return lambda *args: call(*jax.tree.leaves(args))

    @functools.cached_property
    def exported(self) -> export.Exported:
        """The program as JAX reads it, without this project's kernels."""
        return self._read(self._program)

    def _read(self, name: str) -> export.Exported:
        code = self._stored.container.read(name).tobytes()
        try:
            return export.deserialize(bytearray(zlib.decompress(code)))
        except ImportError as error:
            raise StorageError(f"programs are read with a package: pip install flatbuffers ({error})") from error
        except Exception as error:
            # Whatever this version of JAX thinks of a program that another wrote.
            raise StorageError(
                f"{self._stored.container.path} was written with JAX {self._stored.versions['jax']}, and this is "
                f"{jax.__version__}, which cannot read the program in it ({error}): upgrade the older one"
            ) from error

    def _compiler_options(self) -> dict[str, str]:
        if self._compiler and not known(self._compiler):
            warnings.warn(
                f"{self._stored.container.path}: this version of XLA does not know {self._compiler}, with which the "
                "program was compiled before; results may differ by rounding, and so may the speed",
                stacklevel=2,
            )
            return {}
        return self._compiler

    def __str__(self) -> str:
        given = [describe_type(shape, dtype) for shape, dtype, _ in self.types]
        fixed = [f"{key}={value!r}" for part in self.static for key, value in part]
        return f"{self._stored.name}({', '.join([*given, *fixed])})"


class Loaded:
    """A program from a file. A pytree, whose leaves are its weights.

    Called as the saved function was, it runs the program saved for this kind of call. Made by :func:`load`. It can be
    called inside ``jit``, and differentiated as often as it was saved for; JAX has no ``vmap`` of exported programs.
    """

    def __init__(self, stored: _Stored, arrays: Mapping[str, Any] | None = None):
        self._stored = stored
        self._arrays = stored.arrays if arrays is None else arrays
        self._runs: dict[_Entry, Callable[..., Any]] = {}
        self._hot: Callable[..., Any] | None = None
        self.__name__ = stored.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program.

        Raises:
            StorageError: if a part of the file that is needed now is damaged.
            TypeError: if nothing was saved for this kind of call.
        """
        if self._hot is not None:
            try:
                return self._hot(*args, **kwargs)
            except _OtherCall:
                pass
        entry = self._stored.entry(args, kwargs)
        # Read outside of any trace, so that what is kept are arrays.
        run = self._runs.get(entry) or entry.compiled([self._arrays[name] for name in entry.weights])
        out = run(*args, **kwargs)
        self._runs[entry] = run
        self._hot = run
        return out

    @property
    def arrays(self) -> Mapping[str, Any]:
        """The weights of this platform's programs by name, read when they are asked for."""
        return self._arrays

    @property
    def scheme(self) -> Any:
        """How the weights were quantized, as it was given to ``save``."""
        return self._stored.scheme

    @property
    def versions(self) -> Mapping[str, str]:
        """The releases that wrote the file, by package."""
        return self._stored.versions

    @property
    def calls(self) -> list[str]:
        """The kinds of calls there are programs for on this platform."""
        return [f"{entry}: {entry.form}" for entry in self._stored.entries]

    def verify(self) -> None:
        """Reads everything once and compares it with its hashes.

        Raises:
            StorageError: if something is damaged.
        """
        for name in self._stored.container.names:
            self._stored.container.read(name)

    def __repr__(self) -> str:
        return f"Loaded({self._stored.container.path!r}: {'; '.join(self.calls)})"


def _takes(leaf: Any, shape: Sequence[Any], dtype: str, weak: bool, weak_types: bool) -> bool:
    have, have_dtype = _shape_and_dtype(leaf)
    return (
        len(have) == len(shape)
        and all(isinstance(want, str) or size == want for size, want in zip(have, shape))
        and have_dtype == dtype
        and (not weak_types or bool(getattr(_jax.abstract(leaf), "weak_type", False)) == weak)
    )


def _shape_and_dtype(leaf: Any) -> tuple[Sequence[Any], str]:
    aval = _jax.abstract(leaf)
    return aval.shape, str(aval.dtype)


def _typed(result: Any, shape: Sequence[Any], dtype: str, weak: bool) -> Any:
    """A result with its weak type, which exported programs forget."""
    aval = _jax.aval_of(result)
    return _jax.with_aval(result, aval.update(weak_type=weak)) if weak else result


def _flatten(loaded: Loaded) -> tuple[tuple[dict[str, Any]], _Stored]:
    return ({name: loaded.arrays[name] for name in loaded.arrays},), loaded._stored


jax.tree_util.register_pytree_node(Loaded, _flatten, lambda stored, children: Loaded(stored, children[0]))
