"""Whether the answers about one item can be explained: each by requests that could have taken effect before it.

One item's assignment is a small state machine. A request takes effect between its start and its answer, more than once
where the service repeated it inside; one without an answer may take effect at any time within `EFFECT_S`, or never. The
check follows all states that the item can be in, and all ways to have served the requests under way; an answer that
none of them gives is a violation. That is linearizability, with requests that may be repeated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

EFFECT_S = 20.0
"""How long after its caller gave it up a request may still take effect: longer than any time limit on its way."""

Answer = tuple[object, ...]


class State(NamedTuple):
    """What one item holds. Of its IDs the codes say enough: it has at most one with the same codes.

    Attributes:
        held: The codes of the ID that it holds, or held when it was retired; None before the first.
        retired: Whether it was retired.
        changed: Whether its latest content has other codes.
        issued: The codes of all IDs that it ever had.
    """

    held: str | None = None
    retired: bool = False
    changed: bool = False
    issued: frozenset[str] = frozenset()


class Step(NamedTuple):
    """A request's part about one item.

    Attributes:
        kind: `keep` or `reassign` (tokenize with these codes), `retire`, `forward`, or `reverse` (of the ID with these
            codes).
        codes: See `kind`; empty where there are none.
        start: When it was asked.
        end: When it was answered, or given up.
        answer: What was answered; None where it is unknown.
        source: Where the request stands in the histories.
    """

    kind: str
    codes: str
    start: float
    end: float
    answer: Answer | None
    source: str = ""

    def __str__(self) -> str:
        what = f"{self.kind} {self.codes}".rstrip()
        return f"{self.start:.3f} to {self.end:.3f} {self.source}: {what} -> {self.answer or 'unknown'}"


class Effect(NamedTuple):
    """What a request does to an item."""

    kind: str
    codes: str


class Configuration(NamedTuple):
    """A state that is possible, and which of the requests under way have their answer already."""

    state: State
    served: frozenset[int]


def apply(state: State, effect: Effect) -> tuple[State, Answer]:
    """The state after a request, and its answer."""
    kind, codes = effect
    if kind in {"keep", "reassign"}:
        return _tokenize(state, codes, reassign=kind == "reassign")
    if state.held is None:
        return state, ("none",)
    if kind == "retire":
        return state._replace(retired=True), ("retired", state.held)
    if kind == "forward":
        return state, ("retired", state.held) if state.retired else ("live", state.held, state.changed)
    return state, _reverse(state, codes)


def _reverse(state: State, codes: str) -> Answer:
    if codes not in state.issued:
        return ("none",)
    if state.retired:
        return "retired", codes
    return "live", codes, state.changed, None if codes == state.held else state.held


def _tokenize(state: State, codes: str, *, reassign: bool) -> tuple[State, Answer]:
    if state.held is None or (reassign and state.held != codes):
        created = codes not in state.issued
        return State(codes, issued=state.issued | {codes}), ("held", codes, created, False)
    changed = state.held != codes
    return state._replace(retired=False, changed=changed), ("held", state.held, False, changed)


class Unexplained(NamedTuple):
    """An answer that nothing explains.

    Attributes:
        step: Whose.
        possible: What could have been answered.
        before: The latest steps before its end.
    """

    step: Step
    possible: list[Answer]
    before: list[Step]


def explain(steps: Sequence[Step]) -> Unexplained | None:
    """The first answer that nothing explains, of all that was asked about one item; None where all is well."""
    return _Search(steps).run()


class _Search:
    """Goes through the requests' starts and ends in order, with all configurations that are possible."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._possible = {Configuration(State(), frozenset())}
        self._waiting: set[int] = set()  # their answer is known and lies ahead
        self._lost: set[int] = set()  # they may have an effect, or none

    def run(self) -> Unexplained | None:
        for _, ends, i in sorted(self._events()):
            step = self._steps[i]
            group = self._lost if step.answer is None else self._waiting
            if not ends:
                group.add(i)
                continue
            self._let_all_take_effect()
            if step.answer is not None:
                served = {one for one in self._possible if i in one.served}
                if not served:
                    return self._unexplained(i)
                self._possible = {Configuration(state, others - {i}) for state, others in served}
            group.discard(i)
        return None

    def _events(self) -> Iterable[tuple[float, bool, int]]:
        for i, step in enumerate(self._steps):
            if step.answer is None and step.kind in {"forward", "reverse"}:
                continue
            yield step.start, False, i
            yield step.end + (EFFECT_S if step.answer is None else 0), True, i

    def _let_all_take_effect(self) -> None:
        """Adds all that can come of what is possible, by the requests under way in any order."""
        lost = {Effect(self._steps[i].kind, self._steps[i].codes) for i in self._lost}
        ahead = list(self._possible)
        while ahead:
            found = ahead.pop()
            for following in self._following(found, lost):
                if following not in self._possible:
                    self._possible.add(following)
                    ahead.append(following)

    def _following(self, found: Configuration, lost: Iterable[Effect]) -> Iterable[Configuration]:
        for effect in lost:
            yield Configuration(apply(found.state, effect)[0], found.served)
        for i in self._waiting - found.served:
            step = self._steps[i]
            state, answer = apply(found.state, Effect(step.kind, step.codes))
            yield Configuration(state, found.served)  # to be repeated, and answered only then
            if answer == step.answer:
                yield Configuration(state, found.served | {i})

    def _unexplained(self, i: int) -> Unexplained:
        step = self._steps[i]
        answers = {apply(one.state, Effect(step.kind, step.codes))[1] for one in self._possible}
        before = sorted((one for one in self._steps if one.start <= step.end), key=lambda one: one.start)
        return Unexplained(step, sorted(answers, key=str), before)
