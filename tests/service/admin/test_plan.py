"""The plan that the processes of a service share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from service.admin.plan import Plan, PlanFile


def test_a_call_changes_the_plan_that_another_thread_is_just_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Plan.of_settings({"first@00": tmp_path, "second@11": tmp_path})
    ours, beside = PlanFile(tmp_path, settings), PlanFile(tmp_path, settings)
    beside.change(lambda plan: plan.with_default("second@11", None))
    reading, go_on = threading.Event(), threading.Event()
    read = ours._read

    def slowly() -> Plan:
        reading.set()
        assert go_on.wait(30)
        return read()

    monkeypatch.setattr(ours, "_read", slowly)
    with ThreadPoolExecutor(2) as pool:
        following = pool.submit(ours.look)
        assert reading.wait(30)
        changing = pool.submit(ours.change, lambda plan: plan.without("first@00"))
        wait([changing], timeout=0.2)  # else it would be made on the plan before
        go_on.set()

    assert following.result().revision == 1
    assert changing.result().revision == 2
    assert [planned.tokenizer for planned in changing.result().tokenizers] == ["second@11"]
