"""A checkpoint -> a tokenizer at work: read, verified, on its device, warm."""

from __future__ import annotations

import asyncio
import logging
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from models import CheckpointError, Manifest, load
from models.text_encoder import split_behind
from service.batching.batcher import Batcher
from service.batching.capacity import Capacity
from service.batching.lanes import NICER
from service.content import ItemReader
from service.explaining.explainer import Explainer
from service.metrics import Metrics
from service.settings import Settings
from service.stats.drift import ErrorWindow, WatchedEncoder
from service.stats.training import TrainingErrors
from service.tokenizers import LoadedTokenizer

log = logging.getLogger(__name__)


class Loader:
    """Loads checkpoints as the settings say, onto one shared capacity."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._capacity = Capacity(settings.queue_tokens, side_by_side=_device(settings) == "cpu")
        metrics.queue_tokens_limit.set(settings.queue_tokens)
        if _device(settings) == "cpu":
            split_behind(NICER)
        torch.set_num_threads(settings.threads or max(1, _cores() // settings.workers))

    async def load(self, directory: Path, manifest: Manifest) -> LoadedTokenizer:
        """The tokenizer of a checkpoint, whose model runs in threads of its own until its batcher is stopped.

        Raises:
            CheckpointError: It is not what was frozen, or no longer that of the manifest.
        """
        settings = self._settings
        tokenizer = await asyncio.to_thread(
            load,
            directory,
            _device(settings),
            settings.text_encoder,
            text_precision=settings.text_precision,
            tests_itself=True,
        )
        if tokenizer.full_name != manifest.full_name:
            msg = f"{directory} held {manifest.full_name} a moment ago, and now {tokenizer.full_name}"
            raise CheckpointError(msg)
        log.info("%s searches its codebooks by: %s", manifest.full_name, tokenizer.search)
        if tokenizer.text_encoder is not None:
            log.info("%s embeds texts by: %s", manifest.full_name, tokenizer.text_encoder.forward_pass)
        self._metrics.bounds_of_model(manifest.full_name, asdict(tokenizer.bounds))
        errors = ErrorWindow(TrainingErrors.of(manifest))
        batcher = Batcher(
            WatchedEncoder(tokenizer, errors),
            batch_tokens=settings.batch_tokens,
            batch_s=settings.batch_ms / 1000,
            capacity=self._capacity,
            metrics=self._metrics.of_model(manifest.full_name),
        )
        batcher.start()
        try:
            await batcher.encode(["warm" if tokenizer.takes_text else np.ones(tokenizer.dimension, dtype=np.float32)])
        except BaseException:
            await batcher.stop()
            raise
        # Only now: what warmed it up is no item's.
        errors.begin(manifest.fingerprint, self._metrics.ranks_of_model(manifest.full_name), self._metrics.fellows)
        reader = ItemReader(
            tokenizer, max_text_bytes=settings.max_text_bytes, keeps_displays=settings.display_bytes > 0
        )
        return LoadedTokenizer(manifest, reader, batcher, Explainer(tokenizer), errors)


def _device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    allowed, _, period = quota.read_text().partition(" ") if quota.is_file() else ("max", "", "")
    return cores if allowed == "max" else max(1, min(cores, round(int(allowed) / int(period))))
