"""One way to a Redis: a client that is known to work, or one sentence that says why there is none."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

import redis
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    ConnectionError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TimeoutError,
)
from redis.retry import Retry
from redis.sentinel import Sentinel

from .errors import RedisUnavailable, UsageError

if TYPE_CHECKING:
    from redis import asyncio as redis_asyncio

OLDEST = (6, 2, 0)
"""Oldest Redis that has every command we use; Valkey's numbers are all higher."""

SOCKET_TIMEOUT_S = 60.0
"""An answer later than this counts as a lost connection, so a blocking read must ask for less."""

LOADING_TIMEOUT_S = 300.0
"""How long a Redis may take to read its data back before we give up."""


SENTINEL_SCHEMES = {"redis+sentinel": "redis", "rediss+sentinel": "rediss"}
"""Scheme of a URL that names sentinels -> scheme of their Redis."""

SENTINEL_PORT = 26379

_AWAY_CLASSES = (ConnectionError, TimeoutError, ReadOnlyError, OutOfMemoryError, MasterDownError, NoScriptError)
_AWAY = re.compile(r"(^|: -?)(BUSY|LOADING|MISCONF|NOGROUP|NOREPLICAS|OOM|READONLY|UNBLOCKED)\b")
"""How the others begin, after what pipelines and the scripts of Redis 6.2 put before. NOGROUP: the data were lost."""


def is_away(error: BaseException) -> bool:
    """Whether Redis is only unable to serve now, so that waiting helps.

    It cannot be reached, loads its data, is a replica (after a fail-over), is full, cannot save, has lost its data, or
    is held up by somebody's script. redis-py cuts the code off some of these errors and gives them classes.
    """
    return isinstance(error, _AWAY_CLASSES) or (isinstance(error, ResponseError) and bool(_AWAY.search(str(error))))


def connect(url: str, **options: Any) -> redis.Redis:
    """Client for a Redis URL, checked: the server answers, lets us in, has its data, is new enough.

    `redis://`, `rediss://` (TLS), `unix://`, or `redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DB`, where
    the hosts are sentinels that know where the primary of SERVICE is now; the user and password are for Redis, those
    for the sentinels are `?sentinel_username=` and `?sentinel_password=`. Other options after `?` are redis-py's.

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
        client = _client(url, defaults | options)
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


def connect_async(url: str) -> redis_asyncio.Redis:
    """A client for asyncio that connects at its first command and, like `connect`, sends nothing twice.

    The same URLs. Raises UsageError for a malformed one.
    """
    from redis import asyncio as redis_asyncio
    from redis.asyncio.retry import Retry as AsyncRetry
    from redis.asyncio.sentinel import Sentinel as AsyncSentinel

    options: dict[str, Any] = {"socket_timeout": SOCKET_TIMEOUT_S, "retry": AsyncRetry(NoBackoff(), 0)}
    try:
        watched = _watched(url, options)
        client: redis_asyncio.Redis
        if watched is None:
            client = redis_asyncio.Redis.from_url(url, **options)
        else:
            sentinel = AsyncSentinel(watched.sentinels, sentinel_kwargs=watched.sentinel_options)
            client = sentinel.master_for(watched.service, **watched.options)
        client.connection_pool.make_connection()  # which refuses options that there are not
        return client
    except (ValueError, TypeError) as error:
        raise UsageError(f"the Redis URL {display(url)} is malformed: {error}") from None


async def close_async(client: redis_asyncio.Redis) -> None:
    """Close the connections of a client of `connect_async`, and those to the sentinels that it has asked."""
    await client.aclose()
    manager = getattr(client.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager else ():
        await sentinel.aclose()


def _client(url: str, options: dict[str, Any]) -> redis.Redis:
    watched = _watched(url, options)
    if watched is None:
        return redis.Redis.from_url(url, **options)
    sentinel = Sentinel(watched.sentinels, sentinel_kwargs=watched.sentinel_options)
    client: redis.Redis = sentinel.master_for(watched.service, **watched.options)
    return client


class _Watched(NamedTuple):
    """A Redis behind sentinels: their (host, port)s and options, the name that they know it by, its own options."""

    sentinels: list[tuple[str, int]]
    sentinel_options: dict[str, Any]
    service: str
    options: dict[str, Any]


def _watched(url: str, options: dict[str, Any]) -> _Watched | None:
    """What a URL of sentinels says, None for another URL. Raises ValueError."""
    scheme, _, rest = url.partition("://")
    if scheme not in SENTINEL_SCHEMES:
        return None
    place, _, query = rest.partition("?")
    user, at, place = place.rpartition("@")
    hosts, _, path = place.partition("/")
    service, _, db = path.partition("/")
    if not service or not (db or "0").isdecimal():
        raise ValueError("it must name the service that the sentinels watch, HOST:PORT,HOST:PORT/SERVICE/DB")
    parsed: dict[str, Any] = dict(parse_url(f"{SENTINEL_SCHEMES[scheme]}://{user}{at}host/{db or 0}?{query}"))
    tls = parsed.pop("connection_class", None) is not None
    own = {name.removeprefix("sentinel_"): parsed.pop(name) for name in list(parsed) if name.startswith("sentinel_")}
    common = options | {name: value for name, value in parsed.items() if name.startswith("ssl_")} | {"ssl": tls}
    addresses = [_address(host) for host in hosts.split(",")]
    return _Watched(addresses, common | own, unquote(service), options | parsed | {"ssl": tls, "host": None})


def _address(host: str) -> tuple[str, int]:
    """`"[::1]:26379"` -> ("::1", 26379). Raises ValueError."""
    match = re.fullmatch(r"(\[[^]]+\]|[^:]+)(?::(\d+))?", host)
    if match is None:
        raise ValueError(f"{host!r} is not HOST:PORT of a sentinel")
    return match[1].strip("[]"), int(match[2] or SENTINEL_PORT)


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
