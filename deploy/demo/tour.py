"""A tour of the demo's yard, made of plain Redis commands: whatever it does, any client can do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

import click
from redis import Redis

from lorayard.shared.errors import LorayardError
from lorayard.shared.keys import Keys

QUESTION = "What does json.dumps do?\n"
SETS = ("", "shout", "bullets", "json")
MIX = ("", "json", "bullets", "", "bullets*0.5", "json")
"""LoRA sets of the mixed batch: two combinations beside the base, one of them at two scales."""

SILENCE_S = 60.0
POLL_MS = 20
PIECE = 16
"""Characters that are printed together; an event has a token or two."""
COLORS = {"base": "white", "shout": "yellow", "bullets": "green", "json": "cyan"}


class Tour:
    """Submits jobs to a yard with one worker and prints what its streams and tables say meanwhile.

    `redis` decodes its replies.
    """

    def __init__(self, redis: Redis, keys: Keys) -> None:
        self.redis = cast(Any, redis)  # its types leave open whether replies are decoded
        self.keys = keys
        self.gpu: str = sorted(self.redis.smembers(keys.gpus))[0]
        self.slots = self._slots()
        self.mixed: dict[str, int] = {}
        """Jobs of each combination at the moment when most combinations were on the GPU together."""

    def submit(self, lora: str, prompt: str, **options: str | int) -> str:
        """Send one job and return its id, which is the id of the stream entry."""
        fields: dict[str, str | int] = {"prompt": prompt, "temperature": 0, "stream": 1, **options}
        if lora:
            fields["adapter"] = lora
        return str(self.redis.xadd(self.keys.stream("normal"), fields))

    def follow(self, jobs: Mapping[str, str], show_text: bool) -> dict[str, dict[str, str]]:
        """Read the streams of jobs (id -> label) to their ends, print as they come, and return the final events."""
        position = {self.keys.out(job): "0" for job in jobs}
        label = {self.keys.out(job): jobs[job] for job in jobs}
        final: dict[str, dict[str, str]] = {}
        pending = dict.fromkeys(position, "")
        deadline = time.monotonic() + SILENCE_S
        while position:
            for stream, entries in self.redis.xread(position, block=POLL_MS):
                deadline = time.monotonic() + SILENCE_S
                for entry, event in entries:
                    position[stream] = entry
                    pending[stream] += event.get("text", "") if event["ev"] == "tok" else ""
                    last = event["ev"] in ("done", "error", "cancelled")
                    if show_text and (len(pending[stream]) >= PIECE or last and pending[stream]):
                        _say(label[stream], pending[stream])
                        pending[stream] = ""
                    if last:
                        final[stream] = event
                        del position[stream]
            self._watch_gpu()
            if time.monotonic() > deadline:
                raise LorayardError(f"the yard was silent for {SILENCE_S:.0f} s with {len(position)} jobs unanswered")
        for stream, event in final.items():
            if event["ev"] != "done":
                raise LorayardError(f"the job for {label[stream]} ended with {event['ev']}: {event.get('error')}")
        return {job: final[self.keys.out(job)] for job in jobs}

    def show_slots(self) -> None:
        """Print the slot table."""
        swaps = self.redis.hget(self.keys.gpu(self.gpu), "swaps")
        click.echo(f"\n  slots of {self.gpu}, swapped {swaps} times so far")
        for slot, combination in self._slots().items():
            state = self.redis.hget(self.keys.slots(self.gpu), f"{slot}.state")
            click.echo(f"    {slot}  {combination:<10} {state}")

    def _watch_gpu(self) -> None:
        """Print slots that have changed since the last look, and remember the most mixed batch."""
        slots = self._slots()
        for slot, combination in slots.items():
            before = self.slots.get(slot)
            if before != combination:
                what = f"{before} had drained, now {combination}" if before else f"takes {combination}"
                click.secho(f"  {'slot ' + slot:>8} : {what}", bold=True)
        self.slots = slots
        load = self.redis.hgetall(self.keys.load(self.gpu))
        if len(load) > len(self.mixed):
            self.mixed = {_plain(combination): int(jobs) for combination, jobs in load.items()}

    def _slots(self) -> dict[str, str]:
        """Slot -> combination, without digests."""
        table = self.redis.hgetall(self.keys.slots(self.gpu))
        return {slot: _plain(table[slot]) for slot in sorted(table) if slot.isdigit()}


def tour(redis: Redis, keys: Keys) -> None:
    """Walk through it. Raises LorayardError when a job does not end well."""
    guide = Tour(redis, keys)
    _title(f"One question to the base and to three adapters: {QUESTION.strip()}")
    jobs = {guide.submit(lora, QUESTION, max_tokens=64): lora or "base" for lora in SETS}
    answers = guide.follow(jobs, show_text=True)
    _title("The same answers in one piece")
    for job, label in jobs.items():
        _say(label, answers[job]["text"])
    guide.show_slots()

    _title("A mixed batch: base, two adapters, and one of them at half its strength")
    guide.mixed = {}
    jobs = {guide.submit(lora, QUESTION, max_tokens=64): lora or "base" for lora in MIX}
    answers = guide.follow(jobs, show_text=False)
    for job, label in jobs.items():
        _say(label, answers[job]["text"])
    together = ", ".join(f"{jobs} x {combination}" for combination, jobs in sorted(guide.mixed.items()))
    click.echo(f"\n  on {guide.gpu} together: {together}")
    guide.show_slots()
    click.echo()


def _title(text: str) -> None:
    click.secho(f"\n{text}\n", bold=True)


def _say(label: str, text: str) -> None:
    """One labelled line; a new line in the text is shown as a slash."""
    color = COLORS.get(label.partition("*")[0])
    click.echo(click.style(f"{label:>12} | ", fg=color) + text.replace("\n", " / "))


def _plain(combination: str) -> str:
    return "+".join(part.partition("@")[0] for part in combination.split("+"))
