"""The commands that copy a record: settings -> registry -> record -> file, and the way back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from models import Manifest, read_manifest
from service.app import open_registry
from service.errors import RegistryRefused
from service.export import Progress, draft, export_table
from service.formats import Format
from service.generator_formats import write_format
from service.record_table import Description, Origin
from service.registry.record import Record
from service.registry.registry import SCHEMA
from service.settings import Settings


async def export(
    settings: Settings,
    path: Path,
    kind: Format = Format.PARQUET,
    *,
    namespace: str = "default",
    token_base: int = 0,
    progress: Progress,
) -> tuple[Description, int | None]:
    """Writes a record to a file, which appears when it is whole.

    Args:
        settings: Which registry, and which tokenizer's record.
        path: The file.
        kind: What is written.
        namespace: The catalogue's.
        token_base: The number of the first token, where token numbers are written.
        progress: Told of the items read.

    Returns:
        What was exported, and for a generator how many suffixes its vocabulary has.

    Raises:
        CheckpointError: There is no tokenizer there.
        SemidError: The registry cannot be reached or refuses, or there is nothing to export.
        ValueError: The namespace or the file's ending will not do.
    """
    if (path.suffix == ".parquet") != (kind is Format.PARQUET):
        raise ValueError(f"{path}: a name that ends in .parquet is for the format parquet, and for no other")
    manifest = read_manifest(settings.checkpoint)
    if settings.redis_url is None and not (settings.data_dir / "registry").is_dir():
        raise RegistryRefused(
            f"There is no registry in {settings.data_dir}: set SID_DATA_DIR to the service's data directory, or "
            "SID_REDIS_URL to its registry."
        )
    origin = origin_of(manifest, namespace)
    async with opened_record(settings, manifest, namespace, create=False) as record:
        if kind is Format.PARQUET:
            return await export_table(record, origin, path, progress), None
        with draft(path) as whole:
            description = await export_table(record, origin, whole, progress)
            with draft(whole) as file:
                suffixes = await asyncio.to_thread(write_format, whole, file, kind, origin, token_base=token_base)
    return description, suffixes


def origin_of(manifest: Manifest, namespace: str) -> Origin:
    """Of what a table of this tokenizer's record is."""
    return Origin(
        tokenizer=manifest.full_name,
        fingerprint=manifest.fingerprint,
        codebook_sizes=tuple(manifest.codebook_sizes),
        max_suffix=manifest.max_suffix,
        namespace=namespace,
        schema=SCHEMA,
    )


@asynccontextmanager
async def opened_record(
    settings: Settings, manifest: Manifest, namespace: str, *, create: bool
) -> AsyncIterator[Record]:
    """A tokenizer's record, in the registry that the settings name; the embedded one is shared with a running service.

    Raises:
        SemidError: The registry cannot be reached, or refuses.
        ValueError: The namespace cannot name a record.
    """
    async with AsyncExitStack() as stack:
        registry = await open_registry(settings, stack)
        yield await registry.record(
            namespace, manifest.fingerprint, manifest.codebook_sizes, max_suffix=manifest.max_suffix, create=create
        )
