"""The app as a whole: what is left of it when it has stopped."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings


def test_an_app_that_has_stopped_holds_no_model(checkpoint: Path, data_dir: Path) -> None:
    app = create_app(Settings(checkpoint=checkpoint, data_dir=data_dir))
    with TestClient(app) as client:
        tokenizer = weakref.ref(app.state.semid.tokenizers.current.default.reader)
        items = [{"item_id": "lamp", "text": "a red lamp"}]
        assert "semantic_id" in client.post("/tokenize", json={"items": items}).json()["items"][0]
        assert tokenizer() is not None

    gc.collect()

    assert tokenizer() is None


def test_an_app_that_has_stopped_has_no_thread_of_bulk(checkpoint: Path, data_dir: Path) -> None:
    app = create_app(Settings(checkpoint=checkpoint, data_dir=data_dir))
    with TestClient(app) as client:
        client.post("/tokenize", json={"items": [{"item_id": f"{i}", "text": "a red lamp"} for i in range(17)]})
        (thread,) = app.state.semid.row_thread._thread._threads
        assert thread.is_alive()

    assert not thread.is_alive()
