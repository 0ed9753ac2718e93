"""Mix two texts as a model takes them: a tensor, or tuples, lists and dicts of tensors.

Tensors of floats are embeddings `[.., L, C]` or keys and values `[.., L, D]`: tokens are the last
axis but one. Tensors of integers and bools are masks and lengths `[.., L]`: tokens are the last.
Prompts of different length fade tokens against padding by position, not by meaning; "two-prompt"
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Below this angle the sphere is flat, and its sine is no number to divide by.
_FLAT = 1e-4


def check_text(text: object) -> None:
    """Refuse what no prompt is.

    Raises:
        TypeError: None or a structure without anything in it.
        ValueError: NaN or infinite numbers, as far as can be told without waiting for a device.
    """
    leaves = list(_leaves(text, "text"))
    if text is None or not leaves:
        raise TypeError(
            f"a text must be what the model takes for its prompt, got {text!r}; pass embeddings, "
            "or keys and values, as tensors in lists, tuples or dicts"
        )
    for where, leaf in leaves:
        if _floats(leaf) and leaf.device.type == "cpu" and not bool(leaf.isfinite().all()):
            bad = int((~leaf.isfinite()).sum())
            raise ValueError(
                f"a text must be finite, got {bad} NaN or infinite numbers in {where} "
                f"{list(leaf.shape)}; find what makes them in the text encoder"
            )


def check_like(text: object, before: object) -> None:
    """Refuse a text that cannot take the place of the one before.

    Raises:
        ValueError: of another structure, shape, dtype or device.
    """
    mine, theirs = dict(_leaves(text, "text")), dict(_leaves(before, "text"))
    if mine.keys() != theirs.keys():
        other = sorted(mine.keys() ^ theirs.keys())[0]
        raise ValueError(
            f"a text must have the structure of the one before, got {other} in one of them only; "
            "encode both with the same function"
        )
    for where, leaf in mine.items():
        kinds = _kind(leaf), _kind(theirs[where])
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"a text must have the shapes of the one before, got {kinds[0]} for {kinds[1]} "
                f"in {where}; pad prompts to one length"
            )


def check_blends(text: object, policy: str) -> None:
    """Refuse a text that a policy cannot mix.

    Raises:
        ValueError: nothing in it is a tensor of floats.
    """
    if not any(_floats(leaf) for _, leaf in _leaves(text, "text")):
        raise ValueError(
            f"policy {policy!r} mixes embeddings or keys, got a text without tensors of floats; "
            "encode prompts before they are said, or use policy 'hard'"
        )


def mixed(policy: str, old: Any, new: Any, weight: float) -> Any:
    """Mix two texts; at weight 0 and 1 what is returned is `old` and `new` themselves.

    Args:
        policy: "slerp", or anything else for lerp.
        old: the text before.
        new: another of its structure.
        weight: of the new one.
    """
    if weight in (0, 1) or old is new:
        return new if weight == 1 else old
    return _pairwise(_slerp if policy == "slerp" else _lerp, old, new, weight)


def doubled(old: Any, new: Any) -> Any:
    """Put the tokens of a text behind those of another one."""

    def joined(a: Tensor, b: Tensor, _: float) -> Tensor:
        return torch.cat([a, b], -2 if _floats(a) else -1)

    return _pairwise(joined, old, new, 0.0)


def same(text: Any, other: Any) -> bool:
    """Whether two texts are one, tensors element by element; reads from devices."""
    if text is other:
        return True
    mine, theirs = dict(_leaves(text, "text")), dict(_leaves(other, "text"))
    return mine.keys() == theirs.keys() and all(
        _kind(leaf) == _kind(theirs[where]) and _equal(leaf, theirs[where])
        for where, leaf in mine.items()
    )


def _equal(leaf: Any, other: Any) -> bool:
    if isinstance(leaf, Tensor):
        return torch.equal(leaf, other)
    # What equality means of anything else is not for us to ask: of an array it is an array.
    return leaf is other or (isinstance(leaf, str | int | float) and bool(leaf == other))


def text_tensors(text: Any) -> list[Tensor]:
    """List the tensors of floats in a text."""
    return [leaf for _, leaf in _leaves(text, "text") if _floats(leaf)]


def _pairwise(mix: Callable[[Tensor, Tensor, float], Tensor], a: Any, b: Any, w: float) -> Any:
    if isinstance(b, Tensor):
        mixes = _floats(b) or mix not in (_lerp, _slerp)
        made = mix(a, b, w) if mixes and b.dim() else b
        return laid_out(made, b.stride()) if made.shape == b.shape else made
    if isinstance(b, tuple) and hasattr(b, "_fields"):
        return type(b)(*(_pairwise(mix, x, y, w) for x, y in zip(a, b, strict=True)))
    if isinstance(b, tuple | list):
        return type(b)(_pairwise(mix, x, y, w) for x, y in zip(a, b, strict=True))
    if isinstance(b, dict):
        return {key: _pairwise(mix, a[key], b[key], w) for key in b}
    return b


def laid_out(made: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a tensor with other strides: graphs are compiled for those of what they were shown.

    Where elements would lie on each other, it stays as it is.
    """
    if made.stride() == tuple(strides) or 0 in strides:
        return made
    return torch.empty_strided(
        made.shape, tuple(strides), dtype=made.dtype, device=made.device
    ).copy_(made)


def _lerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    return torch.lerp(a.float(), b.float(), weight).to(b.dtype)


def _slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Turn each token from one direction to another; its norm goes straight from norm to norm."""
    x, y = a.float(), b.float()
    norms = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    at, to = (
        v / n.clamp_min(torch.finfo(v.dtype).tiny) for v, n in zip((x, y), norms, strict=True)
    )
    # Both halves of the angle: the arc of a cosine near 1 has few digits left.
    angle = 2 * torch.atan2(
        (at - to).norm(dim=-1, keepdim=True), (at + to).norm(dim=-1, keepdim=True)
    )
    sine = angle.sin()
    turned = (((1 - weight) * angle).sin() * at + (weight * angle).sin() * to) / sine
    along = turned * torch.lerp(*norms, weight)
    # Padding of zeros has no direction, and of opposite ones no way is the shortest.
    flat = (sine.abs() < _FLAT) | (norms[0] == 0) | (norms[1] == 0)
    return torch.where(flat, torch.lerp(x, y, weight), along).to(b.dtype)


def _leaves(text: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(text, tuple | list):
        for place, one in enumerate(text):
            yield from _leaves(one, f"{where}[{place}]")
    elif isinstance(text, dict):
        for key, one in text.items():
            yield from _leaves(one, f"{where}[{key!r}]")
    elif text is not None:
        yield where, text


def _floats(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        dtype = str(leaf.dtype).removeprefix("torch.")
        return f"[{', '.join(map(str, leaf.shape))}] {dtype} on {leaf.device}"
    return type(leaf).__name__
