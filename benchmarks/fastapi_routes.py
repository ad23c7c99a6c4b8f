"""What a plain FastAPI application does with the same requests: peers of the service, without model and registry."""

from __future__ import annotations

from fastapi import FastAPI
from pydantic import BaseModel

app = FastAPI()


class Item(BaseModel):
    """An item as one would write it first."""

    item_id: str
    embedding: list[float]


class Items(BaseModel):
    """A request's body."""

    items: list[Item]


class Entry(BaseModel):
    """An item's answer."""

    item_id: str
    codes: list[int]


class Answer(BaseModel):
    """An answer's body."""

    items: list[Entry]


@app.get("/")
async def ready() -> dict[str, bool]:
    """Whether it is there."""
    return {"ready": True}


@app.post("/trivial")
async def trivial() -> dict[str, bool]:
    """Reads nothing of the body and does nothing."""
    return {"done": True}


@app.post("/embeddings")
async def embeddings(request: Items) -> Answer:
    """Validates embeddings and answers an entry for each; where codes would be computed stand zeros."""
    return Answer(items=[Entry(item_id=item.item_id, codes=[0, 0, 0, 0]) for item in request.items])
