"""Parts read by several threads: in their order, never more at once than asked for, and nothing after an error."""

from __future__ import annotations

import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorayard.shared.errors import ModelError
from lorayard.worker.linear.tensors import Tensors
from lorayard.worker.models.loading import LINE_S, Pace, in_order


def test_results_come_in_order_and_threads_are_bounded() -> None:
    begun, meet = [], threading.Barrier(3, timeout=20)

    def task(i: int) -> int:
        begun.append(i)
        if i < 3:
            meet.wait()  # three are at work at once, or this breaks
        return i

    results = in_order((partial(task, i) for i in range(9)), threads=3)
    assert next(results) == 0 and set(begun) == {0, 1, 2}
    assert list(results) == list(range(1, 9))


def test_an_error_ends_it_when_its_turn_has_come() -> None:
    begun = []

    def task(i: int) -> int:
        begun.append(i)
        if i == 4:
            raise ModelError("four")
        return i

    results = in_order((partial(task, i) for i in range(100)), threads=3)
    assert list(islice(results, 4)) == [0, 1, 2, 3]
    with pytest.raises(ModelError, match="four"):
        next(results)
    assert max(begun) < 8 and not any(thread.name.startswith("reader") for thread in threading.enumerate())


def test_a_tensor_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorayard.worker.linear.tensors.PIECE", 1000)
    path, whole = tmp_path / "a.safetensors", torch.arange(1234, dtype=torch.int32)
    save_file({"first": torch.ones(3), "whole": whole}, path)
    tensors = Tensors([path], ModelError)
    assert torch.equal(tensors.read("whole"), whole)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="whole cannot be read: the file has become shorter"):
        tensors.read("whole")


def test_tensors_are_read_as_they_were_written_by_many_threads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    written = {
        "half": torch.randn(5, 7).half(), "brain": torch.randn(3).bfloat16(), "float": torch.randn(2, 3, 4),
        "short": torch.randint(-9, 9, (11,), dtype=torch.int16), "int": torch.randint(-9, 9, (4, 4), dtype=torch.int32),
        "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4),
    }  # fmt: skip
    save_file(written, tmp_path / "a.safetensors")
    tensors = Tensors([tmp_path / "a.safetensors"], ModelError)
    assert tensors.stored_bytes("") == sum(tensor.nbytes for tensor in written.values())
    names = list(written) * 20
    for name, tensor in zip(names, in_order(partial(tensors.read, name) for name in names), strict=True):
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name])


def test_a_file_that_shrinks_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    tensors = Tensors([path], ModelError)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="a cannot be read: the file has become shorter"):
        tensors.read("a")
    path.unlink()
    with pytest.raises(ModelError, match="a cannot be read: No such file"):
        tensors.read("a")


def test_the_pace_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(said.append)
    for seconds, done in ((1, 1), (LINE_S + 1, 2), (LINE_S + 2, 3), (2 * LINE_S, 4)):
        now[0] = 100.0 + seconds
        pace(done * 10**9, 4 * 10**9)
    assert said == ["2.00 of 4.00 GB, 0.33 GB/s", "4.00 of 4.00 GB, 0.40 GB/s"]
    short = Pace(said.append)
    short(4, 4)
    assert len(said) == 2
