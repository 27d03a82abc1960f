"""Compiling, keeping and loading the kernels; and what happens where that cannot be."""

import functools
import importlib
import json
import os
import platform
import subprocess
import sys
import textwrap

import pytest

# The package has a function of this module's name.
library = importlib.import_module("jaxinfer.native.library")

PROGRAM = """
    import json
    import jax.numpy as jnp
    import numpy as np
    from jaxinfer import autoinfer, native

    there = native.library()
    a, b, x = jnp.eye(160) * 2, jnp.eye(160) * 3, jnp.arange(160.0)
    fast = autoinfer.optimize(lambda a, b, x: jnp.tanh(a @ b @ x / 999), tune="off").freeze(a, b)
    np.testing.assert_allclose(fast(x), np.tanh(np.arange(160) * 6 / 999), rtol=1e-5)
    w, y = np.ones((1, 1, 40, 50), np.float32), np.ones((1, 1, 70, 40), np.float32)
    panel = there.panel if there else 16
    have = native.packed_convolution(y, native.pack(w, panel), 50)
    np.testing.assert_array_equal(have, np.full((1, 1, 70, 50), 40.0))
    print(json.dumps({"digest": there and there.digest, "panel": there and there.panel, "why": native.why_missing()}))
"""


def start(folder, warnings="error", **environment):
    """Starts a process that says what it found; variables that are None are taken away."""
    changed = {**os.environ, "JAXINFER_CACHE_DIR": str(folder), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.Popen(
        [sys.executable, "-W", warnings, "-c", textwrap.dedent(PROGRAM)],
        env={name: value for name, value in changed.items() if value is not None},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def told(process):
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and err == "", err[-3000:]
    return json.loads(out)


def kept(folder):
    return sorted((folder / library.FOLDER_NAME).iterdir())


def script(path, text):
    """An executable file with a few lines of shell."""
    path.write_text("#!/bin/sh\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """Looks for the kernels as a new process would, with a cache folder of its own; returns that."""
    monkeypatch.setattr(library, "_loaded", functools.cache(library._loaded.__wrapped__))
    monkeypatch.setenv("JAXINFER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


def assert_missing(*words):
    assert library.library() is None
    for word in words:
        assert word in library.why_missing()


# -- in processes of their own ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(kernels, tmp_path_factory):
    """A cache folder in which two processes that started at once have left the kernels, and what they told."""
    folder = tmp_path_factory.mktemp("settled")
    both = [start(folder), start(folder)]
    return folder, [told(process) for process in both]


def test_two_processes_leave_one_file(settled):
    folder, (first, second) = settled
    assert first == second and first["why"] == "" and first["panel"] > 0
    assert [path.name for path in kept(folder)] == [f"kernels-{first['digest']}.so"]


def test_the_next_process_compiles_nothing(settled, kernels, tmp_path):
    """A compiler under another name has kernels of its own, which the second process that uses it finds."""
    folder, (first, _) = settled
    log = tmp_path / "log"
    command = " ".join(library._compiler())
    compiler = script(tmp_path / "logging-cc", f'echo "$@" >> {log}\nexec {command} "$@"\n')
    (before,) = kept(folder)
    once = told(start(folder, CC=str(compiler)))
    assert once["why"] == "" and once["digest"] != first["digest"]
    (file,) = set(kept(folder)) - {before}
    made = file.stat().st_mtime_ns
    assert told(start(folder, CC=str(compiler))) == once
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1
    assert len(kept(folder)) == 2 and file.stat().st_mtime_ns == made


def test_turned_off(tmp_path):
    assert told(start(tmp_path, JAXINFER_NATIVE="off")) == {
        "digest": None,
        "panel": None,
        "why": "JAXINFER_NATIVE is off",
    }
    assert not (tmp_path / library.FOLDER_NAME).exists()


@pytest.mark.slow
def test_a_process_without_a_compiler(tmp_path):
    (tmp_path / "empty").mkdir()
    found = told(start(tmp_path, PATH=str(tmp_path / "empty"), CC=None))
    assert found["digest"] is None
    assert all(word in found["why"] for word in ("gcc", "clang", "CC"))


@pytest.mark.slow
def test_a_process_with_a_compiler_that_fails(tmp_path):
    found = told(start(tmp_path, CC="false"))
    assert found["digest"] is None and found["why"].startswith("false does not compile the native kernels")


@pytest.mark.slow
def test_a_process_without_a_folder_to_write_to(kernels, tmp_path):
    """Then each one compiles for itself. (The cache of timings has a warning of its own.)"""
    (tmp_path / "file").write_text("no folder")
    found = told(start(tmp_path / "file" / "below", warnings="ignore"))
    assert found["why"] == "" and found["digest"]
    assert (tmp_path / "file").read_text() == "no folder"


# -- in this one ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["off", "OFF", "0", "no", "False"])
def test_words_that_turn_it_off(word, anew, monkeypatch):
    monkeypatch.setenv(library.SWITCH, word)
    assert_missing("JAXINFER_NATIVE is off")


@pytest.mark.parametrize("word", ["", "on", "1"])
def test_words_that_do_not(word, anew, monkeypatch):
    """What comes next is the question of the system."""
    monkeypatch.setenv(library.SWITCH, word)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert_missing("for Linux")


def test_once_for_all_calls(kernels):
    assert library.library() is library.library() is kernels
    assert library.why_missing() == ""


def test_on_other_systems(anew, monkeypatch):
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    assert_missing("for Linux", "Darwin")


def test_without_a_compiler(anew, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_missing("gcc", "clang", "CC")


def test_with_a_compiler_that_fails(anew, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert_missing("false does not compile the native kernels")


@pytest.mark.parametrize("name", ["no-such-compiler-here", "", "  "])
def test_a_compiler_that_is_not_there_is_passed_over(name, anew, monkeypatch, tmp_path):
    cc = script(tmp_path / "cc", "exit 0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", name)
    assert library._compiler() == [cc.name]


@pytest.mark.parametrize("name", ["cc", "gcc", "clang"])
def test_any_compiler_will_do(name, anew, monkeypatch, tmp_path):
    script(tmp_path / name, "exit 0\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert library._compiler() == [name]


def test_a_compiler_with_options(anew, monkeypatch, kernels):
    """They are part of what the kernels depend on."""
    monkeypatch.setenv("CC", " ".join([*library._compiler(), "-DSOMETHING_ELSE"]))
    found = library._digest(library._compiler())
    assert library._compiler()[-1] == "-DSOMETHING_ELSE"
    assert found == library._digest(library._compiler()) != kernels.digest


@pytest.mark.parametrize("change", ["_FLAGS", "_CPU"])
def test_what_kernels_depend_on(change, anew, monkeypatch, kernels, tmp_path):
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name: another one\n\nprocessor: 1\n")
    other = {"_FLAGS": [*library._FLAGS, "-O2"], "_CPU": tmp_path / "cpuinfo"}
    assert library._digest(library._compiler()) == kernels.digest
    monkeypatch.setattr(library, change, other[change])
    assert library._digest(library._compiler()) != kernels.digest


def test_sources_are_part_of_it(anew, monkeypatch, kernels, tmp_path):
    for source in library._sources():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(library, "_SOURCES", tmp_path)
    assert library._digest(library._compiler()) == kernels.digest
    (tmp_path / "vector.h").write_text("// another one\n")
    assert library._digest(library._compiler()) != kernels.digest


def test_a_compiler_that_knows_its_name_only(anew, monkeypatch, tmp_path):
    """The message is the first line of what it says, and no half file is left."""
    compiler = script(
        tmp_path / "half-cc",
        """
        test "$1" = --version && exec echo half a compiler
        echo "no such processor" >&2
        echo "compilation terminated" >&2
        exit 3
        """,
    )
    monkeypatch.setenv("CC", str(compiler))
    assert_missing(f"{compiler} does not compile", "no such processor")
    assert "terminated" not in library.why_missing()
    assert kept(anew) == []


def test_a_compiler_that_never_ends(anew, monkeypatch, tmp_path):
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    compiler = script(tmp_path / "slow-cc", "exec sleep 60\n")
    monkeypatch.setenv("CC", str(compiler))
    assert_missing(f"{compiler} cannot be run", "timed out")


def test_a_file_that_is_no_library(anew, monkeypatch, tmp_path):
    """What was kept is damaged: the message names it."""
    compiler = script(
        tmp_path / "false-cc",
        """
        test "$1" = --version && exec echo another compiler
        for last; do :; done
        echo garbage > "$last"
        """,
    )
    monkeypatch.setenv("CC", str(compiler))
    assert_missing("cannot be loaded", "remove it")
    (file,) = kept(anew)
    assert str(file) in library.why_missing()


@pytest.mark.parametrize("folder", [None, "file/below"])
def test_no_folder(folder, anew, monkeypatch, tmp_path):
    """Where nothing can be kept, a file for this process alone is compiled."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(library, "default_folder", lambda: folder and tmp_path / folder)
    compiler = script(tmp_path / "quick-cc", 'for last; do :; done\necho compiled > "$last"\n')
    with library._file([str(compiler)], "0") as path:
        assert path.read_text() == "compiled\n"
    assert not path.exists() and not anew.exists()
