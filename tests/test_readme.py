"""Every command of README.md runs, in order, as it stands there; only the port is exchanged for a free one."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorayard.demo import ADAPTERS, BASE

from .conftest import missing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OPEN = "The yard is open"
pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


MAKE, UP, REDIS_CLI, COMMANDS, INSTALL_AND_UP, GENERATE = blocks("sh")
CLIENT, ENGINE = blocks("python")
INSTALL, UP_MODEL = INSTALL_AND_UP.strip().splitlines()


def environment() -> dict[str, str]:
    """Our environment with this Python's scripts first on the PATH, and the README's two variables."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LORAYARD_")}
    return clean | {"PATH": path, "MODEL": str(BASE), "ADAPTERS": str(ADAPTERS), "NO_COLOR": "1"}


def sh(script: str, cwd: Path) -> str:
    """Run a block by bash and return what it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(script: str, cwd: Path) -> str:
    """Run a block by this Python and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def opened(command: str, cwd: Path) -> Iterator[str]:
    """Run `lorayard up ...` until it says that the yard is open; yield its screen; stop it."""
    words = ["bash", "-euc", f"exec {command}"]
    with subprocess.Popen(words, cwd=cwd, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if OPEN in line:
                break
        yield "".join(lines)
        process.terminate()
        assert process.wait(60) == 0


@pytest.fixture(scope="module")
def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="module")
def yard(port: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from opened(UP.strip().replace("6390", port), tmp_path_factory.mktemp("yard"))


def test_make_targets() -> None:
    """`make demo` and `make test` are what the gate runs; here they only have to be there."""
    makefile, gate = (ROOT / "Makefile").read_text(), (ROOT / ".ci/run").read_text()
    for command in re.findall(r"^make \w+", MAKE, re.MULTILINE):
        assert re.search(rf"^{command.split()[1]}:", makefile, re.MULTILINE), command
        assert command in gate, command


def test_redis_cli(yard: str, port: str, tmp_path: Path) -> None:
    assert OPEN in yard
    if not shutil.which("redis-cli"):
        missing("redis-cli")
    said = sh(REDIS_CLI.replace("6390", port), tmp_path)
    assert "done" in said and "shout" in said
    assert re.search(r"^text\n[^a-z]*[A-Z][^a-z]*$", said, re.MULTILINE), said


def test_commands(yard: str, port: str, tmp_path: Path) -> None:
    said = sh(COMMANDS.replace("6390", port), tmp_path)
    assert "- " in said and "bullets" in said and "cpu-" in said


def test_client(yard: str, port: str, tmp_path: Path) -> None:
    assert python(CLIENT.replace("6390", port), tmp_path).strip().startswith('{"answer": ')


def test_own_model(tmp_path: Path) -> None:
    """The demo's folders stand for the user's, and the CPU for the GPU."""
    for screen in opened(f"{UP_MODEL} --cpu-workers 1", tmp_path):
        assert OPEN in screen


def test_install_names_extras() -> None:
    """The installation itself would fetch gigabytes; the extras that it names must exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.search(r"\[(.*)\]", INSTALL)
    assert named and set(named[1].split(",")) <= set(extras)


def test_engine_alone(tmp_path: Path) -> None:
    assert sh(GENERATE, tmp_path).strip()


def test_engine_from_python() -> None:
    said = python(ENGINE, ROOT)
    assert "- " in said and re.search(r"[A-Z]{4}", said)
