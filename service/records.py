"""The records of the loaded tokenizers, by namespace."""

from __future__ import annotations

from models import Manifest
from service.registry import Registry
from service.registry.record import Record


class Records:
    """Finds a tokenizer's record of a namespace."""

    def __init__(self, registry: Registry) -> None:
        """In this registry."""
        self._registry = registry

    async def of(self, namespace: str, tokenizer: Manifest, *, create: bool = False) -> Record:
        """The record; only an assignment makes a new one.

        Raises:
            RegistryUnavailable: The registry cannot be reached.
        """
        return await self._registry.record(
            namespace,
            tokenizer.fingerprint,
            tokenizer.codebook_sizes,
            max_suffix=tokenizer.max_suffix,
            create=create,
        )
