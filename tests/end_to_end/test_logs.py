"""The log of a service of several processes, as a machine reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

TEXT, ITEM_ID = "Zanzibar carpet", "carpet-of-zanzibar"


def test_every_line_of_every_process_is_json_and_none_has_what_callers_send(start_process: Callable[..., Any]) -> None:
    settings = {"workers": 2, "log_format": "json", "log_level": "debug", "access_log": True}
    service = start_process(**settings).wait_until_ready()
    item = {"item_id": ITEM_ID, "text": TEXT}
    for number, body in enumerate(
        [{"items": [item]}, {"items": [{**item, "colour": TEXT}]}, {"items": [item], TEXT: 1}]
    ):
        service.http.post("/tokenize", json=body, headers={"X-Request-ID": f"mine-{number}"})
    service.http.get(f"/assignment/{ITEM_ID}")
    service.http.get(f"/nothing/{ITEM_ID}", params={"text": TEXT})
    address = str(service.http.base_url).rstrip("/")
    service.terminate()
    assert service.wait() == 0

    said = service.log.splitlines()
    lines = [json.loads(line) for line in said]

    assert {"time", "level", "logger", "process", "message"} <= set.intersection(*(set(line) for line in lines))
    assert len({line["process"] for line in lines}) >= 2
    assert "uvicorn.error" in {line["logger"] for line in lines}
    assert [line["message"] for line in lines if "address" in line] == [f"semid is ready at {address}"]
    access = [line for line in lines if line["logger"] == "service.access"]
    statuses = {line["request_id"]: line["status"] for line in access if line["route"] == "/tokenize"}
    assert statuses == {"mine-0": 200, "mine-1": 200, "mine-2": 422}
    assert "registry_ms" in access[0] or "registry_ms" in access[1]
    assert not [line for line in said if "anzibar" in line.lower()]
