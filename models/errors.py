"""The one error of `models` beside ValueError."""


class CheckpointError(Exception):
    """A checkpoint cannot be loaded: files missing, not safetensors, or its fingerprint does not match."""
