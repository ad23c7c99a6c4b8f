"""The benchmark of a GPU can be tried out without one, and then claims nothing."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured_and_nothing_is_kept(tmp_path, capsys):
    gpu.main(["--results", str(tmp_path)])
    assert "no CUDA device" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_on_a_cpu_it_runs_as_it_would_on_a_gpu(tmp_path):
    # given
    options = {"device": "cpu", "rounds": 2, "texts": 6, "singles": 1, "batch": 4, "embeddings": 64, "checked": 6}
    tiny = [f"--{name}={value}" for name, value in options.items()]
    # when
    gpu.main([*tiny, "--results", str(tmp_path)])
    # then
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert len(result["comparisons"]) == 4
    for comparison in result["comparisons"]:
        assert {*comparison["ours"], comparison["against"]} == comparison["figures"].keys()
        assert all(figure > 0 for figures in comparison["figures"].values() for figure in figures)
    assert [check["differ"] for check in result["checks"]] == [0]
