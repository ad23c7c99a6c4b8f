"""A service that starts while its registry does not serve yet waits for it, however far it had come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from redis.crc import key_slot

from models import read_manifest
from service.app import compose
from service.backup.commands import opened_record
from service.errors import RegistryUnavailable
from service.metrics import Metrics
from service.registry.keys import meta_key
from service.settings import Settings
from tests.topologies import until
from tests.valkey_cluster import ValkeyCluster


@pytest.fixture(scope="module")
def embeddings_only(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint("opening", 4, 4, takes_text=False)


class Unserved:
    """A cluster whose server of the record's slot has given it up, which no other server knows.

    Attributes:
        settings: Of a service that knows of the cluster by a server that sees nothing wrong.
    """

    def __init__(self, cluster: ValkeyCluster, checkpoint: Path) -> None:
        self._slot = key_slot(meta_key(f"default:{read_manifest(checkpoint).fingerprint}"))
        self._server = cluster.primary_of(self._slot)
        other = next(node for node in cluster.primaries() if node is not self._server)
        url = f"redis+cluster://127.0.0.1:{other.port}"
        self.settings: dict[str, Any] = {"redis_url": url, "checkpoint": checkpoint, "device": "cpu"}
        self._server.client().execute_command("CLUSTER", "DELSLOTS", self._slot)
        self._served = False

    def serve(self) -> None:
        """Let the server take it back."""
        if not self._served:
            self._server.client().execute_command("CLUSTER", "ADDSLOTS", self._slot)
        self._served = True


@pytest.fixture
def unserved(shared_cluster: ValkeyCluster, embeddings_only: Path) -> Iterator[Unserved]:
    cluster = Unserved(shared_cluster, embeddings_only)
    yield cluster
    cluster.serve()
    shared_cluster.until_whole()


async def test_a_slot_that_nobody_serves_at_start_is_waited_for(
    unserved: Unserved, data_dir: Path, embeddings_only: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(**unserved.settings, data_dir=data_dir, registry_wait_s=30)
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(compose(settings, Metrics(), stack))
        await until(lambda: "waiting for the registry" in caplog.text or starting.done(), "nobody waits")
        unserved.serve()
        state = await starting
        await state.check_ready()

        async with opened_record(settings, read_manifest(embeddings_only), "default", create=True) as record:
            assert await record.count() == 0

    assert "has slots that no server serves" in caplog.text


async def test_the_wait_for_a_slot_ends_with_its_time(unserved: Unserved, data_dir: Path) -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(RegistryUnavailable, match="slots that no server serves"):
            await compose(Settings(**unserved.settings, data_dir=data_dir, registry_wait_s=0), Metrics(), stack)
