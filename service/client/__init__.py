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
from service.client.explanation import ExplainedLevel, Explanation, NearItem, TrainingPlace
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
    "ExplainedLevel",
    "Explanation",
    "FailedItem",
    "Fault",
    "LoadedTokenizers",
    "MalformedSemanticId",
    "NearItem",
    "NextCodes",
    "NotAssigned",
    "PrefixListing",
    "Refused",
    "Retired",
    "Swapped",
    "TokenizedItem",
    "TokenizerClient",
    "TokenizerError",
    "TrainingPlace",
    "TrieSnapshot",
    "Unavailable",
    "UnknownPrefix",
    "UnknownSemanticId",
    "UnknownTokenizer",
    "UnusableAnswer",
    "Waiting",
]
