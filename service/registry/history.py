"""Whether a record in the registry goes on from what was acknowledged of it; where not, nothing is answered from it.

    restored from a backup, failed over to a late replica, a lost tail, emptied:
        the registry's revision is behind the mark, or its epoch is another --> RegistryOlder
    `semid registry accept`:
        a new epoch, beside it the former ones and the revision at which each was cut --> services go on from there

An epoch is one history of a record, in which a revision stands for the same changes for good.
"""

from __future__ import annotations

import logging
import secrets
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from service.errors import RegistryOlder, RegistryUnavailable
from service.registry.keys import meta_key
from service.registry.marks import Mark
from service.registry.primary import Script, ScriptCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from redis.exceptions import ResponseError

    from service.registry.cluster import Server
    from service.registry.marks import Marks

logger = logging.getLogger(__name__)

_ACCEPT = Script(Path(__file__).with_name("accept.lua").read_bytes())


class Found(NamedTuple):
    """What the registry says of a record's history.

    Attributes:
        epoch: The history that it is in; empty where there is no record.
        revision: The number of changes in it so far.
        former: Histories that an operator gave up, and the revision at which each was cut.
    """

    epoch: bytes
    revision: int
    former: dict[bytes, int]

    @classmethod
    def asked(cls, meta: bytes) -> tuple[bytes, ...]:
        """The command that asks."""
        return (b"HMGET", meta, b"epoch", b"revision", b"former")

    @classmethod
    def read(cls, fields: Sequence[bytes | None]) -> Found:
        """The answer to it."""
        epoch, revision, former = fields
        cuts = (part.partition(b"@") for part in (former or b"").split())
        return cls(epoch or b"", int(revision or 0), {name: int(cut) for name, _, cut in cuts})

    def goes_on_from(self, mark: Mark) -> bool:
        """Whether all that the mark stands for is still there, or was given up by an operator."""
        return mark.epoch in self.former or (mark.epoch == self.epoch and mark.revision <= self.revision)

    def kept_of(self, mark: Mark) -> int:
        """The revision up to which what the mark stands for is still there."""
        return min(mark.revision, self.revision if mark.epoch == self.epoch else self.former.get(mark.epoch, 0))

    def lost_of(self, marks: Iterable[Mark]) -> int:
        """How many changes the marks stand for and the registry does not have, at most."""
        return max((mark.revision - self.kept_of(mark) for mark in marks), default=0)

    def __str__(self) -> str:
        """For people."""
        return f"revision {self.revision} of epoch {self.epoch.decode()}" if self.epoch else "nothing"


class History:
    """One epoch of one record: its calls are answered only while the registry goes on from the mark.

    Attributes:
        name: The record's.
        epoch: Empty for a record that does not exist.
        ended: Whether an operator accepted another: the record has to be taken up anew.
        doubted: Whether the registry was older when last asked.
    """

    def __init__(self, server: Server, name: str, meta: bytes, marks: Marks, epoch: bytes) -> None:
        """Of the record with this name and this key; nothing is compared yet."""
        self.epoch = epoch
        self.ended = False
        self.doubted = False
        self._server = server
        self.name = name
        self._meta = meta
        self._marks = marks
        self._known = marks.of(name)
        self._begun = False

    @property
    def marked(self) -> bool:
        """Whether anything is known that the registry has to go on from."""
        return bool(self._known)

    @property
    def revision(self) -> int:
        """How far the record has come in this epoch, as far as is known here."""
        return self._revision_of(self._known_by_all)

    def _revision_of(self, known: frozenset[Mark]) -> int:
        return max((mark.revision for mark in known if mark.epoch == self.epoch), default=0)

    @property
    def _known_by_all(self) -> frozenset[Mark]:
        """With what the other services on the data directory have acknowledged by now, as of one record for all."""
        return self._known | self._marks.beside(self.name)

    async def look(self) -> Found:
        """What the registry says now.

        Raises:
            RegistryOlder: It is older than what was acknowledged.
            RegistryUnavailable: It cannot be reached.
        """
        known = self._known_by_all
        (fields,) = await self._server.read([Found.asked(self._meta)])
        return self._compare(known, Found.read(fields))

    async def read(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers of commands that write nothing, in order, from a registry that goes on from the mark.

        Raises:
            RegistryOlder: It is older than what was acknowledged, or an operator has just accepted that.
            RegistryUnavailable: It cannot be reached.
        """
        known = self._known_by_all  # what is acknowledged while the answers are on their way, they need not have
        *answers, fields = await self._server.read([*commands, Found.asked(self._meta)])
        found = self._compare(known, Found.read(fields))
        self.require()
        if not self._server.waits and not self._server.unchecked:
            self.reached(found.revision)  # else only once it is durable
        return answers

    async def begin(self) -> None:
        """Compares once, before the first write.

        Raises:
            RegistryOlder: As in `read`.
            RegistryUnavailable: The registry cannot be reached.
        """
        if not self._begun:
            await self.look()
        self.require()

    def require(self) -> None:
        """Raise RegistryOlder where another epoch has begun."""
        if self.ended:
            error = RegistryOlder(f"An operator has just accepted that the record {self.name} is older: send it again.")
            error.retry_after_s = 1.0
            raise error

    async def refused(self, error: ResponseError) -> NoReturn:
        """A script refused, as the registry was older: says how.

        Raises:
            RegistryOlder: It is, or an operator has just accepted that.
            RegistryUnavailable: It was and is no longer, or cannot be reached.
        """
        await self.look()
        self.require()
        if str(error).startswith("OLDER -"):  # on a cluster, another server than the one that tells the revision
            self.lost_a_part(1)
        raise RegistryUnavailable("The registry answered as an older one, and then no longer: send it again.")

    def lost_a_part(self, parts: int) -> NoReturn:
        """On a cluster, servers have lost changes that are in the log.

        Raises:
            RegistryOlder: Always.
        """
        detail = (
            f"The record {self.name} has lost a part of what was acknowledged, under {parts} of its first codes. "
            "Bring the newer servers back, or see `semid registry status` and `accept`."
        )
        if not self.doubted:
            logger.error("%s", detail)
        self.doubted = True
        raise RegistryOlder(detail)

    def reached(self, revision: int) -> None:
        """The record is at this revision, and that is about to be acknowledged: the mark moves on before.

        Raises:
            RegistryOlder: An operator has accepted meanwhile that this history was cut.
        """
        if self.epoch and revision > self._revision_of(self._known):
            mark = Mark(self.epoch, revision)
            self.ended = self.ended or not self._marks.advance(self.name, mark)
            self.require()
            self._known = frozenset({mark})

    def question(self) -> tuple[tuple[bytes, ...], frozenset[Mark]]:
        """What to ask the registry, and what to `answer` with its answer, where many are asked at once."""
        return Found.asked(self._meta), self._known_by_all

    def answer(self, known: frozenset[Mark], fields: Sequence[bytes | None]) -> None:
        """The registry's answer to `question`.

        Raises:
            RegistryOlder: It is older than what was acknowledged.
        """
        self._compare(known, Found.read(fields))

    def _compare(self, known: frozenset[Mark], found: Found) -> Found:
        if missing := [mark for mark in known if not found.goes_on_from(mark)]:
            latest = max(missing, key=lambda mark: mark.revision)
            detail = (
                f"The record {self.name} was at revision {latest.revision} of epoch {latest.epoch.decode()}; the "
                f"registry has {found}. Bring the newer one back, or see `semid registry status` and `accept`."
            )
            if not self.doubted:
                logger.error("%s", detail)
            self.doubted = True
            raise RegistryOlder(detail)
        self.doubted = False
        if self.epoch and found.epoch != self.epoch:
            self.ended = True
        elif self.epoch and not self._begun:
            self._begin(found)
        return found

    def _begin(self, found: Found) -> None:
        """The mark is of this epoch from now on."""
        self._begun = True
        if lost := found.lost_of(self._known):
            logger.warning("An operator accepted that the record %s lost up to %d changes", self.name, lost)
        mark = Mark(self.epoch, max(map(found.kept_of, self._known), default=0))
        self._marks.begin(self.name, mark)
        self._known = frozenset({mark})


class RecordFacts(NamedTuple):
    """What is known of a record.

    Attributes:
        max_suffix: The highest suffix that it may issue.
        changes_kept: How many of its changes are kept, at least.
        history: What it has to go on from.
    """

    max_suffix: int
    changes_kept: int
    history: History


def says_older(error: ResponseError) -> bool:
    """Whether a script refused because the registry is older than what was acknowledged."""
    return str(error).startswith("OLDER")


class Comparison(NamedTuple):
    """A record in the registry beside the marks of a data directory.

    Attributes:
        name: `namespace:fingerprint`.
        found: What the registry says of its history.
        live: The number of its live assignments.
        marks: How far it had come when something was last acknowledged, by each service.
        parts: On a cluster, under how many first codes servers have lost IDs that are in the log.
    """

    name: str
    found: Found
    live: int
    marks: frozenset[Mark]
    parts: int = 0

    @property
    def older(self) -> bool:
        """Whether services refuse it."""
        return self.parts > 0 or not all(map(self.found.goes_on_from, self.marks))

    @property
    def lost(self) -> int:
        """How many acknowledged changes it does not have, at most."""
        return self.found.lost_of(mark for mark in self.marks if not self.found.goes_on_from(mark))


async def compare(server: Server, marks: Marks) -> list[Comparison]:
    """All records of the registry and all that have a mark, by name.

    Raises:
        RegistryUnavailable: The registry cannot be reached.
    """
    keys = await server.call(partial(server.matching, b"sid:{*}:meta"))
    names = marks.names() | {key.removeprefix(b"sid:{").removesuffix(b"}:meta").decode() for key in keys}
    ordered = sorted(names)
    told = await server.read([Found.asked(meta_key(name)) for name in ordered])
    counts = await server.read([("HGET", meta_key(name), b"count") for name in ordered])
    return [
        Comparison(name, Found.read(fields), int(count or 0), marks.of(name))
        for name, fields, count in zip(ordered, told, counts, strict=True)
    ]


async def accept(server: Server, comparison: Comparison) -> bool:
    """Begins a new epoch of a record, so that the services whose marks were compared go on from what is there.

    Returns:
        Whether it did; not where the record has another epoch than the one compared.

    Raises:
        RegistryUnavailable: The registry cannot be reached; it may have begun.
    """
    found = comparison.found
    abandoned = sorted({mark.epoch for mark in comparison.marks} - {found.epoch, *found.former})
    arguments = [found.epoch, secrets.token_hex(8).encode(), *abandoned]
    call = ScriptCall(_ACCEPT, [meta_key(comparison.name)], arguments)
    (reply,) = await server.call(partial(server.written, [call]), retried=False)
    return bool(reply[1])
