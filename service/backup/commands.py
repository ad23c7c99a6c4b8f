"""The commands that copy a record: settings -> registry -> record -> file, and the way back."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

from models import Manifest, read_manifest
from service.backup.export import Progress, draft, export_table
from service.backup.formats import Format
from service.backup.generator_formats import write_format
from service.backup.record_table import Description, Origin
from service.backup.restore import Outcome, Refusals, restore_table
from service.errors import RegistryRefused, SemidError
from service.opening import Patience, open_registry
from service.registry.marks import Marks
from service.registry.record import Record
from service.registry.registry import SCHEMA
from service.schemas import NAMESPACE_PATTERN
from service.settings import Settings


class OtherTokenizer(SemidError):
    """The tokenizer is not the one that is needed."""

    title = "That is another tokenizer"


async def export(
    settings: Settings,
    path: Path,
    kind: Format = Format.PARQUET,
    *,
    tokenizer: str | None = None,
    namespace: str = "default",
    token_base: int = 0,
    progress: Progress,
) -> tuple[Description, int | None]:
    """Writes a record to a file, which appears when it is whole.

    Args:
        settings: Which registry, and which tokenizer's record.
        path: The file.
        kind: What is written.
        tokenizer: Which of the settings' tokenizers, by `name` or `name@fingerprint`; the default one where None.
        namespace: The catalogue's.
        token_base: The number of the first token, where token numbers are written.
        progress: Told of the items read.

    Returns:
        What was exported, and for a generator how many suffixes its vocabulary has.

    Raises:
        CheckpointError: There is no checkpoint where the settings say.
        SemidError: The registry cannot be reached or refuses, or there is nothing to export.
        ValueError: The namespace or the file's ending will not do.
    """
    if (path.suffix == ".parquet") != (kind is Format.PARQUET):
        raise ValueError(f"{path}: a name that ends in .parquet is for the format parquet, and for no other")
    manifest = _manifest(settings, tokenizer)
    if settings.redis_url is None and not (settings.data_dir / "registry").is_dir():
        raise RegistryRefused(
            f"There is no registry in {settings.data_dir}: set SID_DATA_DIR to the service's data directory, or "
            "SID_REDIS_URL to its registry."
        )
    origin = origin_of(manifest, namespace)
    async with opened_record(settings, manifest, namespace) as record:
        if kind is Format.PARQUET:
            return await export_table(record, origin, path, progress), None
        with draft(path) as whole:
            description = await export_table(record, origin, whole, progress)
            with draft(whole) as file:
                suffixes = await asyncio.to_thread(write_format, whole, file, kind, origin, token_base=token_base)
    return description, suffixes


async def restore(
    settings: Settings, path: Path, *, tokenizer: str | None = None, namespace: str | None = None, progress: Progress
) -> tuple[Description, Outcome, Path]:
    """Puts the IDs of an exported table back into a record of the same tokenizer.

    Args:
        settings: Which registry, and which tokenizer's record.
        path: The table.
        tokenizer: Which of the settings' tokenizers, by `name` or `name@fingerprint`; that of the table where None.
        namespace: Which catalogue's record; that of the table where None.
        progress: Told of the rows done.

    Returns:
        What the table is of, what became of its rows, and the file with those that were refused; there is none where
        none was.

    Raises:
        CheckpointError: There is no checkpoint where the settings say.
        SemidError: The registry cannot be reached or refuses, or the tokenizer is another.
        ValueError: The file is no such table, or the namespace will not do.
    """
    description = Description.of(path)
    manifest = _manifest(settings, tokenizer, description.origin.fingerprint)
    if manifest.fingerprint != description.origin.fingerprint:
        raise OtherTokenizer(
            f"{path} is of the tokenizer {description.origin.tokenizer}, the record of {manifest.full_name}: an ID of "
            "one names nothing under the other. Nothing was imported."
        )
    description = description._replace(origin=replace(description.origin, max_suffix=manifest.max_suffix))
    refused = path.with_suffix(".refused.jsonl")
    namespace = description.origin.namespace if namespace is None else namespace
    marked = (settings.data_dir / "history").is_dir()  # else no service of this directory acknowledged anything
    async with opened_record(settings, manifest, namespace, create=True, marked=marked) as record:
        with draft(refused) as file, closing(Refusals(file)) as refusals:
            outcome = await restore_table(record, path, description, refusals, progress)
    if not outcome.refused:
        refused.unlink()
    return description, outcome, refused


def _manifest(settings: Settings, tokenizer: str | None, fingerprint: str | None = None) -> Manifest:
    """The tokenizer of the settings that is named, else the one with this fingerprint, else the default one.

    Raises:
        CheckpointError: There is no checkpoint where the settings say.
        OtherTokenizer: None has that name.
    """
    manifests = [read_manifest(checkpoint) for checkpoint in settings.checkpoints]
    if tokenizer is None:
        return next((manifest for manifest in manifests if manifest.fingerprint == fingerprint), manifests[0])
    named = [manifest for manifest in manifests if tokenizer in {manifest.name, manifest.full_name}]
    if len(named) != 1:
        there = ", ".join(manifest.full_name for manifest in manifests)
        raise OtherTokenizer(f"{len(named)} tokenizers of the settings are named {tokenizer!r}; there are {there}")
    return named[0]


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
    settings: Settings, manifest: Manifest, namespace: str, *, create: bool = False, marked: bool = False
) -> AsyncIterator[Record]:
    """A tokenizer's record, in the registry that the settings name; the embedded one is shared with a running service.

    Args:
        settings: Which registry.
        manifest: The tokenizer's.
        namespace: The catalogue's.
        create: Whether a record that does not exist yet is made.
        marked: Whether it is refused where it is older than the services of the data directory acknowledged.

    Raises:
        SemidError: The registry cannot be reached, or refuses.
        ValueError: The namespace cannot name a record.
    """
    if re.fullmatch(NAMESPACE_PATTERN, namespace) is None:
        msg = f"{namespace!r} is no namespace: 1 to 64 letters, digits and any of _ . -"
        raise ValueError(msg)
    async with AsyncExitStack() as stack:
        marks = None
        if marked:
            marks = Marks.open(settings.data_dir)
            stack.push_async_callback(marks.close)
        patience = Patience(settings.registry_wait_s)
        registry = await open_registry(settings, stack, marks, patience)
        sizes, highest = manifest.codebook_sizes, manifest.max_suffix
        yield await patience.answer(
            partial(registry.record, namespace, manifest.fingerprint, sizes, max_suffix=highest, create=create)
        )
