"""A follower process: keeps a trie by the changes, as a decoder does, through everything that happens.

Run by the harness: `python -m tests.chaos.follower SETUP.json`. It writes down every answer, and when it has reached
the revision that it finds in the file `until`, the IDs of its trie.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from models import Trie
from tests.chaos.observation import texts

COMING = {"assigned", "returned"}
"""The changes that bring an ID; the others take it away."""
WAIT_S = 0.5
PATIENCE_S = 30.0
"""How long after the end it may take to be where the record is."""


class Follower:
    """Follows by any of the services, another after each that fails."""

    def __init__(self, ports: list[int], seed: str) -> None:
        self._urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._chance = random.Random(seed)
        self._http = httpx.Client(timeout=WAIT_S + 4)
        self._trie: Trie | None = None

    @property
    def trie(self) -> Trie | None:
        """What it has so far."""
        return self._trie

    def step(self) -> dict[str, Any] | None:
        """Takes the trie, or the changes since; what to write down of it.

        Raises:
            httpx.HTTPError: There was no answer, or not this time.
        """
        url = self._chance.choice(self._urls)
        if self._trie is None:
            response = self._http.get(f"{url}/trie").raise_for_status()
            self._trie = Trie.from_bytes(response.content)
            return {"trie": self._trie.revision}
        after = self._trie.revision
        response = self._http.get(f"{url}/changes", params={"after": after, "wait_s": WAIT_S})
        if response.status_code == 410:
            self._trie = None
            return {"gone": after, "detail": response.json()["detail"]}
        answer = response.raise_for_status().json()
        self._apply(answer)
        return {"changes": answer["changes"]} if answer["changes"] else None

    def _apply(self, answer: dict[str, Any]) -> None:
        assert self._trie is not None
        ids: list[list[int]] = []
        live: list[bool] = []
        for change in answer["changes"]:
            ids.append([*map(int, change["semantic_id"].split("-"))])
            live.append(change["change"] in COMING)
        if ids:
            self._trie = self._trie.updated(torch.tensor(ids), torch.tensor(live), answer["next_after"])


def main(setup_path: str) -> None:
    """Follows until the file `until` says where to end."""
    torch.set_num_threads(1)
    setup = json.loads(Path(setup_path).read_text())
    until = Path(setup["until"])
    follower = Follower(setup["ports"], f"{setup['seed']}-follower")
    give_up: float | None = None
    with Path(setup["told"]).open("w", encoding="utf-8") as told:
        while give_up is None or time.monotonic() < give_up:
            try:
                line = follower.step()
            except (httpx.HTTPError, ValueError) as error:
                line = {"failed": type(error).__name__}
                time.sleep(0.1)
            if line is not None:
                told.write(json.dumps(line) + "\n")
                told.flush()
            if until.exists():
                give_up = give_up or time.monotonic() + PATIENCE_S
                if follower.trie is not None and follower.trie.revision >= json.loads(until.read_text()):
                    break
    ids = texts(follower.trie) if follower.trie is not None else []
    Path(setup["trie"]).write_text(json.dumps(ids))


if __name__ == "__main__":
    main(sys.argv[1])
