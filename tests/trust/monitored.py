"""A second Redis that is told what MONITOR says of the first."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any

from redis.exceptions import ConnectionError

ARGUMENT = re.compile(rb'"((?:[^"\\]|\\.)*)"')
UNSAID = re.compile(
    rb"(?i)EVAL|EVALSHA|SCRIPT|MULTI|EXEC|AUTH|HELLO|CLIENT|SELECT|MONITOR|INFO|PING|ACL|BL.*|BR.*|XREAD.*"
)
"""Commands that change nothing, or whose effects are commands of their own."""

MARK = b"a key that nobody has"


class Mirror:
    """Replays commands as MONITOR reports them, those of scripts included."""

    def __init__(self, watched: Any, copy: Any) -> None:
        self.copy = copy
        self._caught_up = threading.Event()
        self._watched, self._monitor = watched, watched.monitor()
        self._monitor.__enter__()
        self._thread = threading.Thread(target=self._replay, daemon=True)
        self._thread.start()

    def catch_up(self) -> None:
        """Return when all that was said before has been replayed."""
        self._caught_up.clear()
        self._watched.get(MARK)
        assert self._caught_up.wait(10)

    def _replay(self) -> None:
        with suppress(ConnectionError):  # the servers end before the thread
            while True:
                line = self._monitor.connection.read_response()
                words = [unescape(word) for word in ARGUMENT.findall(line)]
                if not UNSAID.fullmatch(words[0]):
                    self.copy.execute_command(*words)
                if words[1:] == [MARK]:
                    self._caught_up.set()


def unescape(word: bytes) -> bytes:
    """An argument as it was before MONITOR quoted it."""
    return word.decode("unicode_escape").encode("latin-1")
