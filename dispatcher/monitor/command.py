"""`lorayard monitor`: the web page of a yard, and /metrics."""

from __future__ import annotations

import ipaddress
import signal
import threading

import click

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect, display
from lorayard.shared.errors import LorayardError, UsageError
from lorayard.shared.keys import Keys

from ..watch import HELP
from .recorder import Recorder
from .server import LOOPBACK, MonitorServer

PORT = 9180
EXAMPLES = """\b
Examples:
  lorayard monitor
  LORAYARD_MONITOR_TOKEN=secret lorayard monitor --bind 0.0.0.0
  lorayard monitor --allow-host yard.example.org      behind a reverse proxy"""


@click.command(epilog=EXAMPLES, context_settings=HELP)
@click.option("--bind", default="127.0.0.1", show_default=True, metavar="IP", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any that is free.")
@click.option("--token", envvar="LORAYARD_MONITOR_TOKEN", show_envvar=True, default="",
              help="What requests must show. The variable hides it better.")  # fmt: skip
@click.option("--allow-host", multiple=True, metavar="NAME",
              help="Another name by which browsers may call it. May be given again.")  # fmt: skip
@redis_options
def monitor(bind: str, port: int, token: str, allow_host: tuple[str, ...], redis_url: str, prefix: str) -> None:
    """Serve a yard's web page and /metrics until Ctrl-C. It only reads."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server, recorder = serve(redis_url, prefix, bind, port, token, allow_host)
    click.echo(f"monitoring {display(redis_url)} on {address(server)}")
    stop.wait()
    server.shutdown()
    server.server_close()
    recorder.stop()


def serve(
    redis_url: str, prefix: str, bind: str, port: int, token: str, names: tuple[str, ...] = ()
) -> tuple[MonitorServer, Recorder]:  # fmt: skip
    """Start the server and its recorder in threads. Raises UsageError, LorayardError."""
    try:
        loopback = ipaddress.IPv4Address(bind).is_loopback
    except ValueError:
        raise UsageError(f"--bind must be an IPv4 address such as 127.0.0.1 or 0.0.0.0, not {bind[:80]!r}") from None
    if not loopback and not token:
        raise UsageError("who can reach an address that is not loopback could read prompts: set a --token for it")
    redis, keys = connect(redis_url), Keys(prefix)
    recorder = Recorder(redis, keys)
    hosts = frozenset(name.lower() for name in (*LOOPBACK, bind, *names)) if loopback or names else None
    try:
        server = MonitorServer((bind, port), redis, keys, recorder, token, hosts)
    except OSError as error:
        raise LorayardError(f"the monitor cannot listen on {bind}:{port}: {error.strerror}; choose a --port") from None
    recorder.look()
    recorder.start()
    threading.Thread(target=server.serve_forever, name="monitor", daemon=True).start()
    return server, recorder


def address(server: MonitorServer) -> str:
    """Where a browser finds it."""
    host, port = server.server_address[:2]
    return f"http://{host if isinstance(host, str) else host.decode()}:{port}"
