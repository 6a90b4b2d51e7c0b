"""Adapter folders on disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from lorayard.demo import ADAPTERS
from lorayard.worker.lora.folders import adapter_digest, scan


def make(path: Path, weights: bytes = b"weights", **config: object) -> Path:
    """An adapter folder; nothing here looks inside the weights."""
    path.mkdir(parents=True)
    text = json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | config)
    (path / "adapter_config.json").write_text(text)
    (path / "adapter_model.safetensors").write_bytes(weights)
    return path


def test_every_folder_below_the_roots(tmp_path: Path) -> None:
    sql = make(tmp_path / "one" / "sql", rank_pattern={"q_proj": 32})
    make(tmp_path / "two" / "deeper" / "pirate")
    found = scan([tmp_path / "one", tmp_path / "two", tmp_path / "absent"])
    assert sorted(found) == ["pirate", "sql"] and not found.problems
    folder = found["sql"]
    assert (folder.path, folder.rank, folder.bytes) == (sql, 32, 7)
    data = (sql / "adapter_config.json").read_bytes() + b"weights"
    assert folder.digest == adapter_digest(sql) == hashlib.blake2b(data, digest_size=16).hexdigest()


def test_the_demo_adapters() -> None:
    assert {name: folder.rank for name, folder in scan([ADAPTERS]).items()} == {"bullets": 8, "json": 8, "shout": 8}


def test_bad_folders_are_passed_over_and_told(tmp_path: Path) -> None:
    make(tmp_path / "a" / "good")
    make(tmp_path / "b" / "good")
    make(tmp_path / "bad name")
    make(tmp_path / "qalora", use_qalora=True)
    (make(tmp_path / "broken") / "adapter_config.json").write_text("{")
    (make(tmp_path / "empty") / "adapter_model.safetensors").unlink()
    found = scan([tmp_path])
    assert list(found) == ["good"] and found["good"].path == tmp_path / "a" / "good"
    assert len(found.problems) == 5
    for word in ("bad name", "use_qalora", "broken", "empty", "is in both"):
        assert sum(word in problem for problem in found.problems) == 1


def test_a_rescan_reads_only_what_changed(tmp_path: Path) -> None:
    path = make(tmp_path / "sql")
    before = scan([tmp_path])["sql"]
    assert scan([tmp_path])["sql"] is before
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(b"changed")
    os.utime(weights, ns=(1, 1))
    assert scan([tmp_path])["sql"].digest != before.digest
    (path / "adapter_config.json").unlink()
    assert not scan([tmp_path])


def test_no_torch_is_needed() -> None:
    code = "import sys, lorayard.worker.lora.folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
