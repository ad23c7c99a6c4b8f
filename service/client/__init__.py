"""Clients of the service: batches, several requests in flight, retries of what is safe, an answer for every item.

items --batches--> portions --formats--> requests --connection, patience--> replies --> answers in order
"""

from service.client.answers import (
    Assignment,
    Change,
    ChangesPage,
    Child,
    FailedItem,
    Fault,
    LoadedTokenizers,
    NextCodes,
    PrefixListing,
    Swapped,
    TokenizedItem,
    TrieSnapshot,
    UnknownPrefix,
    UnknownSemanticId,
)
from service.client.asynchronous import AsyncTokenizerClient
from service.client.errors import (
    AccessDenied,
    ChangesGone,
    ClientClosed,
    MalformedSemanticId,
    NotAssigned,
    Refused,
    Retired,
    TokenizerError,
    Unavailable,
    UnknownTokenizer,
    UnusableAnswer,
)
from service.client.patience import Waiting
from service.client.synchronous import TokenizerClient

__all__ = [
    "AccessDenied",
    "Assignment",
    "AsyncTokenizerClient",
    "Change",
    "ChangesGone",
    "ChangesPage",
    "Child",
    "ClientClosed",
    "FailedItem",
    "Fault",
    "LoadedTokenizers",
    "MalformedSemanticId",
    "NextCodes",
    "NotAssigned",
    "PrefixListing",
    "Refused",
    "Retired",
    "Swapped",
    "TokenizedItem",
    "TokenizerClient",
    "TokenizerError",
    "TrieSnapshot",
    "Unavailable",
    "UnknownPrefix",
    "UnknownSemanticId",
    "UnknownTokenizer",
    "UnusableAnswer",
    "Waiting",
]
