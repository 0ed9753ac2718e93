"""Write plain data with tensors in it as one safetensors file, and read it back: no code in it.

The data is JSON in the file's metadata, where each tensor is a reference to one of the file's.
Both are hashed, as safetensors itself sees a file that is too short, but not one that has changed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lipass.errors import LipassError

Tree = Any
"""None, bool, int, float, str, Tensor, and lists, tuples and dicts (with names) of these."""

_REFERENCE = "$tensor"
_MEANT = "carry None, numbers, strings, tensors, and lists and dicts of these"


def checked(tree: Tree, where: str) -> Tree:
    """Return a copy, with tensors of its own on their device; tuples become lists.

    Raises:
        TypeError: what cannot be written, with the place where it is.
        ValueError: a number that JSON does not have, or a name that means something here.
    """
    if isinstance(tree, Tensor):
        if tree.device.type == "meta":
            raise ValueError(f"{where} must hold values, got a tensor on device meta; {_MEANT}")
        return tree.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(tree, Mapping):
        for name in tree:
            if not isinstance(name, str):
                raise TypeError(f"names in {where} must be strings, got {name!r}; write '{name}'")
            if name == _REFERENCE:
                raise ValueError(f"names in {where} must not be {_REFERENCE!r}; choose another")
        return {name: checked(one, f"{where}[{name!r}]") for name, one in tree.items()}
    if isinstance(tree, list | tuple):
        return [checked(one, f"{where}[{i}]") for i, one in enumerate(tree)]
    if isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"{where} must be finite, got {tree}; carry it as a tensor")
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise TypeError(f"{where} must be plain data, got {type(tree).__name__}; {_MEANT}")


class Copies(Mapping[str, Tree]):
    """Gives of what it holds a copy each time, so that nobody writes to what others get.

    Args:
        held: what `checked` has returned.
    """

    def __init__(self, held: Mapping[str, Tree]) -> None:
        self._held = held

    def __getitem__(self, name: str) -> Tree:
        return checked(self._held[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def to_bytes(tree: Tree, kind: str, version: int) -> bytes:
    """Write a tree that `checked` has returned.

    Args:
        tree: what is written.
        kind: name of the format, for who reads it.
        version: of the format.

    Raises:
        LipassError: safetensors is not installed.
    """
    tensors: list[Tensor] = []

    def plain(one: Tree) -> Tree:
        if isinstance(one, Tensor):
            tensors.append(one.cpu())
            return {_REFERENCE: len(tensors) - 1}
        if isinstance(one, dict):
            return {name: plain(part) for name, part in one.items()}
        return [plain(part) for part in one] if isinstance(one, list) else one

    text = json.dumps(plain(tree), allow_nan=False, separators=(",", ":"))
    named = {str(i): tensor for i, tensor in enumerate(tensors)}
    metadata = {"kind": kind, "version": str(version), "data": text}
    metadata["sha256"] = _digest(metadata, named)
    return _safetensors().save(named, metadata)


def from_bytes(data: bytes, kind: str, version: int) -> Tree:
    """Read what `to_bytes` wrote; tensors are on the CPU.

    Raises:
        ValueError: not whole, of another kind or of another version.
        LipassError: safetensors is not installed.
    """
    torch_form, again = _safetensors(), "take it again, or use another copy"
    try:
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size])["__metadata__"]
        found = {name: metadata[name] for name in ("kind", "version", "data")}
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"a file of kind {kind!r} must be one that lipass wrote, got {len(data)} bytes that "
            f"are none; {again}"
        ) from None
    if found["kind"] != kind:
        raise ValueError(f"a file must be of kind {kind!r}, got {found['kind']!r:.60}; {again}")
    if found["version"] != str(version):
        raise ValueError(
            f"a file of kind {kind!r} must have version {version}, got {found['version']!r:.20}; "
            "read it with the lipass that wrote it, or take it again with this one"
        )
    try:
        tensors: dict[str, Tensor] = torch_form.load(data)
        whole = _digest(found, tensors) == metadata.get("sha256")
    except Exception:  # safetensors has errors of its own
        whole = False
    if not whole:
        raise ValueError(
            f"a file of kind {kind!r} must be as it was written, got one of {len(data)} bytes "
            f"that has changed or was cut; {again}"
        )

    def full(one: Tree) -> Tree:
        if isinstance(one, dict):
            if set(one) == {_REFERENCE}:
                return tensors[str(one[_REFERENCE])]
            return {name: full(part) for name, part in one.items()}
        return [full(part) for part in one] if isinstance(one, list) else one

    return full(json.loads(found["data"]))


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256(json.dumps([metadata[name] for name in sorted(metadata)]).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _safetensors() -> Any:
    try:
        from safetensors import torch as torch_form
    except ImportError:
        raise LipassError(
            "files of sessions need safetensors, and it is not installed; "
            "run pip install safetensors"
        ) from None
    return torch_form
