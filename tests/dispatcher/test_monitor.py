"""The monitor's JSON, its metrics and its manners: it writes nothing, and nobody unasked reads it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest
import yaml

from lorayard.dispatcher.monitor.command import serve
from lorayard.dispatcher.monitor.recorder import CHANGES, POINTS, Recorder
from lorayard.dispatcher.monitor.server import HEADERS, MonitorServer
from lorayard.shared.errors import UsageError
from lorayard.worker.queue.figures import WAIT_BOUNDS_S, Figures

from .conftest import HOLD, LiveYard
from .fake import KEYS, combination

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
FIELDS = Figures().fields() | {
    "wait_buckets": json.dumps([1, 2, *[0] * (len(WAIT_BOUNDS_S) - 1)]), "wait_sum_ms": 120, "wait_p95_ms": 40,
    "tokens": 700, "prompt_tokens": 300, "jobs_finished": 3, "still_s": 0, "vram_used": 40 << 30,
    "vram_total": 80 << 30, "util_percent": 93, "temperature_c": 61, "power_w": 512.5, "loading": "[0]",
}  # fmt: skip


class Watched:
    """A monitor of a yard, asked by hand."""

    def __init__(self, yard: LiveYard, token: str = "") -> None:
        self.yard = yard
        self.server, self.recorder = serve(yard.server.url, "yard:", "127.0.0.1", 0, token)
        self.recorder.stop()  # the tests look when they want to

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        link.request(method, path, headers=headers)
        answer = link.getresponse()
        found = answer.status, answer.headers, answer.read()
        link.close()
        return found

    def json(self, path: str) -> Any:
        status, _, body = self.ask(path)
        assert status == 200, body
        return json.loads(body)

    def metrics(self) -> str:
        self.recorder.look()
        return self.ask("/metrics")[2].decode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def watched(yard: LiveYard) -> Iterator[Watched]:
    one = Watched(yard)
    yield one
    one.close()


def busy(yard: LiveYard) -> None:
    """Four jobs run, others wait, one was refused, and the worker has said all that a worker may say."""
    for _ in range(4):
        yard.running(yard.send(prompt=HOLD, adapter="a"))
    for _ in range(12):
        yard.send("yard:in:batch", prompt=HOLD, adapter="a")
    yard.send(id="evil", colour="<img src=x onerror=alert(1)>")
    yard.until(lambda: yard.dead() and yard.redis.llen(KEYS.lane("batch", combination("a"))) == 4)
    yard.redis.hset(KEYS.gpu("gpu-h-0"), mapping=FIELDS)


def test_the_state_says_what_there_is_and_reading_writes_nothing(watched: Watched) -> None:
    busy(watched.yard)
    watched.yard.close()
    before = {key: watched.yard.redis.dump(key) for key in watched.yard.redis.keys()}
    watched.recorder.look()
    state = watched.json("/api/state")
    [gpu] = state["yard"]["gpus"]
    assert (gpu["queued"], gpu["running"], gpu["seats"], gpu["figures"]["power_w"]) == (8, 4, 4, 512.5)
    assert gpu["slots"] == [{"combination": combination("a"), "state": "loading", "jobs": 12}]
    assert state["trouble"] == "" and state["yard"]["lanes"][0]["jobs"] == 4
    assert watched.json("/api/history")["yard"]["running"] == [0]
    [refused] = watched.json("/api/dead")
    assert refused["fields"]["code"] == "bad_field" and refused["fields"]["colour"].startswith("<img")
    way = watched.json("/api/job?id=evil")
    assert way["books"]["code"] == "bad_field" and way["refused"] == [refused]
    assert [event["fields"]["ev"] for event in way["events"]] == ["error"]
    assert watched.json("/api/job?id=nobody") == {"id": "nobody", "books": {}, "events": [], "refused": []}
    watched.metrics()
    assert {key: watched.yard.redis.dump(key) for key in watched.yard.redis.keys()} == before


def test_a_user_who_may_only_read_suffices(watched: Watched) -> None:
    """The user of docs/monitor.md, with rights to read and none to write."""
    busy(watched.yard)
    text = (DEPLOY.parent / "docs" / "monitor.md").read_text()
    [rights] = re.findall(r"ACL SETUSER monitor on '?>PASSWORD'? ([^`\n]+)", text)
    admin = watched.yard.redis
    if admin.info("server")["redis_version"].startswith("6."):
        rights = rights.replace("%R~", "~")
    admin.execute_command("ACL", "SETUSER", "monitor", "on", ">secret", *rights.split())
    admin.acl_log_reset()
    try:
        url = watched.yard.server.url
        server, recorder = serve(url.replace("unix://", "unix://monitor:secret@"), "yard:", "127.0.0.1", 0, "")
        recorder.stop()
        watched.close()
        watched.server, watched.recorder = server, recorder
        assert recorder.now[1] == "" and watched.json("/api/job?id=evil")["refused"]
        assert watched.json("/api/dead") and "lorayard_redis_up 1.0" in watched.metrics()
        assert [entry for entry in admin.acl_log() if entry["username"] == "monitor"] == []
    finally:
        admin.execute_command("ACL", "DELUSER", "monitor")


def test_changes_are_told_and_bounded(empty_yard: LiveYard) -> None:
    recorder = Recorder(empty_yard.redis, KEYS)
    worker = empty_yard.work(slots=1)
    empty_yard.serve()
    recorder.look()
    for name in ("a", "b"):
        empty_yard.final(empty_yard.send(adapter=name))
        recorder.look()
    empty_yard.halt(worker)
    empty_yard.redis.hset(KEYS.gpu("gpu-h-0"), "beat_ms", 1)
    recorder.look()
    told = [(change["kind"], change["text"]) for change in recorder.state()["changes"]]
    assert ("swap", f"slot 0: {combination('a')} → {combination('b')}") in told
    assert told[0][0] == "gone"
    empty_yard.redis.delete(KEYS.gpu("gpu-h-0"))
    empty_yard.work(slots=1)
    recorder.look()
    assert recorder.state()["changes"][0]["kind"] == "back"
    assert recorder._changes.maxlen == CHANGES and recorder._points.maxlen == POINTS


def test_without_redis_it_says_so(watched: Watched) -> None:
    class Away:
        def pipeline(self, **_: Any) -> Any:
            from redis.exceptions import ConnectionError

            raise ConnectionError("gone")

    watched.recorder._redis = Away()
    watched.recorder.look()
    assert watched.json("/api/state")["trouble"] == "Redis does not answer: gone"
    assert "lorayard_redis_up 0.0" in watched.metrics() and "lorayard_jobs" not in watched.metrics()


def test_manners(watched: Watched) -> None:
    status, headers, page = watched.ask("/")
    assert status == 200 and {name: headers[name] for name in HEADERS} == HEADERS
    assert b"http://" not in page.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in page
    assert not re.search(rb"innerHTML|insertAdjacentHTML|document\.write|eval\(| style=| on[a-z]+=", page)
    assert watched.ask("/", "HEAD")[2] == b""
    assert watched.ask("/", "POST")[0] == 501 and watched.ask("/../etc/passwd")[0] == 404
    assert watched.ask("/", Host="evil.example")[0] == 421
    assert watched.ask("/api/job?id=a%20b")[0] == 400


def test_the_token(yard: LiveYard) -> None:
    watched = Watched(yard, "secret")
    assert [watched.ask(path)[0] for path in ("/", "/metrics", "/api/state", "/?token=other")] == [401] * 4
    assert watched.ask("/metrics", Authorization="Bearer secret")[0] == 200
    status, headers, _ = watched.ask("/?token=secret")
    assert (status, headers["Location"]) == (303, "/") and "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
    assert watched.ask("/", Cookie=headers["Set-Cookie"].partition(";")[0])[0] == 200
    watched.close()
    with pytest.raises(UsageError, match="--token"):
        serve(yard.server.url, "yard:", "0.0.0.0", 0, "")


def test_metrics_keep_to_the_conventions(watched: Watched) -> None:
    busy(watched.yard)
    text = watched.metrics()
    for line in (
        'lorayard_jobs_running{gpu="gpu-h-0"} 4.0', 'lorayard_jobs{class="batch"} 12.0',
        'lorayard_generated_tokens_total{gpu="gpu-h-0"} 700.0', 'lorayard_gpu_utilization_ratio{gpu="gpu-h-0"} 0.93',
        'lorayard_queue_wait_seconds_bucket{gpu="gpu-h-0",le="+Inf"} 3.0',
        'lorayard_queue_wait_seconds_sum{gpu="gpu-h-0"} 0.12', "lorayard_dead_entries 1.0",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    if promtool := shutil.which("promtool"):
        said = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True)
        assert (said.returncode, said.stdout + said.stderr) == (0, "")


def test_adapters_do_not_multiply_series(watched: Watched) -> None:
    redis = watched.yard.redis
    redis.zadd(KEYS.lanes, {f"normal:x{at}@11111111": at for at in range(500)})
    redis.hset(KEYS.slots("gpu-h-0"), mapping={at: f"y{at}@11111111" for at in range(500)})
    text = watched.metrics()
    assert text.count("\nlorayard_lane_jobs{") == text.count("\nlorayard_slot_jobs{") == 20


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\blorayard_[a-z_]+", text))


def test_what_deploy_uses_exists(watched: Watched) -> None:
    busy(watched.yard)
    there = {line.partition("{")[0].partition(" ")[0] for line in watched.metrics().splitlines() if line[0] != "#"}
    files = [*DEPLOY.glob("grafana/*.json"), *DEPLOY.glob("prometheus/*.yml"), *DEPLOY.glob("keda/*.yaml")]
    assert len(files) >= 3
    for path in files:
        text = path.read_text()
        if path.suffix == ".json":
            text = "\n".join(target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"])
        else:
            list(yaml.safe_load_all(text))
        used = names_in(text)
        assert used and used <= there, (path.name, used - there)


def test_promtool_takes_the_alerts() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool")
    said = subprocess.run([promtool, "check", "rules", str(DEPLOY / "prometheus/alerts.yml")], capture_output=True)
    assert said.returncode == 0, said


def test_a_taken_port_is_one_sentence(watched: Watched) -> None:
    assert isinstance(watched.server, MonitorServer)
    with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1:{watched.port}"):
        serve(watched.yard.server.url, "yard:", "127.0.0.1", watched.port, "")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus")
def test_every_query_of_grafana_and_of_the_alerts_answers(watched: Watched, tmp_path: Path) -> None:
    """A real Prometheus scrapes a yard, and is asked what the dashboard's panels and the rules ask."""
    busy(watched.yard)
    target = f"127.0.0.1:{watched.port}"
    job = {"job_name": "yard", "scrape_interval": "1s", "static_configs": [{"targets": [target]}]}
    (tmp_path / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]}))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["prometheus", f"--web.listen-address=127.0.0.1:{port}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    dashboard = json.loads((DEPLOY / "grafana/lorayard.json").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    rules = yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    [keda] = yaml.safe_load((DEPLOY / "keda/scaledobject.yaml").read_text())["spec"]["triggers"]
    asked.add(keda["metadata"]["query"])

    def answer(query: str) -> list[Any]:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/query?query={quote(query)}"
            with urlopen(url, timeout=5) as reply:
                return json.load(reply)["data"]["result"]
        except HTTPError as error:
            if error.code == 503:  # it starts
                return []
            raise AssertionError(f"{query}: {error.read()!r}") from None
        except URLError:
            return []

    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen([*command, f"--config.file={tmp_path / 'prometheus.yml'}"], stdout=log, stderr=log)
    try:
        watched.recorder.look()
        watched.yard.until(lambda: answer("rate(lorayard_generated_tokens_total[1m])"), 40)
        silent = [query for query in asked if not answer(query)]
        for rule in rules:
            answer(rule["expr"])
    finally:
        running.terminate()
        running.wait()
    assert silent == []
