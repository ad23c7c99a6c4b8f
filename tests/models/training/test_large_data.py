"""Five million rows, written here: a training's memory stays below what they alone would take."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROWS, WIDTH, GROUP = 5_000_000, 48, 500_000
HELD = 4 * ROWS * WIDTH  # bytes of the rows as float32, once

# Anonymous memory beyond that of the bare libraries; a joint training has more numbers of each row at hand. What grows
# with the rows is some numbers of each, whatever their width; peaks differ from run to run by a quarter. Pages of
# mapped files do not count: the system takes them back.
BOUNDS = {"rk-means": 0.5 * HELD, "rqvae": 0.8 * HELD}
SETTINGS = {
    "rk-means": ["codebook_sizes=[4,4]", "minibatch.passes=1", "minibatch.batch_rows=65536"],
    "rqvae": [
        *("codebook_sizes=[4]", "latent=2", "hidden=[]", "start_rows=100000", "kmeans.iterations=2"),
        *("epochs=1", "batch_rows=65536", 'start="random"'),
    ],
}
TRAINING = """
import json, sys
from pathlib import Path
import torch
from models.configuration import configured
from models.training.train import TrainConfig, config_of, train_checkpoint

torch.set_num_threads(1)
source, out, spool, family, settings = sys.argv[1:]
print("imported", flush=True)
sys.stdin.readline()
config = TrainConfig(family=family, fit=configured(config_of(family), json.loads(settings)))
train_checkpoint([Path(source)], Path(out), config, spool=Path(spool), say=lambda _: None)
"""


@pytest.fixture(scope="module")
def five_million(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "rows.parquet"
    schema = pa.schema([("embedding", pa.list_(pa.float32(), WIDTH))])
    source = np.random.default_rng(0)
    some = source.standard_normal((GROUP, WIDTH), dtype=np.float32)
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as file:
        for _ in range(ROWS // GROUP):
            # Other rows each time, without drawing each number.
            rows = some * source.standard_normal(WIDTH, dtype=np.float32)
            file.write_table(pa.table([pa.FixedSizeListArray.from_arrays(rows.ravel(), WIDTH)], schema=schema))
    yield path
    path.unlink()


def anonymous(pid: int) -> int:
    """Bytes of a process's memory that lie in no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def start(source, out, spool, family):
    child = subprocess.Popen(
        [sys.executable, "-c", TRAINING, source, out, spool, family, json.dumps(SETTINGS[family])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # What is freed goes back at once: what is held is measured, not what the C library keeps for later.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)},
    )
    assert child.stdout.readline() == "imported\n"
    return child


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process from /proc")
@pytest.mark.parametrize("family", BOUNDS)
def test_five_million_rows_are_trained_on_in_a_fraction_of_their_size(family, five_million, tmp_path):
    # given
    with start(five_million, tmp_path / "out", tmp_path / "spool", family) as child:
        bare = peak = anonymous(child.pid)
        # when
        child.stdin.write("\n")
        child.stdin.flush()
        while child.poll() is None:
            peak = max(peak, anonymous(child.pid))
            time.sleep(0.01)
    # then
    print(f"{family}: {(peak - bare) / 2**20:.0f} MiB beyond {bare / 2**20:.0f} MiB; rows {HELD / 2**20:.0f} MiB")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert child.returncode == 0
    assert manifest["report"]["items"] == ROWS
    assert peak - bare < BOUNDS[family]
    assert list((tmp_path / "spool").iterdir()) == []


def opened_by(pid):
    """The files that a process has open."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since
            yield str(descriptor.readlink())


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_a_training_that_is_ended_leaves_no_rows_behind(way, five_million, tmp_path):
    # given a training that has begun to spool
    spool = tmp_path / "spool"
    with start(five_million, tmp_path / "out", spool, "rk-means") as child:
        child.stdin.write("\n")
        child.stdin.flush()
        while not any(str(spool) in name for name in opened_by(child.pid)):
            assert child.poll() is None
            time.sleep(0.01)
        # when
        child.send_signal(way)
        child.wait()
    # then
    assert list(spool.iterdir()) == []
    assert not (tmp_path / "out").exists()
