"""The `lorayard` command: a table of subcommands, each loaded when it is asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import click

from . import __version__
from .errors import LorayardError, RedisUnavailable

COMMANDS = {
    "up": ("lorayard.shared.up:up", "Start a whole yard on this machine: Redis, dispatcher, workers."),
    "submit": ("lorayard.dispatcher.commands:submit", "Send a prompt to a running yard and print the answer."),
    "generate": ("lorayard.worker.generate.command:generate", "Answer a prompt with the engine alone, without Redis."),
    "cancel": ("lorayard.dispatcher.commands:cancel", "End jobs that wait or run."),
    "info": ("lorayard.shared.info:info", "Show the yard, or what a model would take of each device."),
    "top": ("lorayard.dispatcher.top:top", "Watch the yard, refreshed every second."),
    "monitor": ("lorayard.dispatcher.monitor.command:monitor", "Serve a web page of the yard, and /metrics."),
    "adapters": ("lorayard.shared.cli:adapters", "List the adapters that jobs may name, or check an adapter's folder."),
    "corpus": ("lorayard.dispatcher.corpus.commands:corpus", "Generate a text for every row of a file, each once."),
    "dead": ("lorayard.dispatcher.dead:dead", "Show refused entries, and send them again."),
    "bench": ("lorayard.worker.bench.command:bench", "Measure the speed of the engine on a model that it makes."),
    "dispatcher": ("lorayard.dispatcher.commands:dispatcher", "Run a dispatcher; no GPU needed."),
    "worker": ("lorayard.worker.queue.commands:worker", "Run the workers of this host, one per GPU or on the CPU."),
}
"""Name -> (`module:command`, help line). Help needs no module of these, so it is instant and needs no torch."""

ADAPTER_COMMANDS = {
    "list": ("lorayard.dispatcher.watch:adapters", "List the adapters that jobs may name; done if nothing is said."),
    "check": ("lorayard.worker.lora.check:check", "Say what an adapter's folder does to a base, or why it is refused."),
}

EXTRA_OF = {
    "torch": "worker", "numpy": "worker", "safetensors": "worker", "tokenizers": "worker", "jinja2": "worker",
    "cupy": "gpu", "pynvml": "gpu",
    "prometheus_client": "monitor", "pyarrow": "corpus", "fsspec": "corpus", "yaml": "corpus", "jsonschema": "corpus",
}  # fmt: skip
"""Package that may be absent -> the extra that brings it."""

HELP = {"help_option_names": ["-h", "--help"]}
INTERRUPTED = 130
DEFAULT_URL = "redis://127.0.0.1:6379/0"
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def prefix_option(function: Decorated) -> Decorated:
    """Add `--prefix`; the command gets `prefix`, which ends with a colon."""
    option = click.option(
        "--prefix",
        envvar="LORAYARD_PREFIX",
        default="yard:",
        show_default=True,
        show_envvar=True,
        callback=lambda _context, _option, value: value.rstrip(":") + ":",
        help="What the yard's names in Redis begin with.",
    )
    return option(function)


def redis_options(function: Decorated) -> Decorated:
    """Add `--redis` and `--prefix`; the command gets `redis_url` and `prefix`, which ends with a colon."""
    option = click.option(
        "--redis",
        "redis_url",
        metavar="URL",
        envvar="LORAYARD_REDIS_URL",
        default=DEFAULT_URL,
        show_default=True,
        show_envvar=True,
        help="redis://, rediss://, unix:// or redis+sentinel:// address. The variable hides a password better.",
    )
    return option(prefix_option(function))


class _Lazy(click.Group):
    """A group that lists its commands from a table and imports one only to run it.

    `default` is the command that is meant if none is named.
    """

    def __init__(
        self, *args: Any, table: dict[str, tuple[str, str]], default: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.table, self.default = table, default

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        first = args[0] if args else ""
        if self.default is not None and first not in self.table and first not in HELP["help_option_names"]:
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.table:
            return None
        module, _, name = self.table[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in self.table.items()])


EXAMPLE = """\b
Example, with the model that comes along:
  lorayard up --demo --redis-port 6390
and in a second terminal:
  export LORAYARD_REDIS_URL=redis://127.0.0.1:6390/0
  lorayard submit "What does len do?"
  lorayard submit "What does len do?" --adapter shout

Each command has its own: lorayard COMMAND --help."""


@click.group(cls=_Lazy, table=COMMANDS, epilog=EXAMPLE, context_settings=HELP)
@click.version_option(__version__, prog_name="lorayard")
def cli() -> None:
    """Many LoRA adapters on one quantised base model, on a row of GPUs behind one Redis."""


ADAPTERS_EXAMPLES = """\b
Examples:
  lorayard adapters
  lorayard adapters --redis redis://127.0.0.1:6390/0
  lorayard adapters check MODEL ADAPTERS/sql"""


@click.group(cls=_Lazy, table=ADAPTER_COMMANDS, default="list", epilog=ADAPTERS_EXAMPLES, context_settings=HELP)
def adapters() -> None:
    """List the adapters that jobs may name, or check the folder of one."""


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; every fault of the user is one sentence on stderr."""
    # Said before torch is loaded: its threads, here and in children, must not spin while they wait, or on a busy
    # machine they starve those that have work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    color = False if os.environ.get("NO_COLOR") else None
    try:
        status = cli.main(argv, "lorayard", standalone_mode=False, color=color)
    except click.Abort:  # click's word for an interrupt
        return _fail("interrupted", INTERRUPTED)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except LorayardError as error:
        return _fail(str(error), error.exit_status)
    except ModuleNotFoundError as error:
        extra = EXTRA_OF.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"this needs the package {error.name}: pip install 'lorayard[{extra}]'", 1)
    except Exception as error:
        if not _from_redis(error):
            raise
        return _fail(f"Redis failed: {error}", RedisUnavailable.exit_status)
    return status if isinstance(status, int) else 0


def _from_redis(error: Exception) -> bool:
    """Whether redis-py raised it. The import comes late: help must be instant."""
    from redis.exceptions import RedisError

    return isinstance(error, RedisError)


def _fail(sentence: str, status: int) -> int:
    click.echo(f"lorayard: {sentence}", err=True)
    return status


def main() -> None:
    """Entry point of the `lorayard` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
