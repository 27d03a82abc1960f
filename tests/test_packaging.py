"""The built wheel, not only the checkout: it holds every module and no other name, and works where it is installed."""

import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import jaxinfer
from jaxinfer.models.zoo import ZOO

ROOT = Path(jaxinfer.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]


def installed_name(path: Path) -> str:
    """The path a source file has in the wheel."""
    folder, *rest = path.relative_to(ROOT).parts
    package = next(name for name, source in FOLDERS.items() if source == folder)
    return "/".join([*package.split("."), *rest])


def sources(pattern: str) -> list[Path]:
    return [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob(pattern))]


def test_the_list_of_packages_equals_the_folders_on_disk():
    folders = {installed_name(path.parent).replace("/", ".") for path in sources("__init__.py")}
    assert sorted(folders) == PROJECT["tool"]["setuptools"]["packages"]


def test_every_module_lies_in_a_package():
    lost = [path for path in sources("*.py") if not (path.parent / "__init__.py").exists()]
    assert not lost


def test_bare_names_of_the_folders_are_banned():
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == set(FOLDERS.values()) - {"jaxinfer"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools leaves folders beside what it builds.
    copy = folder / "source"
    for path in [*sources("*"), *(ROOT / name for name in ("pyproject.toml", "README.md", "LICENSE"))]:
        if path.is_file() and path.suffix != ".pyc":
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(copy))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installation(wheel, tmp_path_factory):
    """The Python of an environment with the wheel, and with what it depends on from this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    run(sys.executable, "-m", "pip", "--python", str(folder), "install", "--quiet", "--no-deps", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    # Only the folder itself: editable installations in it, such as this checkout, are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def run(*command: str, **options) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_wheel_holds_every_module_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {installed_name(path) for pattern in ("*.py", "*.yaml", "*.txt", "py.typed") for path in sources(pattern)}
    assert wanted - names == set()


def test_the_wheel_holds_no_other_name(wheel):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jaxinfer"}


@pytest.mark.slow
def test_the_wheel_works_where_it_is_installed(installation, tmp_path):
    program = (
        "import jaxinfer.rewrites as r, importlib.util as u; print(r.__file__, len(r.RULES), u.find_spec('models'))"
    )
    file, rules, bare = run(str(installation), "-c", program, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installation.parents[1])
    assert int(rules) > 0
    assert bare == "None"
    config = run(str(installation), "-m", "jaxinfer.experiments.run", "--cfg", "job", "task=bench", cwd=tmp_path)
    assert all(f"  {name}:" in config for name in ZOO)


@pytest.mark.slow
def test_the_command_line_works_where_the_wheel_is_installed(installation, tmp_path):
    printed = run(str(installation.with_name("jaxinfer")), "demo", "--tiny", "--tune", "off", cwd=tmp_path)
    assert "same five labels" in printed
    assert (tmp_path / "demo.html").stat().st_size > 1000
