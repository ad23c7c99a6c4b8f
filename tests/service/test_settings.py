"""Settings come from the environment, once, into one frozen object."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.overflow import Overflow
from service.registry import Durability
from service.settings import Settings, strangers


def test_the_defaults_serve_a_newcomer() -> None:
    settings = Settings()

    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.data_dir == Path("data")
    assert settings.redis_url is None
    assert settings.durability is Durability.FSYNC
    assert settings.device == "auto"
    assert (settings.checkpoint / "manifest.json").is_file()
    assert settings.checkpoints == (settings.checkpoint,)
    assert settings.overflow == {}


def test_every_setting_can_be_set_by_its_name_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SID_PORT", "0")
    monkeypatch.setenv("SID_DATA_DIR", "/somewhere")
    monkeypatch.setenv("SID_REDIS_URL", "redis://elsewhere:6379/1")
    monkeypatch.setenv("SID_DURABILITY", "memory")
    monkeypatch.setenv("SID_DEVICE", "cuda:1")
    monkeypatch.setenv("SID_MAX_ITEMS", "7")
    monkeypatch.setenv("SID_CHECKPOINT", "first")
    monkeypatch.setenv("SID_FURTHER_CHECKPOINTS", "/second, third,")
    monkeypatch.setenv("SID_OVERFLOW", '{"shop": "next_nearest", "*": "error"}')

    settings = Settings()

    assert settings.port == 0
    assert settings.data_dir == Path("/somewhere")
    assert settings.redis_url == "redis://elsewhere:6379/1"
    assert settings.durability is Durability.MEMORY
    assert settings.device == "cuda:1"
    assert settings.max_items == 7
    assert settings.checkpoints == (Path("first"), Path("/second"), Path("third"))
    assert settings.overflow == {"shop": Overflow.NEXT_NEAREST, "*": Overflow.ERROR}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SID_PORT", "65536"),
        ("SID_PORT", "-1"),
        ("SID_PORT", "http"),
        ("SID_DURABILITY", "maybe"),
        ("SID_DEVICE", "tpu"),
        ("SID_DEVICE", "cuda:"),
        ("SID_THREADS", "-1"),
        ("SID_BATCH_TOKENS", "0"),
        ("SID_QUEUE_TOKENS", "0"),
        ("SID_MAX_ITEMS", "0"),
        ("SID_MAX_BODY_BYTES", "0"),
        ("SID_MAX_TEXT_BYTES", "many"),
        ("SID_REGISTRY_TIMEOUT_MS", "0"),
        ("SID_LOG_LEVEL", "loud"),
        ("SID_OVERFLOW", "next_nearest"),
        ("SID_OVERFLOW", '["shop"]'),
        ("SID_OVERFLOW", '{"shop": "nearest"}'),
        ("SID_OVERFLOW", '{"no namespace": "error"}'),
        ("SID_OVERFLOW", '{"**": "error"}'),
    ],
)
def test_a_setting_out_of_range_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(ValidationError, match=name.removeprefix("SID_").lower()):
        Settings()


def test_a_variable_that_is_no_setting_is_found_with_the_one_that_it_may_be_meant_as() -> None:
    given = ["SID_KEY_FILE", "SID_DISPLAY", "SID_PORT_8000_TCP", "SID_PORT", "sid_host", "HOME"]

    assert strangers(given) == {
        "SID_KEY_FILE": "SID_KEYS_FILE",
        "SID_DISPLAY": "SID_DISPLAY_BYTES",
        "SID_PORT_8000_TCP": None,  # as Kubernetes writes for a Service that is named sid
    }


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


def test_every_setting_says_what_it_is() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_nothing_is_read_at_import() -> None:
    code = "import os; os.environ['SID_PORT'] = '7'; import service.settings as s; print(s.Settings().port)"
    environment = {**os.environ, "SID_PORT": "http"}

    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    assert printed.stdout.strip() == "7"


def test_a_password_is_not_shown_with_the_settings() -> None:
    assert "s3cret" not in repr(Settings(redis_url="redis://user:s3cret@elsewhere/0"))
