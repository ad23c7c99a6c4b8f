"""Which tokenizers are to be loaded, and which is the default: a file that every process of a service follows.

    SID_DATA_DIR/tokenizers/plan.json    there once a call has changed what the settings say
                            plan.lock    held by whoever changes it

A plan is made on the tokenizers of the settings, and holds as long as these are the same: a service that starts with
others begins anew with them. Services with data directories of their own have plans of their own, on one registry too.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from models.whole_files import stamp_of, write_whole
from service.errors import (
    AmbiguousTokenizer,
    PlanUnreadable,
    TokenizerIsDefault,
    TokenizerLoadedTwice,
    TokenizerNameTaken,
    TooManyTokenizers,
    UnknownTokenizer,
)

log = logging.getLogger(__name__)

OTHER_PLANS = (
    "This holds for the processes that share this service's SID_DATA_DIR: `workers` counts them. Services with another "
    "one, on the same registry too, follow a plan of their own: call each of them, or change their settings."
)

FullName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+@[0-9a-f]+$")]


class Planned(BaseModel):
    """One tokenizer to be loaded.

    Attributes:
        tokenizer: `name@fingerprint`.
        directory: Of its checkpoint.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizer: FullName
    directory: Path

    @property
    def name(self) -> str:
        """Without the fingerprint."""
        return self.tokenizer.rpartition("@")[0]

    @property
    def fingerprint(self) -> str:
        """What its record is kept by."""
        return self.tokenizer.rpartition("@")[2]


class Plan(BaseModel):
    """What is to be loaded.

    Attributes:
        settings: The full names of the tokenizers that the settings name, on which it was made.
        revision: Grows with every change.
        tokenizers: The default first.
        default_since: When a call made it the default; None where it is by the settings.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: tuple[FullName, ...]
    revision: Annotated[int, Field(ge=0)] = 0
    tokenizers: Annotated[tuple[Planned, ...], Field(min_length=1)]
    default_since: AwareDatetime | None = None

    @classmethod
    def of_settings(cls, checkpoints: Mapping[str, Path]) -> Plan:
        """What the settings say: directories by full name, the default's first."""
        planned = tuple(Planned(tokenizer=name, directory=path.resolve()) for name, path in checkpoints.items())
        return cls(settings=tuple(checkpoints), tokenizers=planned)

    @property
    def default(self) -> Planned:
        """The one that answers where none is named."""
        return self.tokenizers[0]

    def named(self, name: str) -> Planned:
        """The one of a `name` or `name@fingerprint`.

        Raises:
            UnknownTokenizer: None has that name.
            AmbiguousTokenizer: Several have.
        """
        found = [planned for planned in self.tokenizers if name in {planned.tokenizer, planned.name}]
        if not found:
            raise UnknownTokenizer(f"loaded: {', '.join(planned.tokenizer for planned in self.tokenizers)}")
        if len(found) > 1:
            names = " or ".join(planned.tokenizer for planned in found)
            raise AmbiguousTokenizer(f"several have the name {name}: say {names}")
        return found[0]

    def with_another(self, planned: Planned, *, at_most: int, force: bool) -> Plan:
        """These and another.

        Raises:
            TokenizerLoadedTwice: It is among them.
            TokenizerNameTaken: One of them has its name, and nobody insists.
            TooManyTokenizers: There are enough.
        """
        for each in self.tokenizers:
            if each.fingerprint == planned.fingerprint:
                raise TokenizerLoadedTwice(f"{each.tokenizer} has that fingerprint")
            if each.name == planned.name and not force:
                raise TokenizerNameTaken(
                    f"callers who say {planned.name!r} would have to say {each.tokenizer} or {planned.tokenizer}; "
                    'with "force": true it is loaded all the same'
                )
        if len(self.tokenizers) >= at_most:
            raise TooManyTokenizers(f"{len(self.tokenizers)} are loaded, as many as SID_MAX_TOKENIZERS allows")
        return self._of(*self.tokenizers, planned)

    def with_default(self, tokenizer: str, since: datetime | None) -> Plan:
        """The same, with this one of them as the default from then on, unless it is already.

        Raises:
            UnknownTokenizer: It is not among them.
        """
        chosen = self.named(tokenizer)
        since = self.default_since if chosen is self.default else since
        others = [each for each in self.tokenizers if each is not chosen]
        return self._of(chosen, *others).model_copy(update={"default_since": since})

    def without(self, tokenizer: str) -> Plan:
        """All but this one.

        Raises:
            UnknownTokenizer: It is not among them.
            TokenizerIsDefault: It is the default.
        """
        chosen = self.named(tokenizer)
        if chosen is self.default:
            raise TokenizerIsDefault(f"make another one the default before {chosen.tokenizer} is unloaded")
        return self._of(*(each for each in self.tokenizers if each is not chosen))

    def _of(self, *tokenizers: Planned) -> Plan:
        return self.model_copy(update={"revision": self.revision + 1, "tokenizers": tokenizers})


class PlanFile:
    """The plan as the processes of a service share it, and the threads of each.

    Args:
        directory: Where it lies.
        of_settings: What holds until a call has changed it.
    """

    def __init__(self, directory: Path, of_settings: Plan) -> None:
        self.path = directory / "plan.json"
        self._lock = directory / "plan.lock"
        self._plan = of_settings
        self._of_settings = of_settings
        self._seen: tuple[int, ...] | None = None
        self._looking = threading.Lock()  # a plan goes with its stamp: the follower looks while a call changes it

    def begin(self) -> None:
        """Called once, as a service starts: a plan that was made on other settings ends.

        Raises:
            PlanUnreadable: There is a file that is no plan.
        """
        found = self._read() if self.path.exists() else None
        if found is not None and found.settings != self._of_settings.settings:
            log.warning("The checkpoints of the settings have changed: they are loaded, and %s is set anew", self.path)
            self._write(self._of_settings.model_copy(update={"revision": found.revision + 1}))

    def look(self) -> Plan:
        """The plan as it is now. One that was made on other settings, or cannot be read, changes nothing."""
        with self._looking:
            seen = stamp_of(self.path)
            if seen is not None and seen != self._seen:
                self._seen = seen
                self._take()
            return self._plan

    def change(self, edit: Callable[[Plan], Plan]) -> Plan:
        """Change the plan; no other process changes it meanwhile.

        Args:
            edit: The plan as it is -> as it is to be. What it raises leaves the plan as it is.

        Returns:
            The new one, which is on disk.
        """
        with self._locked():
            changed = edit(self.look())
            self._write(changed)
            return self.look()

    def _take(self) -> None:
        try:
            found = self._read()
        except PlanUnreadable as error:
            log.error("what is loaded stays: %s", error)  # noqa: TRY400 - in words
            return
        if found.settings == self._of_settings.settings:
            self._plan = found
        else:
            log.warning("%s is of a service with other settings; what is loaded stays", self.path)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        with self._lock.open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # for as long as it takes to write a small file
            yield

    def _read(self) -> Plan:
        try:
            return Plan.model_validate_json(self.path.read_bytes())
        except (OSError, ValidationError) as error:
            raise PlanUnreadable(
                f"which tokenizers to load cannot be read ({error}); move {self.path} away for those of the settings"
            ) from error

    def _write(self, plan: Plan) -> None:
        write_whole(self.path, plan.model_dump_json(indent=2) + "\n")
