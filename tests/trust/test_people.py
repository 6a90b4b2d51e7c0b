"""The commands for people work as the shipped user `service`, which is asked for nothing in vain."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lorayard.shared.keys import Keys
from lorayard.shared.scripts import Scripts

from ..dispatcher.fake import FakeWorker, hold, publish
from .conftest import BINARIES, password
from .test_users import guarded, url_of


@pytest.mark.parametrize("binary", BINARIES)
def test_looking_cancelling_and_sending_again_as_service(tmp_path: Path, binary: str) -> None:
    with closing(guarded(tmp_path / "redis", binary)) as server:
        admin = server.client(username="admin", password=password("admin"))
        publish(admin)
        scripts = Scripts(server.client(username="service", password=password("service")), Keys())
        assert FakeWorker(scripts).register() and hold(scripts, "h", a="1" * 64) == 1
        entry = admin.xadd("yard:dead", {"prompt": "p", "entry": "1-0", "to": "yard:in", "cut": 0, "code": "expired"})
        said = {}
        for words in ("info", "top --once", "adapters", "dead list", f"dead show {entry.decode()}",
                      f"dead resubmit {entry.decode()}", "cancel j"):  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "lorayard.shared.cli", *words.split()], capture_output=True, text=True,
                env=os.environ | {"LORAYARD_REDIS_URL": url_of(server, "service")}, timeout=60,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            said[words] = done.stdout
        assert "memory -1" not in said["top --once"] and "gpu-h-0 ready" in said["top --once"]
        assert admin.xlen("yard:in") == admin.xlen("yard:ctl") == 1
        assert admin.acl_log() == []
