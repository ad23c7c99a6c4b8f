"""Keys at rest: what the file holds, and when it holds."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.access.keys import Key, KeyFile, Keys, Scope
from service.cli import app
from service.errors import KeysUnreadable


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(path: Path, **names: Scope) -> dict[str, str]:
    """A file of these keys; their secrets."""
    file, secrets = KeyFile(), {}
    for name, scope in names.items():
        file, secrets[name] = file.with_new(name, scope)
    file.write(path)
    return secrets


def held_by(keys: Keys, secret: str) -> str | None:
    return None if (key := keys.holder(secret)) is None else key.name


def test_no_secret_is_kept(tmp_path: Path) -> None:
    secrets = made(tmp_path / "keys.json", pipeline=Scope.TOKENIZE)

    kept = (tmp_path / "keys.json").read_text()

    assert secrets["pipeline"] not in kept
    assert secrets["pipeline"].removeprefix("semid_") not in kept
    assert (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


def test_a_key_is_known_by_its_whole_secret_alone(tmp_path: Path) -> None:
    secrets = made(tmp_path / "keys.json", one=Scope.READ, other=Scope.ADMIN)
    keys = Keys(tmp_path / "keys.json")

    assert held_by(keys, secrets["one"]) == "one"
    assert held_by(keys, secrets["other"]) == "other"
    for wrong in ("", "semid_", secrets["one"][:-1], secrets["one"] + "x", secrets["one"].lower(), "\udcff"):
        assert held_by(keys, wrong) is None


def test_an_expired_key_is_not_taken() -> None:
    now = datetime.now(UTC)
    file, secret = KeyFile().with_new("late", Scope.READ, now - timedelta(seconds=1))
    file, lasting = file.with_new("lasting", Scope.READ, now + timedelta(hours=1))

    assert file.holder(secret) is None
    assert isinstance(file.holder(lasting), Key)


def test_keys_change_without_a_restart(tmp_path: Path) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    old = made(path, old=Scope.READ)["old"]
    keys = Keys(path, clock)

    file, new = KeyFile.read(path).with_new("new", Scope.READ)
    file.write(path)
    clock.now += 1.0
    assert {held_by(keys, secret) for secret in (old, new)} == {"old", "new"}

    file.without("old").write(path)
    clock.now += 1.0
    assert held_by(keys, old) is None
    assert held_by(keys, new) == "new"


@pytest.mark.parametrize("content", [None, "", "{", '{"keys": [{"name": "a"}]}', '{"kyes": []}'])
def test_a_file_that_breaks_changes_nothing_until_it_is_whole_again(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys.json", Clock()
    secret = made(path, a=Scope.READ)["a"]
    whole = path.read_text()
    keys = Keys(path, clock)

    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for _ in range(2):
        clock.now += 1.0
        assert held_by(keys, secret) == "a"
        assert held_by(keys, "semid_other") is None
    if content is not None:
        assert "stay in force" in caplog.text

    path.write_text(whole.replace('"a"', '"b"'))
    clock.now += 1.0
    assert held_by(keys, secret) == "b"


@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "JSON"), ('{"keys": [{"name": "a"}]}', "keys.0.scope"), ('{"keys": {}}', "keys"), ("[]", "the file")],
)
def test_a_broken_file_is_refused_at_start_in_words(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(content)

    with pytest.raises(KeysUnreadable, match=said):
        Keys(path)


def test_a_path_that_cannot_be_looked_at_is_refused_at_start_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(KeysUnreadable):
        Keys(tmp_path / "file" / "keys.json")


def test_two_keys_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    made(path, a=Scope.READ)
    document = json.loads(path.read_text())
    path.write_text(json.dumps({"keys": document["keys"] * 2}))

    with pytest.raises(KeysUnreadable, match="several keys of one name"):
        Keys(path)


def test_the_command_makes_lists_and_removes_keys(tmp_path: Path) -> None:
    path, run = tmp_path / "etc" / "keys.json", CliRunner()

    def semid(*arguments: str) -> tuple[int, str]:
        result = run.invoke(app, ["keys", *arguments], env={**os.environ, "SID_KEYS_FILE": str(path)})
        return result.exit_code, result.output

    code, secret = semid("add", "pipeline", "--scope", "tokenize", "--days", "2")
    assert code == 0
    assert held_by(Keys(path), secret.strip()) == "pipeline"
    code, again = semid("add", "pipeline", "--scope", "read")
    assert code != 0
    assert "already" in again
    assert semid("add", "x", "--scope", "root")[0] != 0
    assert "'no spaces' is no name" in semid("add", "no spaces", "--scope", "read")[1]
    assert semid("add", "x", "--scope", "read", "--days", "1e11")[0] == 2

    code, listed = semid("list")
    assert code == 0
    assert "pipeline" in listed
    assert "tokenize" in listed
    assert secret.strip() not in listed

    assert semid("remove", "pipeline")[0] == 0
    assert KeyFile.read(path).keys == ()
    assert "no key" in semid("remove", "pipeline")[1]
