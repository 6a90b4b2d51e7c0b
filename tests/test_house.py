"""The rules of the house that no other tool knows."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = dict(PROJECT["tool"]["setuptools"]["package-dir"])
CODE = [path for folder in FOLDERS.values() for path in sorted((ROOT / folder).rglob("*.py"))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
UNPICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


@cache
def tree(path: Path) -> ast.Module:
    with path.open() as file:
        return ast.parse(file.read())


def imports(path: Path) -> Iterator[str]:
    """Full names that a file imports absolutely."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def relative_imports(path: Path) -> set[str]:
    """Modules of its own folder from which a file imports."""
    return {str(node.module) for node in ast.walk(tree(path)) if isinstance(node, ast.ImportFrom) and node.level == 1}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """(source text of what is called, the call)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_files_and_functions_stay_small():
    too_long = []
    for path in [*CODE, *TESTS]:
        lines = len(path.read_text().splitlines())
        if lines > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    too_long.append(f"{where(path, node)} {node.name}: {length} lines")
    assert not too_long


def test_every_folder_is_linked_for_the_tools():
    links = {path.name: path.resolve() for path in (ROOT / ".import" / "lorayard").iterdir()}
    assert links == {package.removeprefix("lorayard."): ROOT / folder for package, folder in FOLDERS.items()}


def test_nothing_is_unpickled():
    found = [f"{path}: {name}" for path in CODE for name in imports(path) if name.partition(".")[0] in UNPICKLERS]
    found += [
        where(path, call)
        for path in CODE
        for name, call in calls(path)
        if name in ("torch.load", "load_state_dict_from_url")
        and not any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in call.keywords)
    ]
    assert not found


def test_nothing_is_evaluated_and_no_shell_is_asked():
    found = [
        where(path, call)
        for path in CODE
        for name, call in calls(path)
        if name in ("eval", "exec", "os.system", "os.popen", "subprocess.getoutput")
        or any(word.arg == "shell" for word in call.keywords)
    ]
    assert not found


def test_folders_are_imported_by_their_full_names_and_from_inside_relatively():
    bare = {package.removeprefix("lorayard.") for package in FOLDERS} - {"demo"}
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*CODE, *TESTS]
        for name in imports(path)
        if name.partition(".")[0] in bare
    ]
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            found += [
                f"{path.relative_to(ROOT)}: {name}" for name in imports(path) if f"{name}.".startswith(f"{package}.")
            ]
    assert not found


KERNELS = sorted(path.stem for path in (ROOT / FOLDERS["lorayard.kernels"]).glob("*.py"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_engine_calls_every_kernel_itself_or_through_another(kernel):
    kernels = ROOT / FOLDERS["lorayard.kernels"]
    callers = [path for path in kernels.glob("*.py") if kernel in relative_imports(path)]
    callers += [
        path
        for path in (ROOT / FOLDERS["lorayard.worker"]).rglob("*.py")
        if f"lorayard.kernels.{kernel}" in imports(path)
    ]
    assert callers


def test_kernels_is_no_package():
    """transformers takes a package named kernels at the root of a checkout for another one of that name."""
    assert not (ROOT / FOLDERS["lorayard.kernels"] / "__init__.py").exists()


def test_the_import_contracts_are_checked():
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    assert all(tool in recipe for tool in ("ruff check", "ruff format", "mypy", "lint-imports"))
    contracts = PROJECT["tool"]["importlinter"]
    assert {f"lorayard.{name}" for name in ("shared", "kernels", "worker", "dispatcher")} <= set(
        contracts["root_packages"]
    )
    assert len(contracts["contracts"]) >= 5
