"""`name=value` settings onto a frozen config dataclass, nested ones by dots: `loss.commitment=0.25`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from typing import Any, TypeVar

C = TypeVar("C")


def configured(config: C, settings: Iterable[str]) -> C:
    """A config with the settings applied, in order.

    Args:
        config: A frozen dataclass; a setting's type is that of the field's present value.
        settings: `name=value` with a JSON value; lists become tuples.

    Raises:
        ValueError: A name is unknown, or a value is not JSON or of another type.
    """
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} is not name=value")
        config = _with(config, name.strip(), name.strip().split("."), value)
    return config


def at_least(part: str, config: object, **least: int) -> None:
    """Check numbers of a config, for its `__post_init__`.

    Args:
        part: By which name the config is a part of another one; empty where it is none.
        config: A dataclass.
        least: Field -> the smallest number that makes sense.

    Raises:
        ValueError: A number is smaller.
    """
    for name, number in least.items():
        if getattr(config, name) < number:
            raise ValueError(
                f"{part}{'.' if part else ''}{name} has to be at least {number}, not {getattr(config, name)}"
            )


def _with(config: Any, name: str, path: list[str], value: str) -> Any:
    known = [field.name for field in fields(config)]
    if path[0] not in known:
        before = name.removesuffix(".".join(path))
        near = get_close_matches(path[0], known, n=1)
        meant = f" (did you mean {before}{near[0]}?)" if near else ""
        raise ValueError(f"there is no setting {name!r}{meant}; known are {', '.join(before + one for one in known)}")
    present = getattr(config, path[0])
    if is_dataclass(present) and len(path) > 1:
        return replace(config, **{path[0]: _with(present, name, path[1:], value)})
    if is_dataclass(present) or len(path) > 1:
        inner = f"{name}.<one of {', '.join(field.name for field in fields(present))}>" if is_dataclass(present) else ""
        raise ValueError(f"{name!r} is no setting; {inner or path[0] + ' has no parts'}")
    return replace(config, **{path[0]: _typed(name, present, value)})


def _typed(name: str, present: Any, text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}={text}: the value is not JSON ({error})") from error
    value = tuple(value) if isinstance(value, list) else value
    if isinstance(present, float) and type(value) is int:
        value = float(value)
    if present is not None and type(value) is not type(present):
        raise ValueError(f"{name} is of type {type(present).__name__}, not {text}")
    return value
