"""`semid tokenizers`, on the client's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from models import read_manifest
from service.cli import app


@pytest.fixture
def semid(
    start_service: Callable[..., Any], make_checkpoint: Callable[..., Path], data_dir: Path
) -> Iterator[Callable[..., Any]]:
    """Runs a command on a service that may load the checkpoint `spring` beside its own, `winter`."""
    winter, spring = (
        make_checkpoint(name, 8, 8, seed=seed, takes_text=False) for seed, name in enumerate(("winter", "spring"))
    )
    service = start_service(checkpoint=winter, checkpoint_dirs=(spring.parent,), data_dir=data_dir)
    names = {path.name: read_manifest(path).full_name for path in (winter, spring)}

    def run(*arguments: str) -> tuple[int, list[str], str]:
        words = [names.get(argument, argument) if arguments[0] != "load" else argument for argument in arguments]
        done = CliRunner().invoke(app, ["tokenizers", *words, "--url", str(service.http.base_url)])
        shown = done.stdout
        for name, full_name in names.items():
            shown = shown.replace(full_name, name)
        return done.exit_code, shown.splitlines(), done.stderr

    yield run
    service.stop()


def test_commands_list_load_make_default_and_unload(semid: Callable[..., Any]) -> None:
    assert semid("list") == (0, ["winter (default)"], "")
    assert semid("load", "spring") == (0, ["winter (default)", "spring"], "")
    assert semid("default", "spring") == (0, ["spring (default)", "winter"], "")
    assert semid("unload", "winter") == (0, ["spring (default)"], "")
    assert semid("load", "/etc", "--default")[0] == 1
    assert "checkpoints may be loaded from" in semid("load", "/etc")[2]
    assert "the default" in semid("unload", "spring")[2]
