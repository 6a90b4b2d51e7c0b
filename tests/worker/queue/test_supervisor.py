"""The command, what it starts, and what it publishes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest

from lorayard.demo import ADAPTERS, BASE
from lorayard.shared import cli
from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.errors import ModelError, UsageError
from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts
from lorayard.worker.queue import facts
from lorayard.worker.queue.commands import grouped, places
from lorayard.worker.queue.spec import WorkerSpec, gpu_name
from lorayard.worker.queue.supervisor import AdapterList


def test_a_spec_survives_the_command_line():
    for devices in ("cpu", ("cuda:0", "cuda:1")):
        spec = WorkerSpec(
            "gpu-a-0",
            "gpu-a-0.abc",
            "/model",
            ("/a b", "/c"),
            devices,
            slots=3,
            cache_dtype="q6",
            overrides={"rope_alpha": 2.5},
        )
        assert WorkerSpec.load(spec.dump()) == spec


def test_names_of_queues():
    assert gpu_name("gpu", "node-7.example.org", 3) == "gpu-node-7-example-org-3"
    assert places("h", 2, None) == [("cpu-h-0", "cpu"), ("cpu-h-1", "cpu")]
    assert places("h", None, "cuda:1, cuda:0") == [("gpu-h-1", "cuda:1"), ("gpu-h-0", "cuda:0")]


def test_a_worker_takes_as_many_gpus_as_the_split_has_sizes():
    four = places("h", None, "cuda:0,cuda:1,cuda:2,cuda:3")
    assert grouped(four[:1], None) == [("gpu-h-0", ("cuda:0",))] and grouped([("cpu-h-0", "cpu")], None)[0][1] == "cpu"
    assert grouped(four, "20,7.5") == [
        ("gpu-h-0", ("cuda:0=20GiB", "cuda:1=7.5GiB")),
        ("gpu-h-2", ("cuda:2=20GiB", "cuda:3=7.5GiB")),
    ]
    for found, split in ((four, "20,20,20"), ([("cpu-h-0", "cpu")], "20"), (four, "20,x")):
        with pytest.raises(UsageError, match="--gpu-split"):
            grouped(found, split)


@pytest.mark.parametrize("devices", ["gpu0", "cuda", "cuda:x", "cuda:0,cuda:0", "cpu"])
def test_devices_that_are_none(devices):
    with pytest.raises(UsageError, match="--devices"):
        places("h", None, devices)


def test_workers_of_both_kinds_at_once_are_refused(capsys):
    assert cli.run(["worker", str(BASE), "--cpu-workers", "1", "--devices", "cuda:0"]) == 2
    assert "exclude" in capsys.readouterr().err


@pytest.mark.parametrize("options, status, word", [([], 4, "tokenizer.json"), (["--cache-dtype", "q5"], 2, "not 'q5'")])
def test_what_cannot_be_loaded_ends_it_with_one_sentence(tmp_path, redis_server, redis, options, status, word):
    model = str(BASE if options else tmp_path)
    argv = ["worker", model, "--cpu-workers", "1", "--redis", redis_server.url, "--host", "t", *options]
    ended = subprocess.run(
        [sys.executable, "-m", "lorayard.shared.cli", *argv], capture_output=True, text=True, timeout=60,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == status
    assert ended.stderr.splitlines()[-1].startswith("lorayard: ") and word in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not redis.exists("yard:gpu:cpu-t-0", "rq:workers")


def test_adapters_are_published_as_they_come_change_and_go(redis, tmp_path, caplog):
    redis.hset("yard:held:gpu-h-0", "leftover", "{}")
    adapters = AdapterList(Scripts(redis, Keys()), "gpu-h-0", [tmp_path])
    shutil.copytree(ADAPTERS / "shout", tmp_path / "deep" / "shout")
    (tmp_path / "bad name").mkdir()
    (tmp_path / "bad name" / "adapter_config.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            adapters.refresh()
    assert len(caplog.records) == 1 and "bad name" in caplog.text
    [first] = redis.hvals("yard:adapters")
    assert json.loads(first)["rank"] == 8
    other = json.loads(first) | {"digest": "0" * 32}
    Scripts(redis, Keys()).hold("gpu-i-0", 0, {"of-another-host": json.dumps(other), "shout": json.dumps(other)})
    shutil.copy(ADAPTERS / "json" / "adapter_model.safetensors", tmp_path / "deep" / "shout")
    adapters.refresh()
    assert json.loads(redis.hget("yard:adapters", "shout"))["digest"] != json.loads(first)["digest"]
    shutil.rmtree(tmp_path / "deep")
    adapters.refresh()
    assert redis.hgetall("yard:held:gpu-h-0") == {}
    assert sorted(redis.hkeys("yard:adapters")) == [b"of-another-host", b"shout"]


def test_the_digest_of_a_base_sees_every_file(tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(BASE, folder)
    digests = {facts.base_digest(BASE), *(facts.base_digest(BASE, {"rope_alpha": alpha}) for alpha in (1.0, 2.0))}
    assert facts.base_digest(folder) in digests
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        digests.add(facts.base_digest(folder))
    for name in (*set(facts.SMALL_FILES) - {"config.json"}, "additional_chat_templates/tool_use.jinja"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("other")
        digests.add(facts.base_digest(folder))
    assert len(digests) == 6 + len(facts.SMALL_FILES)


def test_a_yard_has_one_base(redis):
    scripts = Scripts(redis, Keys())
    facts.publish(scripts, "gpu-a-0", {"base_digest": "a" * 32, "model": "one"}, 10_000)
    scripts.register("gpu-a-0", "gpu-a-0.aaaaaa", 10_000, {"slots": 1})
    with pytest.raises(ModelError, match="gpu-a-0"):
        facts.publish(scripts, "gpu-b-0", {"base_digest": "b" * 32, "model": "two"}, 10_000)
    facts.publish(scripts, "gpu-a-0", {"base_digest": "b" * 32, "model": "two"}, 10_000)
    assert redis.hget("yard:info", "model") == b"two"


def test_what_a_worker_publishes_waits_for_redis(tmp_path, caplog):
    with EmbeddedRedis(tmp_path) as server:
        scripts = Scripts(server.client(), Keys())
    told = threading.Thread(target=facts.publish, args=[scripts, "gpu-a-0", {"base_digest": "a" * 32}, 10_000])
    told.start()
    time.sleep(0.1)
    assert told.is_alive() and "Redis is away" in caplog.text
    facts.publish(scripts, "gpu-a-0", {"base_digest": "b" * 32}, 10_000, given_up=lambda: True)
    with EmbeddedRedis(tmp_path) as server:
        told.join(5)
        assert server.client().hget("yard:info", "base_digest") == b"a" * 32
