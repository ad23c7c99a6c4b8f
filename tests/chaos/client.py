"""A client process: asks what its workload says, and writes down each request and each answer before it goes on.

Run by the harness: `python -m tests.chaos.client SETUP.json`. It needs nothing but the standard library, so it starts
at once.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.chaos.history import History
from tests.chaos.workload import Plan, workload

TIMEOUT_S = 4.0
PAUSE_S = 0.05
"""After a request without answer, so that a service that is down is not asked a thousand times a second."""
WAIT_BEFORE_LEAVING_S = 0.005
CHECKED = {"item_id", "semantic_id", "created", "content_changed", "replaced_by", "retired_at", "error"}
KEPT_IDS = 2000


class Unanswered(Exception):
    """There was no answer, and why."""


class Caller:
    """Asks one service, over one connection as long as it lasts."""

    def __init__(self, port: int, timeout_s: float = TIMEOUT_S) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)

    def ask(self, method: str, path: str, body: Any = None, *, leave: str | None = None) -> tuple[int, Any]:
        """The status and the parsed body of the answer.

        Raises:
            Unanswered: There was none, or the caller left, as it was told to.
        """
        data = b"" if body is None else json.dumps(body).encode()
        try:
            self._send(method, path, data, leave)
            response = self._connection.getresponse()
            # Cut within the headers it seems to be over, and empty: no JSON, so no answer.
            return response.status, json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unanswered(type(error).__name__) from error
        except Unanswered:
            self.close()
            raise

    def _send(self, method: str, path: str, data: bytes, leave: str | None) -> None:
        self._connection.putrequest(method, path)
        self._connection.putheader("content-type", "application/json")
        self._connection.putheader("content-length", str(len(data)))
        self._connection.endheaders()
        self._connection.send(data[: len(data) // 2] if leave == "sending" else data)
        if leave is not None:
            if leave == "waiting":
                time.sleep(WAIT_BEFORE_LEAVING_S)
            raise Unanswered(f"left while {leave}")

    def close(self) -> None:
        """Closes the connection; the next call makes another."""
        self._connection.close()


class Client:
    """Does what is planned, and keeps the history.

    Args:
        history: Where to write it.
        ports: Of the services.
        embeddings: Of each content.
    """

    def __init__(self, history: History, ports: list[int], embeddings: list[list[float]]) -> None:
        self._history = history
        self._callers = [Caller(port) for port in ports]
        self._embeddings = embeddings
        self._told: list[str] = []
        self._avoided = -1

    def run(self, plan: Plan) -> None:
        """One request, from its line in the history to the line of its outcome."""
        arguments = self._arguments(plan)
        if arguments is None:
            return
        number = self._history.request(plan.call, arguments)
        service = int(plan.service * len(self._callers))
        if service == self._avoided:
            service = (service + 1) % len(self._callers)
        try:
            status, body = ask(self._callers[service], plan.call, arguments, self._embeddings, leave=plan.leave)
        except Unanswered as error:
            self._history.unknown(number, str(error))
            if plan.leave is None:
                self._avoid(service)
            return
        self._history.answer(number, status, body)
        if status in {429, 503}:
            self._avoid(service)
            return
        self._avoided = -1
        if plan.call == "tokenize" and status == 200:
            self._told += [entry["semantic_id"] for entry in body if "semantic_id" in entry]
            del self._told[:-KEPT_IDS]

    def _arguments(self, plan: Plan) -> dict[str, Any] | None:
        """What to ask; None where it is about an ID and no one has been told yet."""
        if plan.call not in {"reverse", "lookup"}:
            return plan.arguments
        if not self._told:
            return None
        chosen = [self._told[int(pick * len(self._told))] for pick in plan.arguments["picks"]]
        return {"semantic_id": chosen[0]} if plan.call == "reverse" else {"semantic_ids": chosen}

    def _avoid(self, service: int) -> None:
        self._avoided = service
        time.sleep(PAUSE_S)


def ask(
    caller: Caller,
    call: str,
    arguments: dict[str, Any],
    embeddings: list[list[float]],
    *,
    leave: str | None = None,
    tokenizer: str | None = None,
) -> tuple[int, Any]:
    """Makes a call, about the record of a tokenizer or of the default one; the status and what is checked of the body.

    Raises:
        Unanswered: There was no answer.
    """
    named, query = ({"tokenizer": tokenizer}, f"?tokenizer={quote(tokenizer)}") if tokenizer else ({}, "")
    if call == "tokenize":
        items = [{"item_id": item, "embedding": embeddings[content]} for item, content in arguments["items"]]
        body = {"items": items, "on_change": arguments["on_change"], **named}
        status, answer = caller.ask("POST", "/tokenize", body, leave=leave)
    elif call == "lookup":
        status, answer = caller.ask("POST", "/lookup", {**arguments, **named}, leave=leave)
    elif call == "reverse":
        status, answer = caller.ask("GET", f"/item/{arguments['semantic_id']}{query}", leave=leave)
    else:
        method = "DELETE" if call == "retire" else "GET"
        status, answer = caller.ask(method, f"/assignment/{quote(arguments['item'], safe='')}{query}", leave=leave)
    if status == 200 and "items" in answer:
        return status, [checked(entry) for entry in answer["items"]]
    return status, checked(answer) if status in {200, 410} else answer


def checked(entry: dict[str, Any]) -> dict[str, Any]:
    """What is checked of an entry."""
    return {name: value for name, value in entry.items() if name in CHECKED}


def main(setup_path: str) -> None:
    """Runs until the file `stop` is there."""
    setup = json.loads(Path(setup_path).read_text())
    stop = Path(setup["stop"])
    with History(Path(setup["history"])) as history:
        client = Client(history, setup["ports"], setup["embeddings"])
        for plan in workload(setup["seed"], setup["client"], setup["clients"]):
            if stop.exists():
                break
            client.run(plan)


if __name__ == "__main__":
    main(sys.argv[1])
