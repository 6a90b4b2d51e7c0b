"""The commands that send and serve: submit, cancel, dispatcher."""

from __future__ import annotations

import json
import logging
import signal
import sys
from typing import Any

import click

from lorayard.shared.cli import INTERRUPTED, redis_options
from lorayard.shared.connect import connect, display
from lorayard.shared.errors import UsageError
from lorayard.shared.keys import CLASSES, Keys

from .client import Client, Event, JobFailed, as_result
from .serve import DEFAULT_LIMIT, Dispatcher
from .validate import JOB_ID
from .watch import HELP

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


@click.command(epilog="Example: lorayard cancel 5f0c6d1e2a3b4c5d6e7f8a9b another-id", context_settings=HELP)
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@redis_options
def cancel(ids: tuple[str, ...], redis_url: str, prefix: str) -> None:
    """Ask for the end of jobs: one that waits never runs, one that runs stops within a step.

    Each still gets its final event, `cancelled`. A job that has ended is left as it is; a job that is yet to come is
    cancelled if it comes within an hour.
    """
    for job_id in ids:
        if not JOB_ID.fullmatch(job_id):
            raise UsageError(f"an id must match {JOB_ID.pattern}, not {job_id[:80]!r}")
    client = Client(redis_url, prefix)
    for job_id in ids:
        client.cancel(job_id)
    click.echo(f"asked for the end of {len(ids)} {'job' if len(ids) == 1 else 'jobs'}")


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
