"""The app behind a socket."""

from __future__ import annotations

import gc

from fastapi import FastAPI

from service.http.protocol import ConnectionLimits
from service.server import Server
from service.settings import Settings


async def test_what_start_up_has_loaded_is_not_searched_for_garbage_again() -> None:
    server = Server(FastAPI(), Settings(port=0, log_level="error"))
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    frozen = gc.get_freeze_count()

    await server.startup()

    try:
        assert gc.get_freeze_count() > frozen + 10_000
    finally:
        gc.unfreeze()
        await server.shutdown()


def test_connections_have_the_limits_of_the_settings() -> None:
    config = Server(FastAPI(), Settings(max_head_bytes=2048, head_timeout_s=7, stream_timeout_s=9)).config

    assert config.http.limits == ConnectionLimits(head_bytes=2048, head_timeout_s=7, taken_timeout_s=9)
    assert config.h11_max_incomplete_event_size == 2048
    assert config.ws == "none"
