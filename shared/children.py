"""Child processes that never outlive us, stopped politely and then for certain."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # loaded here: nothing but the call may happen between fork and exec


def spawn(
    argv: Sequence[str],
    *,
    parent_death: signal.Signals,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    umask: int = -1,
    pass_fds: Sequence[int] = (),
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a child in its own session, so that a terminal's Ctrl-C reaches only us; it has no standard input.

    The kernel sends it `parent_death` when the thread that called this ends, even by kill -9. So call it from a
    thread that lives as long as the child should, best the main one.
    """
    parent = os.getpid()

    def die_with_parent() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, parent_death)
        if os.getppid() != parent:  # it died before the call above
            os.kill(os.getpid(), parent_death)

    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=env,
        cwd=cwd,
        umask=umask,
        pass_fds=pass_fds,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )


def stop(children: Iterable[subprocess.Popen[bytes]], grace_s: float) -> None:
    """SIGTERM to all at once, SIGKILL to those that still live after `grace_s`; returns when all are gone."""
    children = list(children)
    for child in children:
        child.terminate()
    deadline = time.monotonic() + grace_s
    for child in children:
        try:
            child.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
