"""`lorayard corpus`: generate a text for every row of a file, each once, whatever dies meanwhile."""

from __future__ import annotations

import itertools
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lorayard.shared.cli import redis_options
from lorayard.shared.connect import connect
from lorayard.shared.errors import LorayardError, UsageError
from lorayard.shared.keys import Keys

from ..published import Published, read_published
from . import books, spec
from .folder import Folder
from .progress import Bar, Lines, Swaps, lasting
from .pump import Pump
from .request import Maker
from .shards import column_types
from .source import count_rows, rows, spool

FIRST_ROWS = 1000
"""Rows that the columns' types are told by."""
WITH_FAILURES, STOPPED = 5, 6
FAILURES_SHOWN = 10
PAUSE, CANCEL = "pause", "cancel"

HELP = {"help_option_names": ["-h", "--help"]}
EXAMPLES = """\b
Examples:
  lorayard corpus run prompts.jsonl -o out/ --max-tokens 64 --temperature 0
  lorayard corpus run rows.parquet -o out/ --prompt "Explain: {text}" --id-column id --adapter-column style
  lorayard corpus run job.yaml -o out/
  lorayard corpus status out/
  lorayard corpus export out/ --to jsonl -o all.jsonl

Run the same command again to go on after whatever stopped it.

\b
Exit status: 0 all texts are there, 2 wrong option, 3 no Redis, 4 a file or folder at fault, 5 some texts failed,
6 stopped before the end, 7 the folder belongs to another corpus."""


@click.group(epilog=EXAMPLES, context_settings=HELP)
def corpus() -> None:
    """Generate a text for every row of a file, into a folder of shards: each row once, and which adapter wrote it."""


def corpus_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The input and how its texts are made."""
    options = [
        click.argument("source", metavar="INPUT"),
        click.option("--format", "form", type=click.Choice(spec.FORMATS), help="If the input's name does not say."),
        click.option("--id-column", metavar="NAME", help="Column that names a row; else its place in the file does."),
        click.option("--prompt", metavar="TEXT", help="A template with {column}s; else the column prompt or messages."),
        click.option("--adapter", metavar="SET", help="LoRA set of all rows, such as sql or sql*0.7+pirate*0.3."),
        click.option("--adapter-column", metavar="NAME", help="Column with each row's LoRA set."),
        click.option(
            "--missing-adapter", type=click.Choice(("fail", "base")), help="What a row with an empty column means."
        ),
        click.option("--max-tokens", type=int, help="Most new tokens of a text."),
        click.option("--temperature", type=float, help="0 takes the likeliest token."),
        click.option("--top-p", type=float), click.option("--top-k", type=int), click.option("--min-p", type=float),
        click.option("--n", type=int, help="Samples of each row."),
        click.option("--seed", type=int, help="Of the corpus; every text has its own, made from it."),
        click.option("--shard-format", type=click.Choice(spec.SHARD_FORMATS), help="Of the shards."),
        click.option("--shard-rows", type=int, help="Most rows of a shard."),
        click.option("--window", type=int, help="Most jobs under way at once."),
    ]  # fmt: skip
    for option in reversed(options):
        option(function)
    return function


def described(source: str, options: dict[str, Any]) -> spec.Corpus:
    """The corpus of a job file, or of flags alone; flags override a file's keys."""
    if source.endswith((".yaml", ".yml")):
        made = spec.from_file(Path(source))
    else:
        made = spec.Corpus(spec.Input(spec.absolute(source, Path())))
    given = {name: value for name, value in options.items() if value is not None}
    sampled = {name: given.pop(name) for name in list(given) if hasattr(made.sample, name)}
    parts: dict[str, Any] = {"sample": replace(made.sample, **sampled)}
    changes: dict[str, dict[str, str]] = {
        "input": {"form": "format", "id_column": "id"}, "run": {"window": "window"},
        "adapter": {"adapter": "fixed", "adapter_column": "column", "missing_adapter": "missing"},
        "output": {"shard_format": "format", "shard_rows": "shard_rows"},
    }  # fmt: skip
    for part, names in changes.items():
        changed = {field: given.pop(flag) for flag, field in names.items() if flag in given}
        parts[part] = replace(getattr(made, part), **changed)
    return replace(made, **parts, **given)


folder_argument = click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Progress as JSON lines.")


@corpus.command(context_settings=HELP)
@corpus_options
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="Folder of the corpus.")
@json_option
@redis_options
def run(source: str, out: Path, as_json: bool, redis_url: str, prefix: str, **options: Any) -> int:
    """Make the texts of INPUT: a file of rows (JSON lines, CSV, Parquet, an OpenAI batch file), - or a job file."""
    made = described(source, options)
    out.mkdir(parents=True, exist_ok=True)
    return _fill(out, replace(made, input=spool(made.input, out)), as_json, connect(redis_url), Keys(prefix))


@corpus.command(context_settings=HELP)
@folder_argument
@json_option
@redis_options
def resume(folder: Path, as_json: bool, redis_url: str, prefix: str) -> int:
    """Go on with the run that made FOLDER, with the options that it had."""
    return _fill(folder, Folder.open(folder).corpus, as_json, connect(redis_url), Keys(prefix))


def _fill(out: Path, made: spec.Corpus, as_json: bool, redis: Any, keys: Keys) -> int:
    """Run a corpus until its end, or as far as it comes; -> exit status."""
    yard, base, digest = _yard(redis, keys)
    found = rows(made.input)
    first = list(itertools.islice(found, FIRST_ROWS))
    folder = Folder.make(out, made, digest, column_types(row.columns for row in first if not row.fault))
    held = folder.lock()
    folder.ledger.set(wish="")
    maker = Maker(folder.corpus, {name: one.digest for name, one in yard.adapters.items()}, base)
    all_rows = itertools.chain(first, found)
    in_all = len(first) if len(first) < FIRST_ROWS else count_rows(made.input)
    total = None if in_all is None else in_all * made.sample.n
    swaps, bar = Swaps(redis, keys), sys.stderr.isatty() and not as_json
    with Bar(total, swaps) if bar else Lines(total, swaps, as_json) as screen:
        pump = Pump(redis, keys, folder, maker, all_rows, screen.heard, _wish(folder))
        whole = pump.run()
        if isinstance(screen, Lines):
            screen.say(pump)
    (out / "report.md").write_text(books.report(folder))
    del held
    return _ended(folder, whole)


def _yard(redis: Any, keys: Keys) -> tuple[Published, str, str]:
    """(what the workers publish, name of the model, its digest). Raises LorayardError."""
    published = read_published(redis, keys)
    name, digest = redis.hmget(keys.info, "model", "base_digest")
    if published is None or digest is None:
        raise LorayardError("no worker has joined the yard yet; start one with `lorayard up` or `lorayard worker`")
    return published, (name or b"").decode(), digest.decode()


def _wish(folder: Folder) -> Callable[[], str]:
    """What the user wants: nothing, or an end, by a signal or by another process through the ledger."""
    said: list[str] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: said.append(PAUSE))
    return lambda: said[0] if said else folder.ledger.get("wish")


def _ended(folder: Folder, whole: bool) -> int:
    counts = folder.ledger.counts()
    if not whole:
        click.echo(f"stopped before the end; the same command goes on: {folder.path}", err=True)
        return STOPPED
    click.echo(f"{counts['done']:,} texts in {folder.path / 'data'}, {counts['rejected']:,} rejected", err=True)
    if counts["failed"]:
        click.echo(
            f"{counts['failed']:,} texts failed: lorayard corpus status {folder.path} says why, retry tries again",
            err=True,
        )
        return WITH_FAILURES
    return 0


@corpus.command(context_settings=HELP)
@corpus_options
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="New tokens/s of the yard, to tell the time.")
@redis_options
def plan(source: str, rate: float | None, redis_url: str, prefix: str, **options: Any) -> None:
    """Say what a run of INPUT would do, without sending anything."""
    redis, keys = connect(redis_url), Keys(prefix)
    yard, base, _ = _yard(redis, keys)
    made = described(source, options)
    if made.input.path == "-":
        raise UsageError("a plan needs a file, standard input can be read only once")
    maker = Maker(made, {name: one.digest for name, one in yard.adapters.items()}, base)
    texts = characters = 0
    adapters: dict[str, int] = {}
    faults: dict[str, int] = {}
    for request in itertools.chain.from_iterable(map(maker.requests, rows(made.input))):
        texts += 1
        if request.fault:
            faults[request.fault] = faults.get(request.fault, 0) + 1
        else:
            adapters[request.adapter] = adapters.get(request.adapter, 0) + 1
            characters += len(request.prompt)
    sent, most = sum(adapters.values()), made.sample.max_tokens or 256
    click.echo(
        f"{texts:,} texts, {sent:,} to be sent, {characters:,} characters of prompts, "
        f"at most {sent * most:,} new tokens{f', {lasting(sent * most / rate)} at {rate:,g} tokens/s' if rate else ''}"
    )
    for name, count in sorted(adapters.items()):
        click.echo(f"  {name or 'base'}: {count:,}")
    for fault, count in sorted(faults.items(), key=lambda one: -one[1])[:20]:
        click.echo(f"  cannot be sent, {count:,}: {fault}")


@corpus.command(context_settings=HELP)
@folder_argument
@click.option("--json", "as_json", is_flag=True)
def status(folder: Path, as_json: bool) -> None:
    """Show how far a corpus is, and why texts failed or were rejected."""
    opened = Folder.open(folder)
    counts = opened.ledger.counts()
    if as_json:
        why = [dict(zip(("state", "code", "texts"), one, strict=True)) for one in opened.ledger.reasons()]
        failed = [
            {"row": one.name, "row_key": one.key, "code": one.code, "reason": one.reason}
            for one in opened.ledger.failed()
        ]
        shards, wish = len(opened.ledger.shards()), opened.ledger.get("wish")
        click.echo(json.dumps({"counts": counts, "reasons": why, "failed": failed, "shards": shards, "wish": wish}))
        return
    click.echo(books.report(opened), nl=False)
    for text in itertools.islice(opened.ledger.failed(), FAILURES_SHOWN):
        click.echo(f"row {text.name}: {text.code}: {text.reason}")
    if counts["failed"] > FAILURES_SHOWN:
        click.echo(f"and {counts['failed'] - FAILURES_SHOWN:,} more; --json lists all")


@corpus.command(context_settings=HELP)
@folder_argument
@click.option("--code", metavar="CODE", help="Only those that failed with this code.")
def retry(folder: Path, code: str | None) -> None:
    """Let failed texts run again at the next `corpus run`."""
    opened = Folder.open(folder)
    held = opened.lock()
    click.echo(f"{opened.ledger.retry(code):,} texts will run again")
    del held


@corpus.command(context_settings=HELP)
@folder_argument
def verify(folder: Path) -> int:
    """Check that shards and ledger agree and no text is there twice; exit status 1 if not."""
    opened = Folder.open(folder)
    faults = books.verify(opened)
    for fault in faults:
        click.echo(fault)
    if not faults:
        click.echo(f"{opened.ledger.counts()['done']:,} texts in {len(opened.ledger.shards()):,} shards, each once")
    return 1 if faults else 0


@corpus.command(context_settings=HELP)
@folder_argument
@click.option("--to", "kind", type=click.Choice(books.KINDS), default="jsonl", show_default=True)
@click.option("-o", "--output", "out", required=True, type=click.Path(path_type=Path), help="The file to write.")
@click.option("--canonical", is_flag=True, help="By row key, without what another run may fill otherwise.")
@click.option("--dedupe", metavar="HOW", default="", help="Leave out duplicates: exact, or minhash:0.9 for near ones.")
def export(folder: Path, kind: str, out: Path, canonical: bool, dedupe: str) -> None:
    """Write all texts into one file, in the order of the input."""
    texts, duplicates = books.export(Folder.open(folder), kind, out, canonical, dedupe)
    left_out = f", {duplicates:,} duplicates left out" if dedupe else ""
    click.echo(f"{texts:,} texts in {out}{left_out}", err=True)


@corpus.command(context_settings=HELP)
@folder_argument
@click.option("-n", "count", default=5, show_default=True, help="How many.")
@click.option("--by-adapter", is_flag=True, help="So many of each LoRA set.")
@click.option("--seed", default=0, show_default=True)
def sample(folder: Path, count: int, by_adapter: bool, seed: int) -> None:
    """Show some texts, drawn evenly."""
    for row in books.sample(Folder.open(folder), count, by_adapter, seed):
        click.echo(f"[{row['adapter'] or 'base'}] {row['row_key']}\n{row['text']}\n")


@corpus.command(context_settings=HELP)
@folder_argument
def pause(folder: Path) -> None:
    """Let the process that fills FOLDER stop; running it again goes on."""
    Folder.open(folder).ledger.set(wish=PAUSE)


@corpus.command(context_settings=HELP)
@folder_argument
def cancel(folder: Path) -> None:
    """As pause, and call back the jobs that wait or run."""
    Folder.open(folder).ledger.set(wish=CANCEL)
