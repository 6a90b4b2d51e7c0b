"""What is installed is what is here: the wheel holds every file, and the pins fit the ranges."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

from lorayard.shared import __version__

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {package: folder for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
MAX_DEMO_BYTES = 4 << 20


def files_below(folder: Path) -> set[str]:
    """Relative names of all files, without caches."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_every_folder_with_code_is_in_the_list_of_packages():
    found = {
        ".".join([package, *path.parent.relative_to(ROOT / folder).parts])
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{name}"
        for package, folder in FOLDERS.items()
        for name in files_below(ROOT / folder)
    }
    assert packed == expected


def test_every_pin_fits_its_range():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [*PROJECT["project"]["dependencies"], *(line for extra in extras.values() for line in extra)]:
        wanted = Requirement(line)
        assert wanted.specifier.contains(pins[wanted.name]), line


def test_the_base_install_needs_no_torch():
    base = {Requirement(line).name for line in PROJECT["project"]["dependencies"]}
    assert base == {"click", "msgpack", "redis", "rich", "rq"}


def test_one_version():
    assert PROJECT["project"]["version"] == __version__


def test_the_demo_is_small():
    folder = ROOT / FOLDERS["lorayard.demo"]
    assert sum((folder / name).stat().st_size for name in files_below(folder)) <= MAX_DEMO_BYTES
