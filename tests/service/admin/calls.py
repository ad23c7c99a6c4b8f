"""The calls of hot swapping, as an operator makes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import httpx

from models import read_manifest


def full(checkpoint: Path) -> str:
    return read_manifest(checkpoint).full_name


def load(service: Any, checkpoint: Path | str, **members: Any) -> httpx.Response:
    return service.http.post("/admin/tokenizers", json={"checkpoint": str(checkpoint), **members})


def make_default(service: Any, checkpoint: Path, **members: Any) -> httpx.Response:
    return service.http.post(f"/admin/tokenizers/{full(checkpoint)}/default", json=members)


def unload(service: Any, checkpoint: Path) -> httpx.Response:
    return service.http.delete(f"/admin/tokenizers/{full(checkpoint)}")


def loaded(service: Any) -> list[str]:
    answer = service.http.get("/tokenizers").json()
    names = [each["tokenizer"] for each in answer["tokenizers"]]
    assert answer["default"] == names[0]
    return names


def copied(checkpoint: Path, to: Path) -> Path:
    shutil.copytree(checkpoint, to)
    return to
