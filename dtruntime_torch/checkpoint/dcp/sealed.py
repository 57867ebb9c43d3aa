"""The manifest of a folder that has no commit file: it holds its own SHA-256 instead. Pure.

The seal is the SHA-256 of the file's bytes with the 64 digits of the seal itself taken as zeros.
"""

from __future__ import annotations

import hashlib
import json

from dtruntime_torch.checkpoint.format import strict_json
from dtruntime_torch.checkpoint.manifest import Manifest, decode_manifest, encode_manifest
from dtruntime_torch.errors import CorruptCheckpoint, Damage

_KEY = b'"seal":"'
_UNSEALED = b"0" * 64


def encode_sealed(manifest: Manifest) -> bytes:
    """Encodes a manifest and seals it.

    Raises:
        InvalidArgument: no reader would take it.
    """
    fields = json.loads(encode_manifest(manifest))
    data = strict_json.dump({**fields, "seal": _UNSEALED.decode()})
    at = _seal_at(data)
    return data[:at] + _sha256(data) + data[at + len(_UNSEALED) :]


def decode_sealed(data: bytes, source: str) -> Manifest:
    """Decodes what `encode_sealed` gave, or the manifest of a manager, whose commit file has its hash.

    Args:
        data: trusted in nothing.
        source: path of the file, for the error.

    Raises:
        CorruptCheckpoint: it is no manifest, contradicts itself, or is not what was sealed.
        NewerFormat: it needs a later version of this package.
    """
    at = _seal_at(data)
    sealed = data[at : at + len(_UNSEALED)]
    unsealed = data[:at] + _UNSEALED + data[at + len(_UNSEALED) :]
    if at >= len(_KEY) and sealed != _sha256(unsealed):
        raise _damaged(source, data, f"SHA-256 {sealed!r}", f"SHA-256 {_sha256(unsealed)!r}")
    manifest = decode_manifest(data, source)
    if at < len(_KEY) and manifest.generation == 0:
        raise _damaged(source, data, "a seal", "none")
    return manifest


def _damaged(source: str, data: bytes, expected: str, actual: str) -> CorruptCheckpoint:
    damage = Damage(source, None, 0, len(data), expected, actual)
    return CorruptCheckpoint(f"damaged: {damage}", [damage])


def _seal_at(data: bytes) -> int:
    """Where the digits begin. Behind the last such key there are only numbers and lines of text without quotes."""
    return data.rfind(_KEY) + len(_KEY)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode("ascii")
