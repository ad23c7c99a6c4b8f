"""models/ speaks tensors: content in, codes out. What the service needs of it is named here."""

from models.checkpoint import DEFAULT_CHECKPOINT, Manifest, load, read_manifest
from models.errors import CheckpointError
from models.template import TextTemplate
from models.tokenizer import Encoding, Tokenizer
from models.trie import DeadPrefix, Trie

__all__ = [
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "DeadPrefix",
    "Encoding",
    "Manifest",
    "TextTemplate",
    "Tokenizer",
    "Trie",
    "load",
    "read_manifest",
]
