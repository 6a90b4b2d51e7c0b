"""One way to a Redis: a client that is known to work, or one sentence that says why there is none."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError, RedisError, ResponseError
from redis.retry import Retry

from .errors import RedisUnavailable, UsageError

OLDEST = (6, 2, 0)
"""Oldest Redis that has every command we use; Valkey's numbers are all higher."""

SOCKET_TIMEOUT_S = 60.0
"""An answer later than this counts as a lost connection, so a blocking read must ask for less."""

LOADING_TIMEOUT_S = 300.0
"""How long a Redis may take to read its data back before we give up."""


def connect(url: str, **options: Any) -> redis.Redis:
    """Client for `redis://`, `rediss://` or `unix://`, checked: it answers, lets us in, has its data, is new enough.

    `options` are redis-py's and override our defaults. A command is never sent twice behind the caller's back: a lost
    connection raises, because a repeated XADD would be a second job.

    Raises UsageError for a malformed URL, RedisUnavailable for everything else.
    """
    shown = display(url)
    defaults = {
        "socket_connect_timeout": 5.0,
        "socket_timeout": SOCKET_TIMEOUT_S,
        "health_check_interval": 30,
        "retry": Retry(NoBackoff(), 0),
    }
    try:
        client = redis.Redis.from_url(url, **defaults | options)
        version = _loaded_version(client, shown)
    except (ValueError, TypeError) as error:
        raise UsageError(f"the Redis URL {shown} is malformed: {error}") from None
    except AuthenticationError as error:
        raise RedisUnavailable(
            f"Redis at {shown} does not let us in: {error}; put the user and password into the URL, "
            "redis://USER:PASSWORD@HOST, best through LORAYARD_REDIS_URL"
        ) from None
    except ResponseError as error:
        raise RedisUnavailable(f"Redis at {shown} is too old or set up otherwise: {error}") from None
    except RedisError as error:
        raise RedisUnavailable(
            f"no Redis answers at {shown}: {error}; start one with `lorayard up` or `redis-server`, "
            "or name another with --redis URL"
        ) from None
    if version < OLDEST:
        raise RedisUnavailable(f"Redis at {shown} is version {_dotted(version)}; {_dotted(OLDEST)} or newer is needed")
    return client


def display(url: str) -> str:
    """The URL without its password, for people to read."""
    return re.sub(r"(://[^/@]*?:).*@", r"\1***@", url.partition("?")[0])


def parse_version(text: str) -> tuple[int, ...]:
    """`"7.0.15"` -> (7, 0, 15); anything after the third number is ignored."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _server_version(client: redis.Redis) -> tuple[int, ...]:
    """Version by HELLO, which every ACL user may call."""
    reply = client.execute_command("HELLO")
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return parse_version({_text(name): _text(value) for name, value in pairs}["version"])


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _loaded_version(client: redis.Redis, shown: str) -> tuple[int, ...]:
    """Version of the server, once it has read its data back."""
    deadline = time.monotonic() + LOADING_TIMEOUT_S
    while True:
        try:
            version = _server_version(client)
            with suppress(NoPermissionError):  # without PING, a loading server shows at the first real command
                client.ping()
            return version
        except BusyLoadingError:
            if time.monotonic() > deadline:
                raise RedisUnavailable(
                    f"Redis at {shown} is still reading its data after {LOADING_TIMEOUT_S:.0f} s; try again later"
                ) from None
        time.sleep(0.02)
