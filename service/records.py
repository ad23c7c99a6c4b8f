"""The records of the loaded tokenizer, by namespace."""

from __future__ import annotations

from collections.abc import Mapping

from models import Manifest
from service.errors import UnknownTokenizer
from service.registry import Registry
from service.registry.record import Record


class Records:
    """Finds a request's record."""

    def __init__(self, registry: Registry, manifest: Manifest) -> None:
        """Of the tokenizer that this manifest describes."""
        self.manifest = manifest
        self._registry = registry

    async def of(self, namespace: str, tokenizer: str | None, *, create: bool = False) -> Record:
        """The namespace's record; only an assignment makes a new one.

        Raises:
            UnknownTokenizer: It is not the one that is loaded.
            RegistryUnavailable: The registry cannot be reached.
        """
        if tokenizer not in {None, self.manifest.name, self.manifest.full_name}:
            raise UnknownTokenizer(f"loaded is {self.manifest.full_name}")
        return await self._registry.record(
            namespace,
            self.manifest.fingerprint,
            self.manifest.codebook_sizes,
            max_suffix=self.manifest.max_suffix,
            create=create,
        )

    def origin(self, namespace: str) -> Mapping[str, str]:
        """What every answer begins with."""
        return {"tokenizer": self.manifest.full_name, "namespace": namespace}
