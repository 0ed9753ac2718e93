"""Compare ways to tell which keys of a history correspond, on what TinyWorld `stream` attends to.

A walk with loops is given and the way back generated. What the last chunk attends to is kept, and
its attention is computed again over a shorter history: merged, by keys that are compared in
different forms, or a window of the latest chunks. `python -m benchmarks.merge_history` prints one
JSON line a way: the share of the history that is kept, and how far the outputs of attention then
are from those over all of it, in dB, the mean over layers of each. `--rollout` generates the way
back with a merged history or a window instead, and compares its frames with those of all of the
history and with the renderer's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

import lipass
import lipass.kernels.merged_history
from lipass.examples.tinyworld import stream as stream_module
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import (
    CHUNK_LATENTS,
    TEXT_TOKENS,
    camera_transforms,
    transform,
)
from lipass.examples.tinyworld.stream_scores import way_back
from lipass.examples.tinyworld.stream_walks import out_and_back
from lipass.examples.tinyworld.weights import load_stream
from lipass.examples.tinyworld.world import HELD_OUT_SEED, make_room
from lipass.kernels import registry
from lipass.kernels.dense import attend_plainly
from lipass.kernels.merge.running import MergedKeys, MergeRule, RunningMerge, query_metric

Call = tuple[Tensor, Tensor, Tensor]
THRESHOLDS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
DISTANCES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
WINDOWS = (1, 2, 3, 4, 6, 8)


def recorded(room: int, chunks: int) -> tuple[list[list[Call]], Tensor, int]:
    """Give q, k, v of the last chunk's calls, of each layer, its cameras, and tokens a latent."""
    model, codec = load_stream()
    calls: list[Call] = []
    dense = F.scaled_dot_product_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((q, k, v))
        del calls[: -5 * len(model.blocks)]
        return dense(q, k, v)

    with mock.patch.object(stream_module.F, "scaled_dot_product_attention", attend):
        way_back(model, codec, room, chunks)
    layers = [calls[n :: len(model.blocks)] for n in range(len(model.blocks))]
    w2c = out_and_back(make_room(room), chunks * CHUNK_LATENTS)
    return layers, w2c[None], model.config.rows * model.config.columns


def main(argv: list[str] | None = None) -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--room", type=int, default=HELD_OUT_SEED + 1)
    parser.add_argument(
        "--rollout",
        nargs="+",
        metavar="WAY",
        help="thresholds, such as 0.7, and windows of chunks, such as w7",
    )
    args = parser.parse_args(argv)
    if args.rollout:
        roll_out(args.room, args.chunks, args.rollout)
        return
    layers, w2c, latent = recorded(args.room, args.chunks)
    rows: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for calls in layers:
        for way, setting, found in _ways(calls, w2c, latent):
            tokens = calls[0][1].shape[2] - TEXT_TOKENS - CHUNK_LATENTS * latent
            kept = float((found.bias > -math.inf).float().sum(2).mean()) / tokens
            errors = [_error(call, found, latent) for call in (calls[0], calls[3])]
            rows.setdefault((way, setting), []).append((kept, sum(errors) / 2))
    for (way, setting), measured in rows.items():
        kept, error = (sum(column) / len(measured) for column in zip(*measured, strict=True))
        row = {"way": way, "setting": setting, "kept": round(kept, 3)}
        print(json.dumps({**row, "attention_db": round(-10 * math.log10(max(error, 1e-12)), 1)}))


def roll_out(room: int, chunks: int, ways: list[str]) -> None:
    """Print a line for all of the history, and one for each way."""
    model, codec = load_stream()
    latent = model.config.rows * model.config.columns
    layers, whole = itertools.cycle(range(len(model.blocks))), None
    dense = F.scaled_dot_product_attention
    for way in ["all", *ways]:
        kept: list[float] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, way: str = way, kept: Any = kept) -> Tensor:
            site, own = f"blocks.{next(layers)}", CHUNK_LATENTS * latent
            lengths = [TEXT_TOKENS, k.shape[2] - TEXT_TOKENS - own, own]
            if way == "all" or not lengths[1]:
                return dense(q, k, v)
            keys, values = list(k.split(lengths, 2)), list(v.split(lengths, 2))
            if way[0] == "w":
                at = slice(-int(way[1:]) * own, None)
                keys[1], values[1] = keys[1][:, :, at], values[1][:, :, at]
                kept.append(keys[1].shape[2] / lengths[1])
                return dense(q, torch.cat(keys, 2), torch.cat(values, 2))
            scale = q.shape[3] ** -0.5
            given = (q, keys, values, 1, latent, scale, float(way), None, 0, site)
            return torch.ops.lipass.attend_merged(*given)

        registry.reset_telemetry()
        with (
            lipass.Session(preset="exact") as session,
            session.histories.answering("main"),
            mock.patch.object(stream_module.F, "scaled_dot_product_attention", attend),
        ):
            row, shown, _ = way_back(model, codec, room, chunks)
        whole = shown if whole is None else whole
        densities = [one.density for one in registry.telemetry().values()]
        found = {
            "way": way,
            "kept": round(sum(kept) / len(kept), 3) if kept else None,
            "density": round(sum(densities) / len(densities), 3) if densities else None,
            "psnr_vs_dense_db": round(psnr_db(shown, whole), 2) if way != "all" else None,
            "psnr_vs_truth_db": row["psnr_vs_truth_db"],
        }
        print(json.dumps(found), flush=True)


def _ways(calls: list[Call], w2c: Tensor, latent: int) -> Iterator[tuple[str, float, MergedKeys]]:
    q, k, v = calls[-1]  # of the refresh, not the steps whose outputs are compared
    history = slice(TEXT_TOKENS, -CHUNK_LATENTS * latent)
    k, v = k[:, :, history], v[:, :, history]
    cameras, _ = camera_transforms(w2c[:, : k.shape[2] // latent])
    half = k.shape[3] // 2
    undone = transform(k.unflatten(2, (-1, latent))[..., :half], cameras).flatten(2, 3)
    forms = {"as cached": k, "cameras undone": torch.cat([undone, k[..., half:]], 3)}
    rule = MergeRule(0.0, None, 0, latent, CHUNK_LATENTS * latent)
    seen = query_metric(q, k.shape[3] ** -0.5, k.shape[1])
    plain = torch.eye(k.shape[3]).expand_as(seen)
    for threshold in THRESHOLDS:
        running = RunningMerge(k, rule._replace(threshold=threshold))
        running.add(k, v, seen)
        yield "as queries see keys, threshold", threshold, running.merged(v.dtype)
    for (name, form), distance in itertools.product(forms.items(), DISTANCES):
        apart = _InAnotherForm(k, rule._replace(threshold=math.exp(-distance)))
        apart.add(torch.cat([form, k], 3), v, plain)
        yield f"keys {name}, distance", distance, apart.merged(v.dtype)
    for chunks in WINDOWS:
        at = slice(-chunks * CHUNK_LATENTS * latent, None)
        bias, zero = k.new_zeros(k[:, :, at].shape[:3]), k.new_zeros(())
        yield "window, chunks", chunks, MergedKeys(k[:, :, at], v[:, :, at], bias, zero, zero)


class _InAnotherForm(RunningMerge):
    """Compare keys in another form than that in which they are read: `[form, as cached]`."""

    def __init__(self, like: Tensor, rule: MergeRule) -> None:
        super().__init__(like, rule)
        self._cached = torch.zeros_like(like)

    def _merge(self, k: Tensor, v: Tensor, metric: Tensor) -> None:
        form, self._new = k.chunk(2, 3)
        super()._merge(form, v, metric)

    def _write(self, dest: Tensor, joins: Tensor, k: Tensor, v: Tensor) -> None:
        super()._write(dest, joins, k, v)
        self._cached.scatter_(2, dest[..., None].expand_as(self._new), self._new)

    def merged(self, dtype: torch.dtype) -> MergedKeys:
        found = super().merged(dtype)
        return found._replace(k=self._cached[:, :, : found.k.shape[2]])


def _error(call: Call, found: MergedKeys, latent: int) -> float:
    """Return the energy of the change of an output, relative to that of the output."""
    q, k, v = call
    own = CHUNK_LATENTS * latent
    parts = (k[:, :, :TEXT_TOKENS], found.k, k[:, :, -own:])
    values = (v[:, :, :TEXT_TOKENS], found.v, v[:, :, -own:])
    bias = F.pad(found.bias, (TEXT_TOKENS, own))[:, :, None]
    scale = q.shape[3] ** -0.5
    whole, _ = attend_plainly(q, k, v, scale, None)
    out, _ = attend_plainly(q, torch.cat(parts, 2), torch.cat(values, 2), scale, bias)
    return float((out - whole).square().sum() / whole.square().sum())


if __name__ == "__main__":
    main()
