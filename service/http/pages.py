"""The explorer page: files of the service's own, under a policy that lets nothing else in."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

from service.state import EXPLORER

router = APIRouter(include_in_schema=False)

PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Item ids are whatever callers wrote: should one ever reach the page as markup, it can neither run nor call out.
POLICY = (
    "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asked again each time, and answered 304: a page never has scripts of another release.
    "cache-control": "no-cache",
}


class Asset(NamedTuple):
    """A file of the page."""

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """All files of the page by name: what is not there cannot be asked for, whatever the path."""
    return {
        path.name: Asset(content := path.read_bytes(), MEDIA_TYPES[path.suffix], _etag(content))
        for path in EXPLORER.iterdir()
        if path.suffix in MEDIA_TYPES
    }


@router.get("/")
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, PAGE)


@router.get("/explorer/{name}")
async def asset(request: Request, name: str) -> Response:
    """A file of the page."""
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    if (found := assets().get(name)) is None:
        raise HTTPException(404)
    headers = {**HEADERS, "etag": found.etag}
    if request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers={**headers, "content-type": found.media_type})


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:16]}"'
