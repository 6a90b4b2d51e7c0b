"""Killing whatever can be killed: every job has one final event, and the text that it has undisturbed."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

JOBS, IN_FLIGHT = 32, 16
"""Of a batch on two workers, and what the victim has of it at least."""
UNREAD = 200
LIVELY = [
    {}, {"mirostat": 1, "mirostat_tau": 5, "temperature": 2},
    {"dry_multiplier": 1, "repetition_range": 9, "repetition_decay": 9},
    {"banned_strings": '["e"]', "xtc_probability": 0.5}, {"token_healing": 1, "typical": 0.9, "top_a": 0.1},
]  # fmt: skip
"""Draws that depend on more than the last token."""
WORDS = "list dict set tuple zip map len sum min max any all print open range sorted".split()


@pytest.fixture(scope="module")
def yard(start):
    return start("--cpu-workers", "2")


def batch(yard, name: str) -> list[str]:
    """Jobs that differ in prompt, seed and adapters, and are the same for every name."""
    pipe = yard.redis.pipeline()
    for i in range(JOBS):
        job = {
            "id": f"{name}-{i}", "prompt": f"What does {WORDS[i % len(WORDS)]} do?", "seed": i, "stream": 1,
            "adapter": ("", "shout", "bullets", "json")[i % 4], "max_tokens": 32, "min_tokens": 32,
        } | LIVELY[i % len(LIVELY)]  # fmt: skip
        pipe.xadd("yard:in", job)
    pipe.execute()
    return [f"{name}-{i}" for i in range(JOBS)]


@pytest.fixture(scope="module")
def undisturbed(yard) -> list[str]:
    """The texts of the batch when nothing is killed."""
    texts = [yard.final(job)["text"] for job in batch(yard, "undisturbed")]
    assert len(set(texts)) > JOBS / 2
    return texts


def read(events: list[dict[str, str]]) -> str:
    """The streamed text for a client that follows the contract."""
    text, attempt = "", "1"
    for event in events:
        if event["ev"] == "restart":
            text, attempt = "", event["attempt"]
        elif event["ev"] == "tok" and event["attempt"] == attempt:
            text += event["text"]
    return text


def check(yard, jobs: list[str], texts: list[str]) -> None:
    """Every job is done, once, with its text; and its stream says the same."""
    for job, text in zip(jobs, texts, strict=True):
        done = yard.final(job)
        assert done["ev"] == "done" and done["text"] == text, (job, done)
        assert read(yard.events(job)) == text


def running_on(yard, jobs: list[str]) -> dict[str, list[str]]:
    """GPU -> those of the jobs that run there and have told some of their text."""
    found: dict[str, list[str]] = {}
    for job in jobs:
        said = yard.redis.hmget(f"rq:job:{job}", "status", "gpu")
        if said[0] == "started" and any(event["ev"] == "tok" for event in yard.events(job)):
            found.setdefault(said[1], []).append(job)
    return found


def test_a_worker_that_slept_past_its_lease_writes_nothing(yard, undisturbed):
    yard.until(lambda: len(yard.workers()) == 2)
    jobs = batch(yard, "asleep")
    yard.until(lambda: running_on(yard, jobs))
    victim, held = max(running_on(yard, jobs).items(), key=lambda item: len(item[1]))
    pid = yard.workers()[victim]
    os.kill(pid, signal.SIGSTOP)
    told = {job: len(yard.events(job)) for job in held}
    check(yard, jobs, undisturbed)
    before = {job: yard.events(job) for job in jobs}
    os.kill(pid, signal.SIGCONT)
    yard.until(lambda: yard.workers().get(victim) not in (None, pid))
    assert {job: yard.events(job) for job in jobs} == before
    assert all(len(before[job]) > told[job] for job in held)


def test_a_killed_worker_loses_nothing_at_five_random_moments(yard, undisturbed):
    chance, took = random.Random(5), []
    for moment in range(5):
        yard.until(yard.workers)  # one is enough; the other may still be starting again
        jobs = batch(yard, f"kill{moment}")
        yard.until(lambda jobs=jobs: max(map(len, running_on(yard, jobs).values()), default=0) >= IN_FLIGHT)
        time.sleep(chance.uniform(0, 0.4))
        victim, held = max(running_on(yard, jobs).items(), key=lambda item: len(item[1]))
        os.kill(yard.workers()[victim], signal.SIGKILL)
        killed = time.monotonic()
        yard.until(lambda held=held: any(yard.redis.hget(f"rq:job:{job}", "deaths") for job in held), 8)
        took.append(time.monotonic() - killed)
        check(yard, jobs, undisturbed)
        assert any(event["ev"] == "restart" for job in held for event in yard.events(job))
    assert min(took) < 1, "a dead child's jobs are back within a second, not when its lease ends"


def test_a_killed_dispatcher_loses_nothing(yard):
    check_unread(yard, "unread", lambda: None)


def test_dispatcher_and_worker_killed_together(yard, undisturbed):
    yard.until(lambda: len(yard.workers()) == 2)
    jobs = batch(yard, "both")
    yard.until(lambda: running_on(yard, jobs))
    victim = yard.workers()[max(running_on(yard, jobs))]
    check_unread(yard, "both", lambda: os.kill(victim, signal.SIGKILL))
    check(yard, jobs, undisturbed)


def check_unread(yard, name: str, also) -> None:
    """Kill the dispatcher while 200 entries are unread."""
    [dispatcher] = yard.children("dispatcher")
    pipe = yard.redis.pipeline(transaction=False)
    for i in range(UNREAD):
        pipe.xadd("yard:in", {"id": f"{name}-u{i}", "prompt": WORDS[i % 16], "max_tokens": 1, "temperature": 0})
    os.kill(dispatcher, signal.SIGSTOP)
    pipe.execute()
    os.kill(dispatcher, signal.SIGCONT)
    os.kill(dispatcher, signal.SIGKILL)
    also()
    yard.until(lambda: yard.children("dispatcher") not in ([], [dispatcher]))
    finals = [yard.final(f"{name}-u{i}") for i in range(UNREAD)]
    assert {final["ev"] for final in finals} == {"done"}
    for i, final in enumerate(finals):
        assert final["text"] == finals[i % 16]["text"]
    assert yard.redis.xlen("yard:in") == 0


def test_sigterm_lets_jobs_finish_and_hands_over_what_waits(yard, undisturbed):
    yard.until(lambda: len(yard.workers()) == 2)
    jobs = batch(yard, "term")
    yard.until(lambda: running_on(yard, jobs))
    gpu, pid = next((gpu, yard.workers()[gpu]) for gpu in running_on(yard, jobs))
    os.kill(pid, signal.SIGTERM)
    check(yard, jobs, undisturbed)
    assert {event["attempt"] for job in jobs for event in yard.events(job) if event["ev"] == "done"} == {"1"}
    yard.until(lambda: yard.workers().get(gpu) not in (None, pid))


def test_a_killed_supervisor_leaves_no_worker_behind(yard, undisturbed):
    yard.until(lambda: len(yard.workers()) == 2)
    [supervisor] = yard.children("worker")
    workers = set(yard.workers().values())
    jobs = batch(yard, "orphans")
    yard.until(lambda: running_on(yard, jobs))
    os.kill(supervisor, signal.SIGKILL)
    check(yard, jobs, undisturbed)
    yard.until(lambda: len(yard.workers()) == 2 and not workers & set(yard.workers().values()), 60)


def test_nothing_is_left_over(yard):
    assert yard.redis.hgetall("yard:depth") == {"normal": "0"}
    assert yard.redis.zrange("yard:lanes", 0, -1) == []
    for gpu in yard.workers():
        assert yard.redis.hgetall(f"yard:load:{gpu}") == {}
        assert not yard.redis.exists(f"rq:wip:{gpu}", f"rq:queue:{gpu}")
    assert yard.redis.xlen("yard:dead") == 0
    assert yard.close() == 0
