"""models/ speaks tensors: content in, codes out. What the service needs of it is named here."""

from models.checkpoint import CHECKPOINT_FILES, DEFAULT_CHECKPOINT, Manifest, TextPrecision, load, read_manifest
from models.errors import CheckpointError
from models.ladder import Encoding, Precision
from models.template import TextTemplate
from models.tokenizer import Explanation, Tokenizer
from models.trie import DeadPrefix, Trie

__all__ = [
    "CHECKPOINT_FILES",
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "DeadPrefix",
    "Encoding",
    "Explanation",
    "Manifest",
    "Precision",
    "TextPrecision",
    "TextTemplate",
    "Tokenizer",
    "Trie",
    "load",
    "read_manifest",
]
