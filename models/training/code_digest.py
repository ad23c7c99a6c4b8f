"""A digest of the code that a fit runs, so that a state is not gone on from by other code."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# From data to a fitted model; whatever of ours these import counts too.
ROOTS = (
    "models.training.data",
    "models.training.collaborative",
    "models.training.fit",
    "models.training.rvq",
)


@cache
def code_digest(roots: tuple[str, ...] = ROOTS) -> str:
    """16 hex digits over the code of modules and of all modules of `models` that they import, directly or not.

    Comments, docstrings and the layout do not count.

    Args:
        roots: Names of modules.
    """
    found: dict[str, str] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found or (path := _source(name)) is None:
            continue
        tree = _without_docstrings(ast.parse(path.read_bytes()))
        found[name] = ast.dump(tree)
        waiting += _imported(tree)
    content = "\n".join(f"{name} {code}" for name, code in sorted(found.items()))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _source(name: str) -> Path | None:
    """The file of a module, None where it is none of ours or a name in one."""
    if name.partition(".")[0] != "models":
        return None
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # what is above it is a module, not a package: a name in one
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imported(tree: ast.Module) -> list[str]:
    """What a module imports, wherever it does: of `from a import b` a.b where that is a module, else a."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names += [name if _source(name) else node.module for name in inner]
    return names


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:]
    return tree
