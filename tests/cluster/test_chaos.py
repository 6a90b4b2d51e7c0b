"""The short forms of `tests/soak/chaos.py` and `tests/soak/corpus.py`, and its node client by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ..conftest import missing
from ..soak.chaos import chaos
from ..soak.corpus import disturbed

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def node() -> str:
    found = shutil.which("node")
    if not found:
        missing("node")
    return str(found)


@pytest.mark.slow
def test_twelve_kills_lose_nothing_and_double_nothing(tmp_path):
    figures = chaos(tmp_path, jobs=500, kills=12, seed=1, seconds=150)
    assert figures["finals"] == 500
    assert (figures["worker"], figures["dispatcher"], figures["redis"], figures["supervisor"]) == (5, 4, 2, 1)


@pytest.mark.slow
def test_eight_kills_and_a_corpus_has_each_row_once_and_the_same_bytes(tmp_path):
    figures = disturbed(tmp_path, count=1000, kills=8, seed=1, seconds=120)
    assert (figures["client"], figures["worker"], figures["dispatcher"], figures["redis"]) == (2, 3, 1, 1)


def test_the_readme_asks_from_node(start, node):
    yard = start()
    [prompt, adapter] = re.findall(
        r"`node deploy/examples/node/ask\.js '([^']*)' (\w+)`", (ROOT / "README.md").read_text()
    )[0]
    url = f"redis://127.0.0.1:{yard.port}/0"

    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [node, str(ROOT / "deploy/examples/node/ask.js"), *words],
            env=os.environ | {"LORAYARD_REDIS_URL": url}, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    said = ask(prompt, adapter)
    assert said.returncode == 0, said.stderr
    text, _, note = said.stdout.rpartition("\n(")
    assert text.strip() and text == text.upper() and re.fullmatch(r"\d+ tokens, (stop|length)\)\n", note)
    done = yard.final(yard.submit(prompt=prompt, adapter=adapter, temperature=0, max_tokens=64))
    assert text == done["text"], "the streamed text is the whole text"
    refused = ask(prompt, "nosuch")
    assert refused.returncode == 1 and "no_adapter" in refused.stderr
