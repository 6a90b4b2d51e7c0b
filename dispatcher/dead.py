"""`lorayard dead`: the entries that dispatchers refused, to look at and to send again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click
from redis.exceptions import ResponseError
from rich.console import Console

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect
from lorayard.shared.errors import REFUSALS, LorayardError, UsageError
from lorayard.shared.keys import CLASSES, Keys

from .fields import read
from .snapshot import clean
from .validate import JOB_ID
from .watch import HELP, table

PAGE = 500
OURS = (b"entry", b"to", b"cut", b"code", b"error")
"""What the yard adds to the original fields."""

EXAMPLES = """\b
Examples:
  lorayard dead list --code busy
  lorayard dead show 1790000000000-0
  lorayard dead resubmit 1790000000000-0 --id another-id"""


@click.group(epilog=EXAMPLES, context_settings=HELP)
def dead() -> None:
    """Show the entries that dispatchers refused, each with its reason, and send them again."""


@dead.command("list", epilog="Example: lorayard dead list --code no_adapter", context_settings=HELP)
@click.option("--code", type=click.Choice(list(REFUSALS)), help="Only those refused with this code.")
@click.option("--last", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="How many, at most.")
@redis_options
def list_(code: str | None, last: int, redis_url: str, prefix: str) -> None:
    """List refused entries, the latest first."""
    redis: Any = connect(redis_url)
    rows = []
    for entry, fields in _latest(redis, Keys(prefix).dead):
        if code in (None, _said(fields, "code")):
            rows.append((entry, _said(fields, "code"), _said(fields, "id"), _said(fields, "error")))
        if len(rows) == last:
            break
    if not rows:
        click.echo(f"nothing was refused{f' as {code}' if code else ''}")
        return
    Console().print(table(("entry", "code", "id", "reason"), rows))


@dead.command(epilog="Example: lorayard dead show 1790000000000-0", context_settings=HELP)
@click.argument("entry")
@redis_options
def show(entry: str, redis_url: str, prefix: str) -> None:
    """Show all fields of ENTRY, an id of `lorayard dead list`."""
    fields = _find(connect(redis_url), Keys(prefix), entry)
    rows = [(clean(name), clean(value)) for name, value in fields.items()]
    Console().print(table(("field", "value"), rows))


@dead.command(
    short_help="Send ENTRY again, to its class.",
    epilog="Example: lorayard dead resubmit 1790000000000-0 --id another-id",
    context_settings=HELP,
)
@click.argument("entry")
@click.option("--id", "job_id", metavar="NEW", help="Send it under this id. Needed if the job named its own.")
@redis_options
def resubmit(entry: str, job_id: str | None, redis_url: str, prefix: str) -> None:
    """Send ENTRY again, with its original fields to its original class, and take it off the list.

    The id of a refused job is known until its ttl is over, so it needs a new one, unless it was refused as busy.
    """
    redis: Any = connect(redis_url)
    keys = Keys(prefix)
    fields = _find(redis, keys, entry)
    stream, code = _said(fields, "to"), _said(fields, "code")
    if stream not in map(keys.stream, CLASSES):
        raise UsageError(f"entry {entry} was no job; it came by {stream or 'an unknown stream'}")
    if _said(fields, "cut") != "0":
        raise UsageError(f"entry {entry} was too long to be kept whole, so it cannot be sent again from here")
    if job_id is not None and not JOB_ID.fullmatch(job_id):
        raise UsageError(f"--id must match {JOB_ID.pattern}")
    original: dict[Any, Any] = {name: value for name, value in fields.items() if name not in OURS}
    named = read(original)[0].get("id")
    if named is not None and job_id is None and code != "busy":
        raise UsageError(
            f"id {named} is known as refused ({code}) until its ttl is over; give the job another with --id"
        )
    pipe = redis.pipeline()
    pipe.xadd(stream, original | ({b"id": job_id} if job_id else {}))
    pipe.xdel(keys.dead, entry)
    added, _ = pipe.execute()
    click.echo(f"sent to {stream} as entry {added.decode()}{f', id {job_id or named}' if job_id or named else ''}")


def _latest(redis: Any, key: str) -> Iterator[tuple[str, Mapping[bytes, bytes]]]:
    """All entries from the last to the first, read in pages."""
    end = "+"
    while page := redis.xrevrange(key, max=end, count=PAGE):
        for entry, fields in page:
            yield entry.decode(), fields
        end = f"({page[-1][0].decode()}"


def _find(redis: Any, keys: Keys, entry: str) -> Mapping[bytes, bytes]:
    """The fields of one entry. Raises UsageError, LorayardError."""
    try:
        found = redis.xrange(keys.dead, entry, entry)
    except ResponseError:
        raise UsageError(f"{entry!r} is no id of an entry, such as 1790000000000-0: lorayard dead list") from None
    if not found:
        raise LorayardError(f"there is no refused entry {entry} (any more): lorayard dead list")
    fields: Mapping[bytes, bytes] = found[0][1]
    return fields


def _said(fields: Mapping[bytes, bytes], name: str) -> str:
    return clean(fields.get(name.encode(), b""))
