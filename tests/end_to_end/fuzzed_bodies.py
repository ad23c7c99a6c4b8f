"""How schemathesis writes the bodies of streams; it loads this file by its name."""

from __future__ import annotations

import json
from typing import Any

import schemathesis


@schemathesis.serializer("application/x-ndjson")
def lines(_context: Any, value: Any) -> bytes:
    """An entry a line."""
    if isinstance(value, bytes):
        return value
    entries = value if isinstance(value, list) else [value]
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


@schemathesis.serializer("application/vnd.apache.arrow.stream")
def record_batches(_context: Any, value: Any) -> bytes:
    """Whatever bytes it likes: nothing in the document says how to write a record batch."""
    return value if isinstance(value, bytes) else json.dumps(value).encode()
