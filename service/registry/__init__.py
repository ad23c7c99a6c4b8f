"""The durable records of which item holds which Semantic ID.

Redis errors end here: callers see `RegistryUnavailable` when waiting may help and `RegistryRefused` at start when a
setting has to change.
"""

from service.registry.assignment import Assignment, Claim, ClaimResult
from service.registry.durability import Durability
from service.registry.record import Record
from service.registry.registry import Registry

__all__ = ["Assignment", "Claim", "ClaimResult", "Durability", "Record", "Registry"]
