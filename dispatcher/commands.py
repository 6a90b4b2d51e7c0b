"""The commands of the side without a GPU: submit, info, adapters, dispatcher."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from lorayard.shared.cli import INTERRUPTED, redis_options
from lorayard.shared.connect import connect, display
from lorayard.shared.errors import LorayardError, UsageError
from lorayard.shared.keys import CLASSES, Keys, rq_queue

from .client import Client, Event, JobFailed, as_result
from .published import read_adapters
from .serve import DEFAULT_LIMIT, Dispatcher

HELP = {"help_option_names": ["-h", "--help"]}
LANES_SHOWN = 20

SUBMIT_EXAMPLES = """\b
Examples:
  lorayard submit "What does len do?"
  lorayard submit "What does len do?" --adapter 'shout*0.8+bullets*0.2' --temperature 0
  echo "What does len do?" | lorayard submit - --json | jq -r .text
  lorayard submit --chat "What does len do?"
  lorayard submit --messages '[{"role": "user", "content": "What does len do?"}]'"""


@click.command(epilog=SUBMIT_EXAMPLES, context_settings=HELP)
@click.argument("prompt")
@click.option(
    "--adapter", default="", metavar="SET", help="Adapters with scales, ID*SCALE+ID. Default: the base alone."
)
@click.option("--chat", is_flag=True, help="Put PROMPT into the model's chat template.")
@click.option("--messages", is_flag=True, help="PROMPT is a JSON list of chat messages, for the chat template.")
@click.option("--max-tokens", type=int, help="Most new tokens.  [default: 256]")
@click.option("--min-tokens", type=int, help="Fewest new tokens.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: 1]")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that have P together.")
@click.option(
    "--min-p", type=float, help="Draw from tokens with at least this part of the likeliest one's probability."
)
@click.option("--repetition-penalty", type=float, help="Above 1: tokens seen before become less likely.")
@click.option("--frequency-penalty", type=float, help="Taken off per occurrence in the new text.")
@click.option("--presence-penalty", type=float, help="Taken off once for tokens in the new text.")
@click.option("--seed", type=int, help="The same seed gives the same text.  [default: drawn]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text. May be given several times.")
@click.option("--class", "cls", type=click.Choice(CLASSES), default="normal", show_default=True, help="Urgency.")
@click.option("--id", "id", help="Id of the job; sending it again has no effect.  [default: drawn]")
@click.option("--timeout", type=float, metavar="S", help="Give up waiting after so many seconds; the job goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print the final event as one JSON object.")
@click.option("--no-stream", is_flag=True, help="Print the text when it is whole.")
@redis_options
def submit(
    prompt: str, chat: bool, messages: bool, stop: tuple[str, ...], timeout: float | None, as_json: bool,
    no_stream: bool, redis_url: str, prefix: str, **fields: Any,
) -> int:  # fmt: skip
    """Send PROMPT to a running yard and print the answer as it is made; `-` reads it from standard input.

    Ctrl-C cancels the job. Exit status 1 if the job failed.
    """
    body = _body(sys.stdin.read() if prompt == "-" else prompt, chat, messages)
    client = Client(redis_url, prefix)
    show = not (as_json or no_stream)
    job_id = client.submit(**body, **fields, stop=list(stop) or None, stream=show)
    try:
        final = _follow(client, job_id, timeout, show)
    except KeyboardInterrupt:
        client.cancel(job_id)
        click.echo(f"\nlorayard: interrupted; job {job_id} is cancelled", err=True)
        return INTERRUPTED
    if as_json:
        click.echo(json.dumps({"ev": final.kind, "id": job_id, **final.fields}, ensure_ascii=False))
        return 0 if final.kind == "done" else JobFailed.exit_status
    result = as_result(job_id, final)
    click.echo("" if show else result.text)
    return 0


def _body(text: str, chat: bool, messages: bool) -> dict[str, Any]:
    """The field that holds the prompt. Raises UsageError."""
    if chat and messages:
        raise UsageError("--chat makes a message of the prompt, --messages says that it is messages; use one of them")
    if chat:
        return {"messages": [{"role": "user", "content": text}]}
    if not messages:
        return {"prompt": text}
    try:
        said = json.loads(text)
    except ValueError as error:
        raise UsageError(f"with --messages the prompt must be a JSON list of messages: {error}") from None
    if not isinstance(said, list):
        raise UsageError("with --messages the prompt must be a JSON list of messages")
    return {"messages": said}


def _follow(client: Client, job_id: str, timeout: float | None, show: bool) -> Event:
    """Wait for the final event, printing what comes before it if asked to."""
    printed = ""
    for event in client.stream(job_id, timeout):
        if event.kind == "restart" and printed:
            click.echo("\nlorayard: the worker was lost; the answer begins again", err=True)
            printed = ""
        elif event.kind == "tok" and show:
            click.echo(event.text, nl=False)
            printed += event.text
        elif event.final:
            if show and event.text.startswith(printed):
                click.echo(event.text[len(printed) :], nl=False)
            return event
    raise AssertionError("a stream ends with a final event")


@click.command(epilog="Example: LORAYARD_REDIS_URL=redis://127.0.0.1:6390/0 lorayard info", context_settings=HELP)
@redis_options
def info(redis_url: str, prefix: str) -> None:
    """Show a running yard: its model, each GPU with its queue and slots, and the jobs that wait."""
    redis: Any = connect(redis_url, decode_responses=True)
    keys, console = Keys(prefix), Console()
    said = redis.hgetall(keys.info)
    if not said:
        raise LorayardError(f"no worker has joined a yard at {display(redis_url)} with prefix {prefix}")
    rows = [
        ("model", f"{said.get('model')}, digest {said.get('base_digest', '')[:12]}"),
        ("version", f"{said.get('version')}, wire {said.get('wire_version')}"),
        ("tokens of a job", f"{said.get('cache_tokens')} at most, prompt and answer together"),
        ("adapters", str(redis.hlen(keys.adapters))),
        *((f"{cls} jobs", redis.hget(keys.depth, cls) or "0") for cls in CLASSES),
        ("refused entries", str(redis.xlen(keys.dead))),
    ]
    console.print(_table(("yard", display(redis_url)), rows))
    gpus = sorted(redis.smembers(keys.gpus))
    console.print(
        _table(("gpu", "state", "queued", "running", "seats", "swaps", "slots"), _gpu_rows(redis, keys, gpus))
    )
    lanes = redis.zrange(keys.lanes, 0, LANES_SHOWN - 1)
    if lanes:
        depths = [(lane, str(redis.llen(keys.lane(*lane.split(":", 1))))) for lane in lanes]
        console.print(_table(("waiting lane", "jobs"), depths))


def _gpu_rows(redis: Any, keys: Keys, gpus: list[str]) -> Iterator[tuple[str, ...]]:
    """Rows of the table of GPUs."""
    for gpu in gpus:
        said, table, load = (redis.hgetall(key(gpu)) for key in (keys.gpu, keys.slots, keys.load))
        queued = redis.llen(rq_queue(gpu))
        slots = [
            f"{table[index]}{' (closing)' if table.get(f'{index}.state') == 'closing' else ''}"
            for index in sorted(filter(str.isdigit, table), key=int)
        ]
        running = sum(map(int, load.values())) - queued
        shown = "\n".join(slots) or "-"
        yield (
            gpu, said.get("state", "no worker"), str(queued), str(running), said.get("seats", "-"),
            said.get("swaps", "-"), shown,
        )  # fmt: skip


@click.command(epilog="Example: LORAYARD_REDIS_URL=redis://127.0.0.1:6390/0 lorayard adapters", context_settings=HELP)
@redis_options
def adapters(redis_url: str, prefix: str) -> None:
    """List the adapters that jobs may name."""
    redis: Any = connect(redis_url)
    found = read_adapters(redis.hgetall(Keys(prefix).adapters))
    if not found:
        raise LorayardError(f"no worker has published an adapter at {display(redis_url)} with prefix {prefix}")
    rows = [(name, str(one.rank), f"{one.size:,}", one.digest[:12]) for name, one in found.items()]
    Console().print(_table(("adapter", "rank", "bytes", "digest"), rows))


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    return table


@click.command(
    epilog="Example: LORAYARD_REDIS_URL=rediss://me:secret@host/0 lorayard dispatcher", context_settings=HELP
)
@click.option(
    "--max-waiting", type=click.IntRange(1), default=DEFAULT_LIMIT, show_default=True, metavar="N",
    help="Jobs of a class that may wait or run; more are refused as busy.",
)  # fmt: skip
@redis_options
def dispatcher(max_waiting: int, redis_url: str, prefix: str) -> None:
    """Run a dispatcher: it checks jobs, queues them and decides which GPU gets which adapters. No GPU needed.

    Several may run at once, on any hosts; when one dies, the others take over.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    served = Dispatcher(connect(redis_url), Keys(prefix), max_waiting)
    signal.signal(signal.SIGTERM, lambda *_: served.stop())
    signal.signal(signal.SIGINT, lambda *_: served.stop())
    logging.getLogger(__name__).info("dispatcher %s serves %s", served.name, display(redis_url))
    served.serve()
