"""models/ speaks tensors: content in, codes out. What the service needs of it is named here."""

from models.checkpoint import DEFAULT_CHECKPOINT, Manifest, load, read_manifest
from models.errors import CheckpointError
from models.template import TextTemplate
from models.tokenizer import Encoding, Tokenizer

__all__ = [
    "DEFAULT_CHECKPOINT",
    "CheckpointError",
    "Encoding",
    "Manifest",
    "TextTemplate",
    "Tokenizer",
    "load",
    "read_manifest",
]
