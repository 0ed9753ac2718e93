"""Matrix-Game-3.0: memory, past and new latents attend to each other; no cache; clips by poses."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lipass.adapters.adoption import Adoption, Change
from lipass.adapters.attention_calls import modules_of
from lipass.adapters.families import Family
from lipass.adapters.host_ints import plain
from lipass.adapters.matrix_game_3_rollout import drive
from lipass.errors import LipassError

_POSITIONAL = ("x", "t", "context", "seq_len")
_GROWS = {
    "x_memory": 2, "timestep_memory": 1, "mouse_cond_memory": 1, "keyboard_cond_memory": 1,
    "plucker_emb": 2, "memory_latent_idx": 0,
}  # fmt: skip
"""Arguments by the axis that is longer with more memory."""


def _adopt(model: Any, adoption: Adoption) -> None:
    _lint(model, adoption)
    for block in model.blocks:
        actions = block.action_model
        if actions is not None:
            why = "the grid that it is given is three ints"
            adoption.rebind(actions, "forward", _with_ints(actions.forward), why)
    positions = _positions_of(type(model))
    why = "its tables are as long as a size that varies says"
    adoption.rebind(positions, "get_meshgrid_nd", _meshgrid, why)
    why = "positions are tensors, and rows of padding are left out"
    adoption.before_calls(model, _arguments, why)


def _positions_of(kind: type) -> ModuleType:
    """Return the file of positions beside that of a model's class, or of one above it."""
    packages = [one.__module__.rpartition(".")[0] for one in reversed(kind.__mro__)]
    found = (sys.modules.get(f"{package}.posemb_layers") for package in packages)
    module = next((one for one in found if one is not None), None)
    if module is None:
        raise LipassError(
            f"a model of family matrix_game_3 must have posemb_layers.py beside its class or one "
            f"above it, got {kind.__module__}.{kind.__qualname__}; pass one of a checkout"
        )
    return module


def _lint(model: Any, adoption: Adoption) -> None:
    """Say what stays hidden, or would hide what goes wrong."""
    for part in (model, model.blocks[0].self_attn):
        if "forward" in vars(part):
            why = "sequence parallelism was not tried: its ranks are not told of shorter sequences"
            adoption.lint(vars(part)["forward"], "forward", why)
    int8 = next((one for one in model.modules() if type(one).__name__ == "Int8Linear"), None)
    if int8 is not None:
        why = "its kernels are loaded and reported in the call: a graph break in each layer"
        adoption.lint(type(int8).forward, "Int8Linear", why)
    if torch._dynamo.config.suppress_errors:
        why = "set while the model was imported: what fails to compile runs eagerly, in silence"
        adoption.lints.append(Change(_where(model, "suppress_errors"), "suppress_errors", why))


def _where(model: nn.Module, words: str) -> str:
    """Return the line of a model's code in which something is written."""
    for module in modules_of(model):
        path = Path(getattr(module, "__file__", None) or "")
        lines = path.read_text().splitlines() if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if words in line:
                return f"{path.name}:{number}"
    return "torch._dynamo.config"


def _with_ints(forward: Callable[..., Any]) -> Callable[..., Any]:
    def with_ints(x: Tensor, *given: Any, **named: Any) -> Any:
        return forward(x, *map(plain, given), **named)

    return with_ints


def _meshgrid(start: Any, *stops: Any, dim: int = 2) -> Tensor:
    """Count along each axis from 0: `linspace`, which is asked for it, has a fixed length."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = (start,) * dim if isinstance(start, int) else start
    axes = [torch.arange(n, device=device).float() for n in sizes]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def _arguments(
    model: Any, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a call its positions as tensors, and no more rows than it has latents for.

    Of lists of ints each one would be a constant of the graph, and each clip another graph. Rows
    behind the latents are padding that nothing reads, and fewer latents of memory save nothing
    while it fills their places.
    """
    named = {**dict(zip(_POSITIONAL, args, strict=False)), **named}
    args = args[len(_POSITIONAL) :]
    video, memory = named["x"][0], named.get("x_memory")
    frames, remembered = video.shape[1], 0 if memory is None else memory.shape[2]
    t, y, x = model.patch_size
    named["seq_len"] = (frames + remembered) // t * (video.shape[2] // y) * (video.shape[3] // x)
    new = named.get("predict_latent_idx")
    new = (0, frames) if new is None else new
    if isinstance(new, tuple):
        named["predict_latent_idx"] = _positions(tuple(range(*new)), video.device)
    if memory is not None:
        old = named.get("memory_latent_idx")
        if not isinstance(old, Tensor):
            old = tuple(range(remembered)) if old is None else tuple(map(int, old))
            named["memory_latent_idx"] = _positions(old, video.device)
        for name, axis in _GROWS.items():
            if isinstance(found := named.get(name), Tensor):
                torch._dynamo.maybe_mark_dynamic(found, axis)
    return args, named


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _positions(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """Make a tensor of positions; the same one in each step, so that steps may be told alike."""
    return torch.tensor(indices, device=device)


FAMILY = Family(
    name="matrix_game_3",
    classes=("wan.modules.model.WanModel",),
    adopt=_adopt,
    drive=drive,
    takes=("x_memory", "predict_latent_idx"),
)
