"""Keys of callers: random secrets of which only the digests are kept, in a file that is read again when it changes.

A key is 256 random bits, so that a plain SHA-256 keeps it secret: there is nothing to guess that a slow digest would
have to make dear. A key is never shown again after it was made.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.whole_files import stamp_of, write_whole
from service.errors import KeysUnreadable
from service.quoting import quoted

log = logging.getLogger(__name__)

PREFIX = "semid_"  # so that scanners for leaked secrets, and people, see what it is
NAME = r"^[A-Za-z0-9_.@-]{1,64}$"
LOOKED_AGAIN_AFTER_S = 1.0


class Scope(StrEnum):
    """What a key is for; each includes the ones before it."""

    READ = "read"
    TOKENIZE = "tokenize"
    ADMIN = "admin"

    def includes(self, other: Scope) -> bool:
        """Whether a key of this scope may do what asks for the other."""
        ranks = list(Scope)
        return ranks.index(self) >= ranks.index(other)


class Key(BaseModel):
    """One key as the file has it.

    Attributes:
        name: Whose it is; tells keys apart in the file and in the log.
        scope: What it is for.
        sha256: The secret's digest, as hex.
        created_at: When it was made.
        expires_at: From when it is no longer taken; None: never.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=NAME)]
    scope: Scope
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created_at: datetime
    expires_at: datetime | None = None

    def expired(self, now: datetime) -> bool:
        """Whether it is no longer taken."""
        return self.expires_at is not None and now >= self.expires_at


class KeyFile(BaseModel):
    """The file: `{"keys": [...]}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """The keys of a file.

        Raises:
            KeysUnreadable: It is not there, or is not such a file.
        """
        try:
            found = cls.model_validate_json(path.read_bytes())
        except OSError as error:
            msg = f"the keys cannot be read: {error}"
            raise KeysUnreadable(msg) from error
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            msg = f"{path} is no file of keys: {where}: {first['msg']}"
            raise KeysUnreadable(msg) from error
        names = [key.name for key in found.keys]
        if len(set(names)) < len(names):
            msg = f"{path} has several keys of one name"
            raise KeysUnreadable(msg)
        return found

    def write(self, path: Path) -> None:
        """Keep them, for the owner's eyes alone."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, self.model_dump_json(indent=2, exclude_none=True) + "\n")
        path.chmod(0o600)

    def with_new(self, name: str, scope: Scope, expires_at: datetime | None = None) -> tuple[KeyFile, str]:
        """These and a new one, and its secret.

        Raises:
            ValueError: The name is taken, or is none.
        """
        if re.fullmatch(NAME, name) is None:
            msg = f"{quoted(name)} is no name: at most 64 letters, digits and . _ @ -"
            raise ValueError(msg)
        if any(key.name == name for key in self.keys):
            msg = f"there is a key {name!r} already; remove it first, or choose another name"
            raise ValueError(msg)
        secret = PREFIX + secrets.token_urlsafe(32)
        made = Key(name=name, scope=scope, sha256=_digest(secret), created_at=_now(), expires_at=expires_at)
        return KeyFile(keys=(*self.keys, made)), secret

    def without(self, name: str) -> KeyFile:
        """All but one.

        Raises:
            ValueError: There is none of this name.
        """
        rest = tuple(key for key in self.keys if key.name != name)
        if len(rest) == len(self.keys):
            msg = f"there is no key {name!r}"
            raise ValueError(msg)
        return KeyFile(keys=rest)

    def holder(self, secret: str) -> Key | None:
        """The key with this secret, unless it has expired.

        All are compared, each in constant time: how long it takes tells nothing of any.
        """
        digest, found = _digest(secret), None
        for key in self.keys:
            if hmac.compare_digest(digest, key.sha256):
                found = key
        return None if found is None or found.expired(_now()) else found


class Keys:
    """The keys of a running service; what changes in the file holds within a second, with no restart.

    Args:
        path: The file.
        clock: Tells the time in seconds, by which the file is looked at again.

    Raises:
        KeysUnreadable: It cannot be read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._seen = stamp_of(self._path)
        self._file = KeyFile.read(path)
        self._looked = clock()
        if not self._file.keys:
            log.warning("%s has no keys: every request but those for health and the page is refused", path)

    def holder(self, secret: str) -> Key | None:
        """The key with this secret, if there is one now."""
        if self._clock() - self._looked >= LOOKED_AGAIN_AFTER_S:
            self._read_again()
        return self._file.holder(secret)

    def _read_again(self) -> None:
        """Take what changed. A file that cannot be read changes nothing: neither opens the door nor closes it."""
        self._looked = self._clock()
        try:
            seen = stamp_of(self._path)
            if seen != self._seen:
                self._file = KeyFile.read(self._path)
                log.info("%d keys are in force", len(self._file.keys))
        except KeysUnreadable as error:
            seen = None
            if self._seen is not None:
                log.error("the keys of before stay in force: %s", error)  # noqa: TRY400 - in words
        self._seen = seen


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC)
