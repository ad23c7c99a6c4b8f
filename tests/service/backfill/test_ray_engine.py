"""By Ray the table is that of the local engine."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.backfill.ray_engine import Actors, Node, actors_on
from service.errors import WorkerFailed
from tests.service.backfill.catalogues import matrix_of, rejected_of, run, table_of, write_embeddings

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: semid[bulk]")


# Two machines with a core and a GPU each, as far as Ray knows; who encodes writes down where it runs.
ON_TWO_NODES = """
import os, sys, time
import ray
from pathlib import Path
from ray.cluster_utils import Cluster
from service.backfill import ray_engine
from service.cli import app

nodes = Path(sys.argv.pop(1))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1, num_gpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)

class Telling(ray_engine.BlockActor):
    def __call__(self, row):
        context = ray.get_runtime_context()
        (nodes / context.get_node_id()).write_text(f"{context.get_accelerator_ids()['GPU']}")
        deadline = time.monotonic() + 60
        while len(list(nodes.iterdir())) < 2 and time.monotonic() < deadline:  # else the first could do all
            time.sleep(0.05)
        return super().__call__(row)

ray_engine.BlockActor = Telling
try:
    app()
except SystemExit as ended:
    status = ended.code
ray.shutdown()
cluster.shutdown()
os._exit(status)  # Ray has an exit status of its own for a cluster that goes
"""


@needs_ray
@pytest.mark.usefixtures("settings")
def test_two_actors_on_two_nodes_with_a_gpu_each_make_the_table_that_one_process_makes(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = matrix_of(600)
    matrix[100] = 0.0
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix)
    run(catalogue, "--out", tmp_path / "local", "--workers", 1)
    (tmp_path / "nodes").mkdir()
    monkeypatch.setenv("SID_DATA_DIR", str(data_dir / "ray"))
    monkeypatch.setenv("SID_DEVICE", "auto")
    command = [sys.executable, "-c", ON_TWO_NODES, tmp_path / "nodes", "backfill", catalogue, "--engine", "ray"]
    command += ["--out", tmp_path / "ray", "--block-rows", 60]

    ended = subprocess.run(
        [*map(str, command)], capture_output=True, timeout=300, check=False, cwd=Path.cwd(), env=os.environ
    )

    assert ended.returncode == 3, ended.stderr.decode()
    assert len(list((tmp_path / "ray").glob("part-*"))) == 10
    assert table_of(tmp_path / "ray").equals(table_of(tmp_path / "local"))
    assert rejected_of(tmp_path / "ray") == rejected_of(tmp_path / "local")
    assert [path.read_text() for path in (tmp_path / "nodes").iterdir()] == ["['0']", "['0']"]


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "blocks", "asked"),
    [
        ([Node(16, 4), Node(16, 4)], "auto", None, 1000, Actors(8, 4, 1)),
        ([Node(16, 4), Node(16, 4)], "cuda:3", 2, 1000, Actors(2, 16, 1)),
        ([Node(8, 1), Node(64, 1)], "auto", None, 1000, Actors(2, 8, 1)),
        ([Node(16, 2)], "cuda", 20, 1000, Actors(2, 8, 1)),
        ([Node(16, 4), Node(0, 0)], "cpu", None, 1000, Actors(8, 2, 0)),
        ([Node(16, 0), Node(16, 0)], "auto", 1, 1000, Actors(1, 16, 0)),
        ([Node(10, 0), Node(10, 0)], "auto", 3, 1000, Actors(3, 5, 0)),
        ([Node(2, 0)], "auto", 8, 1000, Actors(2, 1, 0)),
        ([Node(16, 0)], "auto", None, 3, Actors(3, 5, 0)),
    ],
)
def test_a_gpu_each_is_asked_for_where_there_are_any_and_as_many_cores_as_all_can_have(
    nodes: list[Node], device: str, workers: int | None, blocks: int, asked: Actors
) -> None:
    assert actors_on(nodes, device, workers, blocks) == asked


def test_a_gpu_that_no_machine_of_the_cluster_has_is_not_waited_for() -> None:
    with pytest.raises(WorkerFailed, match="Ray's cluster has none"):
        actors_on([Node(16, 0)], "cuda", 2, 1000)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
@pytest.mark.usefixtures("settings")
def test_without_ray_the_command_says_what_to_install(tmp_path: Path) -> None:
    catalogue = write_embeddings(tmp_path / "items.parquet", matrix_of(20))
    result = run(catalogue, "--out", tmp_path / "out", "--engine", "ray")
    assert result.exit_code == 1
    assert "install semid[bulk], or use --engine local" in result.output
