"""The command's frame: help that teaches and costs nothing, and one sentence with the right status for every fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import click
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from lorayard.shared import cli, errors
from lorayard.shared.cli import COMMANDS, redis_options, run

SLOW_TO_IMPORT = {"torch", "numpy", "redis", "rq", "rich", "lorayard.dispatcher", "lorayard.worker"}


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a command named `try` into the table, which runs the given function."""

    def install(function: Callable[..., Any], *decorators: Callable[..., Any]) -> None:
        module = ModuleType("fake_commands")
        for decorator in decorators:
            function = decorator(function)
        module.command = click.command()(function)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "fake_commands", module)
        monkeypatch.setitem(COMMANDS, "try", ("fake_commands:command", "For tests."))

    return install


def raising(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


def test_help_imports_nothing_heavy():
    code = (
        f"import sys; from lorayard.shared.cli import run; run(['--help']); print({SLOW_TO_IMPORT} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.endswith("set()\n")
    assert all(name in out and line in " ".join(out.split()) for name, (_, line) in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_an_example(name, capsys):
    assert run([name, "--help"]) == 0
    assert f"lorayard {name}" in capsys.readouterr().out.partition("\n")[2]  # below the usage line


def test_version(capsys):
    assert run(["--version"]) == 0
    assert "0.1.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error, status",
    [
        (errors.LorayardError("it is so"), 1),
        (errors.Refused("no_adapter", "it is so"), 1),
        (errors.UsageError("it is so"), 2),
        (errors.RedisUnavailable("it is so"), 3),
        (errors.AdapterError("it is so"), 4),
        (errors.NotSupported("it is so"), 4),
    ],
)
def test_an_error_is_one_sentence_and_a_status(error, status, command, capsys):
    command(raising(error))
    assert run(["try"]) == status
    assert capsys.readouterr() == ("", "lorayard: it is so\n")


def test_a_lost_redis_is_one_sentence(command, capsys):
    command(raising(RedisConnectionError("Connection closed by server.")))
    assert run(["try"]) == 3
    assert capsys.readouterr().err == "lorayard: Redis failed: Connection closed by server.\n"


def test_an_interrupt_ends_with_130(command, capsys):
    command(raising(KeyboardInterrupt()))
    assert run(["try"]) == 130
    assert capsys.readouterr().err.strip() == "lorayard: interrupted"


def test_a_missing_package_names_its_extra(command, capsys):
    command(raising(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")))
    assert run(["try"]) == 1
    assert capsys.readouterr().err == "lorayard: this needs the package torch.nn: pip install 'lorayard[worker]'\n"


def test_a_fault_of_ours_keeps_its_traceback(command):
    command(raising(ModuleNotFoundError("No module named 'nonsense'", name="nonsense")))
    with pytest.raises(ModuleNotFoundError):
        run(["try"])
    command(raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        run(["try"])


def test_a_status_returned_by_a_command_is_the_exit_status(command):
    command(lambda: 5)
    assert run(["try"]) == 5


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["up", "--nonsense"]])
def test_unknown_words_are_usage_errors(arguments, capsys):
    assert run(arguments) == 2
    assert "nonsense" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("no_color, color", [("1", False), ("", None)])
def test_no_color_is_honoured(no_color, color, command, monkeypatch):
    monkeypatch.setenv("NO_COLOR", no_color)
    seen = []
    command(lambda: seen.append(click.get_current_context().color))
    run(["try"])
    assert seen == [color]


def test_redis_options_come_from_environment_and_arguments(command, monkeypatch):
    seen: list[tuple[str, str]] = []
    command(lambda redis_url, prefix: seen.append((redis_url, prefix)), redis_options)
    run(["try"])
    monkeypatch.setenv("LORAYARD_REDIS_URL", "redis://elsewhere")
    monkeypatch.setenv("LORAYARD_PREFIX", "mine:")
    run(["try"])
    run(["try", "--redis", "unix:///x", "--prefix", "theirs"])
    assert seen == [(cli.DEFAULT_URL, "yard:"), ("redis://elsewhere", "mine:"), ("unix:///x", "theirs:")]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "name the folder of a MODEL or ask for --demo"),
        ([".", "--demo"], "one of the two"),
        ([".", "--show"], "--show is a tour of the demo"),
        (["--demo", "--redis", "redis://x", "--redis-port", "6390"], "does not go with --redis"),
        (["no-such-folder"], "'no-such-folder' does not exist"),
        (["--demo", "--slots", "0"], "0 is not in the range x>=1"),
    ],
)
def test_up_refuses_what_it_cannot_mean(arguments, sentence, capsys):
    assert run(["up", *arguments]) == 2
    assert sentence in capsys.readouterr().err
