"""The wire contract from end to end, with nothing but a Redis client: one yard, the demo model, one worker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time

import msgpack
import pytest

from lorayard.demo import ADAPTERS
from lorayard.demo.effects import CHECKS

QUESTION = "What does len mean?"
BROKEN_PAYLOAD = b"\x81\xa6prompt"


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """A folder for adapters that come later."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def yard(start, roots):
    return start("--adapters", str(roots), "--slots", "2")


@pytest.fixture
def paused(yard):
    """Jobs reach the GPU queue and wait there. Call it to go on."""

    def go_on():
        yard.redis.delete("rq:suspended")

    yard.redis.set("rq:suspended", 1)
    yield go_on
    go_on()


def test_redis_cli_is_enough(yard):
    assert yard.talk("XADD", "yard:in", "*", "id", "cli", "prompt", QUESTION, "max_tokens", "4", "temperature", "0")
    yard.final("cli")
    said = yard.talk("XREAD", "BLOCK", "30000", "STREAMS", "yard:out:cli", "0")
    assert all(word in said for word in ("done", "length", "new_tokens", "base_digest", "t_first_ms"))
    yard.talk("XADD", "yard:in", "*", "id", "cli2", "prompt", QUESTION, "max_tokens", "4", "reply", "list")
    assert '"ev' in yard.talk("BLPOP", "yard:reply:cli2", "30").replace("\\", "")
    assert "shout" in yard.talk("HGETALL", "yard:adapters")
    assert "base_digest" in yard.talk("HGETALL", "yard:info")


def test_streamed_text_joins_to_the_whole(yard):
    job = yard.submit(prompt=QUESTION, stream=1, max_tokens=24, temperature=0)
    done, tokens = yard.final(job), [event for event in yard.events(job) if event["ev"] == "tok"]
    assert "".join(event["text"] for event in tokens) == done["text"]
    at = [int(event["at"]) for event in tokens]
    assert at[0] == 0 and at == sorted(set(at)) and len(at) > 1
    assert {event["sample"] for event in tokens} == {"0"} and {event["attempt"] for event in tokens} == {"1"}
    assert int(done["t_queue_ms"]) <= int(done["t_first_ms"]) <= int(done["t_total_ms"])


def test_list_reply_is_read_once(yard):
    job = yard.submit(prompt=QUESTION, reply="list", max_tokens=3)
    _, text = yard.redis.blpop(f"yard:reply:{job}", 30)
    assert json.loads(text)["new_tokens"] <= 3
    assert not yard.redis.exists(f"yard:reply:{job}", f"yard:out:{job}")


def test_batch_reply_shares_a_stream(yard):
    yard.redis.xgroup_create("yard:res:corpus", "sink", "0", mkstream=True)
    jobs = {
        yard.submit("yard:in:batch", prompt=QUESTION, reply="batch", batch="corpus", max_tokens=2) for _ in range(3)
    }
    jobs.add(yard.submit(prompt=QUESTION, reply="batch", batch="corpus", temperature="hot"))
    taken: dict[str, dict[str, str]] = {}
    deadline = time.monotonic() + 30
    while len(taken) < len(jobs) and time.monotonic() < deadline:
        for _, entries in yard.redis.xreadgroup("sink", "s1", {"yard:res:corpus": ">"}, block=1000):
            taken |= {fields["id"]: fields for _, fields in entries}
    assert taken.keys() == jobs
    assert sorted(fields["ev"] for fields in taken.values()) == ["done", "done", "done", "error"]


def test_no_reply_leaves_no_answer(yard):
    job = yard.submit(prompt=QUESTION, reply="none", max_tokens=1)
    yard.until(lambda: yard.redis.hget(f"rq:job:{job}", "status") == "finished")
    assert not yard.redis.exists(f"yard:out:{job}", f"yard:reply:{job}")


def test_prompt_messages_tokens_and_payload(yard):
    chat = [{"role": "user", "content": QUESTION}]
    greedy = {"temperature": 0, "max_tokens": 6}
    by_text = yard.final(yard.submit(prompt=f"<|user|>\n{QUESTION}\n<|assistant|>\n", **greedy))
    by_chat = yard.final(yard.submit(messages=json.dumps(chat), **greedy))
    packed = msgpack.packb({"id": "packed", "messages": chat, "max_tokens": 99, "temperature": 0})
    yard.submit(payload=packed, max_tokens=6)
    assert by_chat["text"] == yard.final("packed")["text"] == by_text["text"]
    assert by_chat["prompt_tokens"] == by_text["prompt_tokens"], "the template's BOS is the only one"
    done = yard.final(yard.submit(tokens="[0, 5, 6, 7]", **greedy))
    assert (done["ev"], done["prompt_tokens"]) == ("done", "4")


def test_our_own_ids(yard):
    for stream, letter in (("yard:in", ""), ("yard:in:urgent", "u"), ("yard:in:batch", "b")):
        entry = yard.redis.xadd(stream, {"prompt": QUESTION, "max_tokens": 1})
        assert yard.final(letter + entry)["ev"] == "done"


def test_a_drawn_seed_is_told_and_repeats_the_text(yard):
    first = yard.final(yard.submit(prompt=QUESTION, max_tokens=12))
    again = yard.final(yard.submit(prompt=QUESTION, max_tokens=12, seed=first["seed"]))
    assert again["text"] == first["text"] and again["seed"] == first["seed"]
    others = {yard.final(yard.submit(prompt="A", max_tokens=12, seed=seed))["text"] for seed in range(4)}
    assert len(others) > 1


def test_several_samples_with_what_was_asked_for(yard):
    asked = {"prompt": QUESTION, "max_tokens": 6, "temperature": 3, "seed": 5, "return_token_ids": 1, "logprobs": 2,
             "prompt_logprobs": 1, "stream": 1, "banned_strings": '["e"]', "top_k": 200}  # fmt: skip
    one, two = yard.submit(**asked), yard.submit(n=3, **asked)
    done, single = yard.final(two), yard.final(one)
    texts, ids, logprobs = (json.loads(done[name]) for name in ("texts", "token_ids", "logprobs"))
    assert len(set(texts)) == 3 and not any("e" in text.lower() for text in texts) and "text" not in done
    assert (texts[0], ids[0], logprobs[0]) == (
        single["text"], json.loads(single["token_ids"]), json.loads(single["logprobs"]),
    )  # fmt: skip
    assert json.loads(done["finishes"])[0] == single["finish"] and len(json.loads(done["stop_matches"])) == 3
    assert int(done["new_tokens"]) == sum(map(len, ids))
    assert [[each["id"] for each in sample] for sample in logprobs] == ids
    assert all(len(each["top"]) == 2 and each["logprob"] <= each["top"][0][1] <= 0 for each in logprobs[0])
    assert len(json.loads(done["prompt_logprobs"])) == int(done["prompt_tokens"]) - 1
    told = {sample: "" for sample in "012"}
    for event in yard.events(two)[:-1]:
        told[event["sample"]] += event["text"]
    assert list(told.values()) == texts


def test_stop_strings_end_the_text(yard):
    whole = yard.final(yard.submit(prompt=QUESTION, max_tokens=16, temperature=0))["text"]
    word = whole.strip().split()[-1]
    job = yard.submit(prompt=QUESTION, max_tokens=16, temperature=0, stop=json.dumps([word]), stream=1)
    done = yard.final(job)
    assert (done["text"], done["finish"], done["stop_match"]) == (whole.partition(word)[0], "stop", word)
    assert "".join(event.get("text", "") for event in yard.events(job) if event["ev"] == "tok") == done["text"]


def test_every_adapter_has_its_effect_in_one_mixed_batch(yard):
    digests = {name: json.loads(text)["digest"] for name, text in yard.redis.hgetall("yard:adapters").items()}
    jobs = {name: yard.submit(prompt=QUESTION, adapter=name, temperature=0, max_tokens=128) for name in (*CHECKS, "")}
    done = {name: yard.final(job) for name, job in jobs.items()}
    for name, check in CHECKS.items():
        assert check(done[name]["text"]), (name, done[name]["text"])
        assert (done[name]["adapter"], done[name]["adapter_digest"]) == (name, digests[name])
        assert not check(done[""]["text"])
    assert done[""]["adapter"] == done[""]["adapter_digest"] == ""


def test_weighted_sums(yard):
    fields = {"prompt": QUESTION, "temperature": 0, "max_tokens": 8}
    digests = {name: json.loads(text)["digest"] for name, text in yard.redis.hgetall("yard:adapters").items()}
    both = yard.final(yard.submit(adapter="shout*0.7+bullets*0.3", **fields))
    assert both["adapter"] == "bullets*0.3+shout*0.7"
    assert both["adapter_digest"] == f"{digests['bullets']}+{digests['shout']}"
    nothing = yard.final(yard.submit(adapter="shout*0", **fields))
    assert nothing["text"] == yard.final(yard.submit(**fields))["text"]


BAD = [
    ("bad_field", {"temperature": "warm"}, "temperature"),
    ("bad_field", {"temperature": "-1"}, "temperature"),
    ("bad_field", {"colour": "red"}, "colour"),
    ("bad_field", {"n": "65"}, "n must be between 1 and 64"),
    ("bad_field", {"cfg_scale": "2"}, "cfg_scale is not supported"),
    ("bad_field", {"stop": "[1.5]"}, "stop"),
    ("bad_field", {"prompt": None, "tokens": "[999999]"}, "999999"),
    ("bad_field", {"prompt": None, "messages": '[{"role": 1}]'}, "messages"),
    ("bad_payload", {"payload": BROKEN_PAYLOAD}, "payload"),
    ("bad_adapter", {"adapter": "../x"}, "../x"),
    ("bad_adapter", {"adapter": "shout*much"}, "shout*much"),
    ("no_adapter", {"adapter": "nosuch"}, "nosuch"),
    ("no_adapter", {"adapter": "shout", "adapter_digest": "0" * 32}, "adapter_digest"),
    ("no_prompt", {"tokens": "[1]"}, "prompt"),
    ("too_large", {"max_tokens": "100000"}, "2048"),
    ("too_large", {"prompt": "word " * 3000}, "2048"),
    ("expired", {"deadline_ms": "1"}, "deadline"),
]


@pytest.mark.parametrize("code, fields, named", BAD)
def test_bad_input_is_refused_by_name(yard, code, fields, named):
    fields = {"id": f"bad-{BAD.index((code, fields, named))}", "prompt": QUESTION} | fields
    error = yard.final(yard.submit(**{name: value for name, value in fields.items() if value is not None}))
    assert error.keys() == {"ev", "code", "error"}
    assert error["code"] == code and named in error["error"], error
    yard.until(lambda: yard.dead(code=error["code"], error=error["error"]))


def test_an_id_that_is_a_path_touches_nothing(yard):
    entry = yard.redis.xadd("yard:in", {"id": "../x", "prompt": QUESTION})
    yard.until(lambda: yard.dead(entry=entry))
    [refused] = yard.dead(entry=entry)
    assert (refused["code"], refused["id"]) == ("bad_id", "../x")
    assert not list(yard.redis.scan_iter("*../x*"))


def test_the_same_id_again(yard):
    fields = {"id": "twice", "prompt": QUESTION, "max_tokens": 3}
    yard.submit(**fields)
    yard.submit(**fields)
    first = yard.final("twice")
    entry = yard.redis.xadd("yard:in", fields | {"prompt": "another"})
    yard.submit(**fields)
    yard.until(lambda: yard.dead(entry=entry, code="bad_id"))
    assert yard.final(yard.submit(prompt=QUESTION, max_tokens=1))["ev"] == "done"
    assert yard.events("twice") == [first] and len(yard.dead(id="twice")) == 1


def test_cancel_queued_running_and_early(yard, paused):
    queued = yard.submit(prompt=QUESTION)
    yard.until(lambda: yard.redis.hget(f"rq:job:{queued}", "status") == "queued")
    yard.cancel(queued)
    assert yard.final(queued) == {"ev": "cancelled"}
    paused()
    running = yard.submit(prompt=QUESTION, min_tokens=1500, max_tokens=1500, stream=1)
    yard.until(lambda: yard.events(running))
    yard.cancel(running)
    assert yard.final(running) == {"ev": "cancelled"}
    yard.cancel("later")
    yard.until(lambda: yard.redis.exists("yard:cancelled:later"))
    assert yard.final(yard.submit(id="later", prompt=QUESTION)) == {"ev": "cancelled"}
    assert int(yard.redis.hget("rq:job:" + queued, "attempt") or 0) == 0


def test_deadline_queued_and_running(yard, paused):
    queued = yard.submit(prompt=QUESTION, deadline_ms=int(time.time() * 1000) + 300)
    assert yard.final(queued)["code"] == "expired"
    assert yard.redis.hget(f"rq:job:{queued}", "attempt") is None
    paused()
    running = yard.submit(
        prompt=QUESTION, min_tokens=1500, max_tokens=1500, stream=1, deadline_ms=int(time.time() * 1000) + 1500
    )
    assert yard.final(running)["code"] == "expired"
    assert yard.redis.hget(f"rq:job:{running}", "attempt") == "1"


def test_rq_info_shows_the_queue_and_the_jobs_in_flight(yard, paused):
    jobs = [yard.submit(prompt=QUESTION, min_tokens=1500, max_tokens=1500, stream=1) for _ in range(5)]
    yard.until(lambda: all(yard.redis.hget(f"rq:job:{job}", "status") == "queued" for job in jobs))
    assert "5, 0 executing" in rq_info(yard)
    paused()
    yard.until(lambda: all(map(yard.events, jobs)))
    [gpu] = yard.workers()
    said = rq_info(yard)
    assert re.search(rf"{gpu} +\S* ?0, 5 executing", said), said
    assert re.search(rf"{gpu}\.[0-9a-f]{{6}} .*busy {gpu}", said), said
    for job in jobs:
        yard.cancel(job)
    assert {yard.final(job)["ev"] for job in jobs} == {"cancelled"}, "looking must change nothing"


def rq_info(yard):
    return subprocess.run(
        [sys.executable, "-m", "rq.cli", "info", "-u", f"redis://127.0.0.1:{yard.port}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def copy_adapter(name, folder):
    """Put an adapter where it is seen whole or not at all."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ADAPTERS / name, folder.with_name(f".{folder.name}"))
    folder.with_name(f".{folder.name}").rename(folder)


def digest_of(yard, name):
    said = yard.redis.hget("yard:adapters", name)
    return json.loads(said)["digest"] if said else None


def test_a_new_folder_is_a_new_adapter_and_replaced_bytes_another(yard, roots):
    assert yard.final(yard.submit(prompt=QUESTION, adapter="fresh"))["code"] == "no_adapter"
    copy_adapter("shout", roots / "fresh")
    yard.until(lambda: digest_of(yard, "fresh"), 10)
    fields = {"prompt": QUESTION, "adapter": "fresh", "temperature": 0, "max_tokens": 128}
    first = yard.final(yard.submit(**fields))
    assert CHECKS["shout"](first["text"])
    copy_adapter("bullets", roots / "fresh")
    yard.until(lambda: digest_of(yard, "fresh") not in (None, first["adapter_digest"]), 10)
    second = yard.final(yard.submit(**fields, adapter_digest=digest_of(yard, "fresh")))
    assert CHECKS["bullets"](second["text"]) and second["adapter_digest"] != first["adapter_digest"]
    assert yard.final(yard.submit(**fields, adapter_digest=first["adapter_digest"]))["code"] == "no_adapter"


def test_a_job_never_runs_with_other_bytes_than_it_was_accepted_for(yard, roots, paused):
    copy_adapter("shout", roots / "swapped")
    yard.until(lambda: digest_of(yard, "swapped"), 10)
    old = digest_of(yard, "swapped")
    job = yard.submit(prompt=QUESTION, adapter="swapped")
    yard.until(lambda: yard.redis.hget(f"rq:job:{job}", "status") == "queued")
    copy_adapter("json", roots / "swapped")
    yard.until(lambda: digest_of(yard, "swapped") not in (None, old), 10)
    paused()
    error = yard.final(job)
    assert error["code"] == "no_adapter" and "replaced" in error["error"]


def test_a_malformed_adapter_disturbs_nobody(yard, roots):
    folder = roots / "broken"
    copy_adapter("shout", folder)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    yard.until(lambda: digest_of(yard, "broken"), 10)
    error = yard.final(yard.submit(prompt=QUESTION, adapter="broken"))
    assert error["code"] == "no_adapter" and "broken" in error["error"]
    assert yard.final(yard.submit(prompt=QUESTION, max_tokens=1))["ev"] == "done"
    shutil.rmtree(folder)
    yard.until(lambda: digest_of(yard, "broken") is None, 10)


def test_stops_clean(yard):
    job = yard.submit(prompt=QUESTION, max_tokens=4)
    yard.final(job)
    assert yard.close() == 0
    assert not [line for line in (yard.data / "worker.log").read_text().splitlines() if "Traceback" in line]
