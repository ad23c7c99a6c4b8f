"""models/ speaks tensors: content in, codes out. What the service needs of it is named here."""

from models.checkpoint import SHIPPED, Manifest, load, read_manifest
from models.errors import CheckpointError
from models.template import TextTemplate
from models.tokenizer import Encoding, Tokenizer

__all__ = ["SHIPPED", "CheckpointError", "Encoding", "Manifest", "TextTemplate", "Tokenizer", "load", "read_manifest"]
