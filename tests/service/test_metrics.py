"""Metrics of several workers, told as one."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict, mmap_key

from service.metrics import CountsOfWorkers


def test_a_file_that_a_worker_makes_just_now_does_not_hide_what_the_others_counted(tmp_path: Path) -> None:
    counts = MmapedDict(tmp_path / "counter_0.db")
    counts.write_value(mmap_key("semid_rows", "semid_rows_total", [], [], "Rows"), 3.0, 0.0)
    counts.close()
    (tmp_path / "counter_1.db").touch()  # opened, and not yet as long as it will be

    (metric,) = CountsOfWorkers(tmp_path).collect()

    assert [sample.value for sample in metric.samples] == [3.0]
