"""The app behind a socket."""

from __future__ import annotations

import gc

from fastapi import FastAPI

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
