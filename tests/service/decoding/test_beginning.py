"""Followers of a record that has no item yet."""

from __future__ import annotations

import threading
from typing import Any


def test_who_waits_for_a_record_to_begin_is_told_its_epoch_and_can_go_on_from_there(
    service: Any, namespace: str
) -> None:
    answers: list[dict[str, Any]] = []
    asked = {"after": 0, "namespace": namespace, "wait_s": 20, "epoch": ""}
    waiting = threading.Thread(target=lambda: answers.append(service.http.get("/changes", params=asked).json()))
    assert service.http.get("/changes", params={"after": 0, "namespace": namespace}).json()["epoch"] == ""
    waiting.start()

    service.tokenize({"item_id": "first", "text": "kettle"}, namespace=namespace)
    waiting.join(30)

    (told,) = answers
    assert [change["item_id"] for change in told["changes"]] == ["first"]
    assert told["epoch"]
    on = {"after": told["next_after"], "epoch": told["epoch"], "namespace": namespace}
    assert service.http.get("/changes", params=on).status_code == 200
