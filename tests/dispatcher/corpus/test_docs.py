"""Every command of docs/corpus.md runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from lorayard.dispatcher.corpus.shards import TEXT_COLUMNS
from lorayard.dispatcher.corpus.spec import Corpus, build

from ..conftest import LiveYard
from ..fake import DIGESTS, KEYS

PAGE = (Path(__file__).parents[3] / "docs" / "corpus.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
[JOB] = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def test_the_commands(yard: LiveYard, tmp_path: Path) -> None:
    for name, digest in (("shout", "a"), ("json", "b")):
        yard.redis.hset(KEYS.adapters, name, f'{{"rank": 8, "digest": "{DIGESTS[digest]}", "bytes": 9}}')
    (tmp_path / "job.yaml").write_text(JOB.replace("finish: length", "finish: stop"))  # as the fake worker ends
    (tmp_path / "lorayard").write_text(f'#!/bin/sh\nexec {sys.executable} -m lorayard.shared.cli "$@"\n')
    (tmp_path / "lorayard").chmod(0o755)
    env = os.environ | {"LORAYARD_REDIS_URL": yard.server.url, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for block in BLOCKS:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 2
    assert "4 texts" in (tmp_path / "styled" / "report.md").read_text()


def test_the_words() -> None:
    build(Corpus, yaml.safe_load(JOB), "job.yaml")
    assert all(f"`{name}`" in PAGE for name in TEXT_COLUMNS)
