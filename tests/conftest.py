"""Fixtures for all tests: a real Redis for each test process, emptied before each test that asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import redis as redis_py

from lorayard.shared.embedded import EmbeddedRedis
from lorayard.shared.errors import RedisUnavailable


def missing(service: str) -> None:
    """Skip a test whose service this machine lacks; where CI is set, everything must be there, so fail."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {service}")
    pytest.skip(service)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """An embedded Redis of this test process's own, on a unix socket."""
    try:
        server = EmbeddedRedis(tmp_path_factory.mktemp("redis"), max_memory=256 << 20)
    except RedisUnavailable as error:
        missing(str(error))
    with server:
        yield server


@pytest.fixture
def redis(redis_server: EmbeddedRedis) -> Iterator[redis_py.Redis]:
    """A client (bytes replies) on an empty database."""
    client = redis_server.client()
    client.flushall()
    yield client
    client.close()
