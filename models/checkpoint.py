"""Checkpoints: a directory with `manifest.json` and `model.safetensors`. The only weight I/O.

The fingerprint covers everything that can move a code (P8), component by component, so that a mismatch can say what
differs. It is computed again at every load.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.errors import CheckpointError
from models.exactness import FLOAT16_PAYING_SHARE, INT16_PAYING_SHARE, PAYING_SHARE, self_test
from models.ladder import ErrorBounds
from models.network import DecoderNetwork, EncoderNetwork, NetworkConfig
from models.template import TextTemplate
from models.text_encoder import CANARY_TEXTS, TextEncoder, TextEncoderConfig
from models.tokenizer import FAMILIES, PREFIX_IS_NOT_COARSER, Tokenizer, TokenizerParts
from models.whole_files import whole_directory

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CHECKPOINT_FILES = (MANIFEST, WEIGHTS)
TextPrecision = Literal["auto", "float32", "bfloat16", "float16", "int16"]
DEFAULT_CHECKPOINT = Path(__file__).parent / "checkpoints" / "broad-6x256"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        name: The tokenizer's name; letters, digits, dots, dashes and underscores.
        fingerprint: 16 hex digits over `components`.
        family: A key of `models.tokenizer.FAMILIES`.
        codebook_sizes: K_l for each level.
        widths: Of the encoder network, D to d.
        template: The text template's settings.
        text_encoder: Its source and revision; None where the tokenizer takes embeddings only.
        components: Digests and settings of everything the fingerprint covers.
        bounds: Latent errors below which a row is computed again, see `ErrorBounds`.
        canary: Latents of known texts, measured again at every load; empty where the tokenizer takes embeddings only.
        calibration: How the bounds were measured.
        prefix_is_coarse_to_fine: Whether a shorter prefix means a coarser group.
        max_suffix: The highest suffix in the generator's vocabulary, None without bound.
        training: Data, hyper-parameters, seed.
        report: The measures of `models.evaluation.measures`.
    """

    name: str
    fingerprint: str
    family: str
    codebook_sizes: tuple[int, ...]
    widths: tuple[int, ...]
    template: Mapping[str, Any]
    text_encoder: Mapping[str, Any] | None
    components: Mapping[str, Any]
    bounds: Mapping[str, float]
    canary: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    prefix_is_coarse_to_fine: bool = True
    max_suffix: int | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def full_name(self) -> str:
        """`name@fingerprint`."""
        return f"{self.name}@{self.fingerprint}"


def freeze(name: str, parts: TokenizerParts, bounds: ErrorBounds, **notes: Any) -> Manifest:
    """The manifest of these parts.

    Args:
        name: The tokenizer's name.
        parts: What is frozen.
        bounds: The calibrated error bounds.
        **notes: `calibration`, `training`, `report`, `max_suffix`: kept, not fingerprinted.
    """
    check_name(name)
    components = _components(parts)
    return Manifest(
        name=name,
        fingerprint=_fingerprint(components),
        family=parts.family,
        codebook_sizes=parts.quantizer.codebook_sizes,
        widths=parts.network.config.widths,
        template=asdict(parts.template),
        text_encoder=asdict(parts.text_encoder.config) if parts.text_encoder else None,
        components=components,
        bounds={name: bound for name, bound in asdict(bounds).items() if bound is not None},
        canary=_canary(parts),
        prefix_is_coarse_to_fine=parts.family not in PREFIX_IS_NOT_COARSER,
        **notes,
    )


def check_name(name: str) -> None:
    """Refuse a name that no tokenizer can have.

    Raises:
        ValueError: It has anything but letters, digits, dots, dashes and underscores.
    """
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"):
        msg = f"a tokenizer's name has letters, digits, '.', '_' and '-' only, got {name!r}"
        raise ValueError(msg)


def save(directory: Path, parts: TokenizerParts, manifest: Manifest, beside: Mapping[str, str] | None = None) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        directory: Must not exist, or be empty.
        parts: The tensors.
        manifest: What it says of itself.
        beside: Texts by file name that are read by people and tools, never to load it.

    Raises:
        FileExistsError: The directory exists and is not empty; a frozen checkpoint is never overwritten.
    """
    if directory.exists() and any(directory.iterdir()):
        msg = f"{directory} is not empty; a checkpoint is frozen and is never overwritten"
        raise FileExistsError(msg)
    with whole_directory(directory) as draft:
        save_file(_state(parts), draft / WEIGHTS)
        (draft / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
        for name, text in (beside or {}).items():
            (draft / name).write_text(text, encoding="utf-8")
        for file in draft.iterdir():
            file.chmod(0o644)
        draft.chmod(0o755)


def read_manifest(directory: Path) -> Manifest:
    """A checkpoint's manifest, unverified.

    Raises:
        CheckpointError: It is missing, not JSON, or of another format.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        msg = f"there is no checkpoint at {directory}: {MANIFEST} is missing"
        raise CheckpointError(msg) from error
    except (OSError, ValueError) as error:
        msg = f"{path} cannot be read: {error}"
        raise CheckpointError(msg) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        msg = f"{path} has format {found!r}; this version reads format {FORMAT}"
        raise CheckpointError(msg)
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        msg = f"{path} is not a manifest: {error}"
        raise CheckpointError(msg) from error
    _check_max_suffix(path, manifest)
    return manifest


def load(
    directory: Path,
    device: torch.device | str = "cpu",
    text_encoder: str | None = None,
    *,
    text_precision: TextPrecision = "float32",
    tests_itself: bool = False,
) -> Tokenizer:
    """A frozen tokenizer, its fingerprint recomputed.

    Args:
        directory: The checkpoint.
        device: Where the fast paths run.
        text_encoder: Where the text encoder's files lie, if not where the manifest says.
        text_precision: The first path that texts take. `auto`: on a GPU float16 where few enough rows of a test would
            be computed again; on a CPU int16 where the forward pass has it and few enough would; where it has not,
            bfloat16 if the manifest says so and the processor multiplies it fast.
        tests_itself: Measure the fast paths on this machine, and take the larger of each bound found and frozen; half
            a second more, in which the process's number of threads changes. Half precision is always tested, and so is
            every path on a GPU: manifests hold what was seen on a CPU.

    Raises:
        CheckpointError: Anything is missing, malformed, or differs from what the fingerprint covers.
    """
    manifest = read_manifest(directory)
    parts = load_parts(directory, manifest, device, text_encoder)
    _verify(directory, manifest, _components(parts))
    tokenizer = Tokenizer(manifest.full_name, parts, _bounds(directory, manifest), device)
    _check_canary(directory, manifest, tokenizer)
    int16_share = _int16_share(tokenizer, text_precision)
    takes_bfloat16 = int16_share is None and _takes_bfloat16(manifest, tokenizer.device, text_precision)
    bfloat16 = tokenizer.takes_text and takes_bfloat16
    float16_share = _float16_share(tokenizer.device, text_precision) if tokenizer.takes_text else None
    on_device = tokenizer.device.type != "cpu"
    if tests_itself or on_device or bfloat16 or float16_share is not None or int16_share is not None:
        tokenizer.bounds = self_test(tokenizer, bfloat16=bfloat16, float16_share=float16_share, int16_share=int16_share)
    else:
        tokenizer.bounds = replace(
            tokenizer.bounds, text_bfloat16=None, text_float16=None, text_int16=None, text_float64=None
        )
    return tokenizer


def _int16_share(tokenizer: Tokenizer, text_precision: TextPrecision) -> float | None:
    """Up to which share of rows computed again texts are tried in int16 first; None: they are not."""
    if (
        text_precision not in {"auto", "int16"}
        or tokenizer.text_encoder is None
        or not tokenizer.text_encoder.has_int16
    ):
        return None
    return INT16_PAYING_SHARE if text_precision == "auto" else 1.0


def _float16_share(device: torch.device, text_precision: TextPrecision) -> float | None:
    """Up to which share of rows computed again texts are tried in float16 first; None: they are not."""
    if text_precision == "auto" and device.type == "cuda":
        return FLOAT16_PAYING_SHARE
    return 1.0 if text_precision == "float16" else None


def _takes_bfloat16(manifest: Manifest, device: torch.device, text_precision: TextPrecision) -> bool:
    """Whether texts are tried in bfloat16 first."""
    if text_precision != "auto":
        return text_precision == "bfloat16"
    if device.type != "cpu":
        return False  # float16 errs an eighth as much there, for the same time
    share = manifest.calibration.get("recomputed_share", {}).get("text_bfloat16", 1.0)
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # noqa: SLF001
    return bool(fast and share <= PAYING_SHARE)


def load_parts(
    directory: Path, manifest: Manifest, device: torch.device | str = "cpu", text_encoder: str | None = None
) -> TokenizerParts:
    """A checkpoint's parts with their weights, unverified."""
    if manifest.family not in FAMILIES:
        msg = f"{directory} holds the family {manifest.family!r}; known are {sorted(FAMILIES)}"
        raise CheckpointError(msg)
    try:
        config = NetworkConfig(tuple(manifest.widths))
        quantizer = FAMILIES[manifest.family](manifest.codebook_sizes, config.widths[-1])
        template: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in manifest.template.items()
        }
        parts = TokenizerParts(
            family=manifest.family,
            template=TextTemplate(**template),
            text_encoder=_text_encoder(manifest, device, text_encoder),
            network=EncoderNetwork(config),
            quantizer=quantizer,
            decoder=DecoderNetwork(config),
        )
        _load_state(parts, load_file(directory / WEIGHTS))
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        msg = f"the checkpoint at {directory} cannot be loaded: {error}"
        raise CheckpointError(msg) from error
    return parts


def _check_max_suffix(path: Path, manifest: Manifest) -> None:
    highest: Any = manifest.max_suffix
    if highest is not None and (not isinstance(highest, int) or isinstance(highest, bool) or highest < 0):
        msg = f"max_suffix in {path} is {highest!r}; expected a whole number from 0, or null"
        raise CheckpointError(msg)


def _bounds(directory: Path, manifest: Manifest) -> ErrorBounds:
    """The error bounds; what is no bound would switch the canonical path off."""
    names = {field.name for field in fields(ErrorBounds)}
    needed = {"text", "embedding"}
    bounds = manifest.bounds
    fits = isinstance(bounds, Mapping) and needed <= set(bounds) <= names and all(map(_is_bound, bounds.values()))
    if not fits:
        msg = f"the bounds of the checkpoint at {directory} are {bounds!r}; expected {sorted(names)}, finite, above 0"
        raise CheckpointError(msg)
    return ErrorBounds(**bounds)


def _is_bound(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_canary(directory: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError where known texts no longer have their latents: a library or a device computes otherwise.

    The canonical latents are held against the frozen ones, and those of the fast path against the canonical ones.
    """
    if not tokenizer.takes_text:
        return
    pieces = tokenizer.split(CANARY_TEXTS)
    canonical = tokenizer.canonical_latents(pieces)
    try:
        frozen = torch.tensor(manifest.canary["latents"], dtype=torch.float64).reshape(canonical.shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        msg = f"the manifest at {directory} does not hold the latents of the known texts: {error!r}"
        raise CheckpointError(msg) from error
    drift = float((canonical - frozen).norm(dim=1).max())
    miss = float((tokenizer.text_latents(pieces) - canonical).norm(dim=1).max())
    for found, what in ((drift, "were frozen (another library release?)"), (miss, "on the canonical path")):
        if not found <= tokenizer.bounds.text:
            msg = (
                f"the checkpoint {manifest.full_name} at {directory} gives known texts other latents on "
                f"{tokenizer.device} than {what}: they differ by {found:.2g}, the bound is {tokenizer.bounds.text:.2g}"
            )
            raise CheckpointError(msg)


def _canary(parts: TokenizerParts) -> dict[str, Any]:
    """The latents of known texts on the canonical path, rounded: arithmetic may move the last digits."""
    if parts.text_encoder is None:
        return {}
    tokenizer = Tokenizer("", parts, ErrorBounds())
    latents = tokenizer.canonical_latents(tokenizer.split(CANARY_TEXTS))
    return {"texts": list(CANARY_TEXTS), "latents": [[round(x, 7) for x in row] for row in latents.tolist()]}


def _text_encoder(manifest: Manifest, device: torch.device | str, override: str | None) -> TextEncoder | None:
    if manifest.text_encoder is None:
        return None
    config = TextEncoderConfig(**manifest.text_encoder)
    return TextEncoder(TextEncoderConfig(override) if override else config, device)


def _modules(parts: TokenizerParts) -> dict[str, nn.Module]:
    return {"network": parts.network, "quantizer": parts.quantizer, "decoder": parts.decoder}


def _state(parts: TokenizerParts) -> dict[str, Tensor]:
    """All tensors by name, float32 on the CPU."""
    return {
        f"{part}.{name}": tensor.detach().cpu().contiguous()
        for part, module in _modules(parts).items()
        for name, tensor in module.state_dict().items()
    }


def _load_state(parts: TokenizerParts, state: Mapping[str, Tensor]) -> None:
    for part, module in _modules(parts).items():
        prefix = f"{part}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    for name, tensor in state.items():
        if name.partition(".")[0] not in _modules(parts):
            msg = f"unexpected tensor {name}"
            raise ValueError(msg)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            msg = f"tensor {name} has numbers that are not finite"
            raise ValueError(msg)


def _components(parts: TokenizerParts) -> dict[str, Any]:
    """Everything that can move a code, as it is now."""
    return {
        "family": parts.family,
        "template": json.loads(json.dumps(asdict(parts.template))),
        "text_encoder": parts.text_encoder.components if parts.text_encoder else None,
        "network": {"widths": list(parts.network.config.widths), "sha256": _digest(parts.network)},
        "quantizer": {"codebook_sizes": list(parts.quantizer.codebook_sizes), "sha256": _digest(parts.quantizer)},
    }


def _digest(module: nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(components: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(components, sort_keys=True).encode()).hexdigest()[:16]


def _verify(directory: Path, manifest: Manifest, found: Mapping[str, Any]) -> None:
    """Raise CheckpointError with what differs unless the fingerprint fits what was loaded."""
    differences = _differences(manifest.components, found)
    coarse = manifest.family not in PREFIX_IS_NOT_COARSER
    differences += _differences(coarse, manifest.prefix_is_coarse_to_fine, "prefix_is_coarse_to_fine")
    if not differences and _fingerprint(found) != manifest.fingerprint:
        differences = [f"fingerprint: the manifest says {manifest.fingerprint}, its components {_fingerprint(found)}"]
    if differences:
        msg = f"the checkpoint {manifest.full_name} at {directory} is not what was frozen:\n  " + "\n  ".join(
            differences
        )
        raise CheckpointError(msg)


def _differences(frozen: Any, found: Any, path: str = "") -> list[str]:
    """One line for each leaf that differs."""
    if isinstance(frozen, Mapping) and isinstance(found, Mapping):
        lines = []
        for key in sorted({*frozen, *found}):
            lines += _differences(frozen.get(key), found.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if frozen == found else [f"{path}: frozen with {frozen!r}, found {found!r}"]
