"""The team of threads, compiled with a program that tries it; once more with what finds races, if there is that."""

import re
import subprocess
from pathlib import Path

import pytest
from compiled_c import HERE, build

# Those that it does not know by name fail.
CHECKS = re.findall(r"^static void (?!share_)(\w+)\(void\) \{", (HERE / "team_harness.c").read_text(), re.M)
FORKS = {"after_fork", "fork_amid_work"}
# Where each access to memory is watched, pieces with many items take seconds.
LARGE = {"before_any_resize", "every_size", "resize"}


def run(path, check):
    done = subprocess.run([path, check], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]


@pytest.fixture(scope="module")
def team(kernels, tmp_path_factory):
    path = build(tmp_path_factory.mktemp("team"), "team_harness.c", ["team.c"], "-O2", "-Werror")
    assert isinstance(path, Path), path
    return path


@pytest.fixture(scope="module")
def watched_team(kernels, tmp_path_factory):
    """With ThreadSanitizer, where compiler and machine have it."""
    path = build(tmp_path_factory.mktemp("watched"), "team_harness.c", ["team.c"], "-O2", "-fsanitize=thread")
    if not isinstance(path, Path):
        pytest.skip(f"no ThreadSanitizer: {path.strip().splitlines()[-1]}")
    # Some kernels of Linux place memory where it does not look for any.
    if subprocess.run([path, "nothing"], capture_output=True, timeout=120).returncode != 2:
        pytest.skip("ThreadSanitizer does not run here")
    return path


@pytest.mark.parametrize("check", CHECKS)
def test_team(team, check):
    run(team, check)


@pytest.mark.parametrize("check", [c for c in CHECKS if c not in FORKS | LARGE])
def test_without_races(watched_team, check):
    run(watched_team, check)


@pytest.mark.slow
@pytest.mark.parametrize("check", sorted(LARGE))
def test_without_races_among_many_items(watched_team, check):
    run(watched_team, check)
