"""Say which slots `tile-order` saves, that nothing else changes, and what it is worth here.

    python -m benchmarks.tile_order [--time] [--rounds 9]

The first table is of models as they are: calls in tile order, slots computed for each useful pair
before and after, and the largest difference to the same model in rows; or the call that stops the
pass. With `--time` Wan's code at the tokens of a clip of 480p runs in either order, in turns, and
the attention of one layer by each provider.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.environment import environment
from lipass.examples.tinyworld.model import ModelConfig, TinyWorld
from lipass.kernels import prepare, registry
from lipass.kernels.block_sparse import flex
from lipass.kernels.block_sparse.api import block_sparse_attention
from lipass.kernels.plan import BlockGrid, KvLayout
from lipass.kernels.planning import plan_attention
from lipass.testing import run_passes

PIPELINE = (
    "canonicalize,find-attention,find-poses,find-steps,collapse-keys,hoist-rows,"
    "sparse-attention{{tile={tile} budget_self={budget} budget_decode={budget}}},"
    "tile-order{{grids={grids}}}"
)


def wan(latents: int, rows: int, columns: int, heads: int = 2, dim: int = 12) -> Any:
    """Build Wan's transformer of two layers, and a call of it."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=dim, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=4 * heads * dim, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    for parameter in model.parameters():  # so that attention tells in the output
        torch.nn.init.normal_(parameter, std=dim**-0.5)
    latent = torch.randn(1, 4, latents, 2 * rows, 2 * columns)
    return model, (latent, torch.tensor([500]), torch.randn(1, 7, 16))


def sana_wm() -> Any:
    """Build SANA-WM's transformer of four layers, and a call of it."""
    from diffusers.models.transformers import SanaWMTransformer3DModel

    torch.manual_seed(0)
    model = SanaWMTransformer3DModel(
        in_channels=4, num_layers=4, hidden_size=48, num_attention_heads=2, linear_head_dim=24,
        caption_channels=16, softmax_every_n=2, chunk_plucker_channels=48,
        chunk_plucker_post_attn_blocks=4,
    )  # fmt: skip
    cameras = torch.cat([torch.eye(4).flatten().repeat(1, 3, 1), torch.ones(1, 3, 4)], -1)
    call = (
        torch.randn(1, 4, 3, 4, 6), torch.full((1, 1, 3), 500.0), torch.randn(1, 1, 7, 16),
        torch.ones(1, 7), cameras, torch.randn(1, 48, 3, 4, 6),
    )  # fmt: skip
    names = ("hidden_states", "timestep", "encoder_hidden_states", "mask", "camera_conditions",
             "chunk_plucker")  # fmt: skip
    return _Named(model, names), call


class _Named(torch.nn.Module):
    """Pass arguments on by name."""

    def __init__(self, model: torch.nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Any) -> Any:
        return self.model(**dict(zip(self.names, args, strict=True)), return_dict=False)[0]


def tinyworld(rows: int = 8, columns: int = 8) -> Any:
    """Build TinyWorld of two blocks, and a decode call of it behind 8 latents."""
    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(rows=rows, columns=columns, blocks=2))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        text = model.text(torch.zeros(1, 32, dtype=torch.long))
    history = [tuple(torch.randn(1, 3, 8 * rows * columns, 64) for _ in "kv") for _ in range(2)]
    w2c = torch.eye(4).repeat(1, 12, 1, 1)
    return model, (
        torch.randn(1, 16, 4, rows, columns), torch.full((1, 4), 0.9), w2c, text, history,
    )  # fmt: skip


CASES = (
    ("TinyWorld decode 8x8", tinyworld, (), "1x4x4", "whole", 0.4),
    ("TinyWorld decode 8x8", tinyworld, (), "4x4x4", "whole", 0.4),
    ("TinyWorld decode 10x10", tinyworld, (10, 10), "1x4x4", "runs", 0.9999),
    ("Wan 3x4x6", wan, (3, 4, 6), "1x2x2", "whole", 0.4),
    ("Wan 3x15x26", wan, (3, 15, 26), "4x8x4", "runs", 0.9999),
    ("Wan 3x15x26", wan, (3, 15, 26), "1x8x4", "runs", 0.9999),
    ("SANA-WM 3x4x6", sana_wm, (), "1x2x2", "whole", 0.4),
)


def table() -> Iterator[dict[str, Any]]:
    """Run each model in rows and in tile order."""
    for name, build, sizes, tile, grids, budget in CASES:
        model, call = build(*sizes)
        model = model.eval().requires_grad_(False)
        outputs, notes = [], ()
        for one in ("off", grids):
            text = PIPELINE.format(tile=tile, budget=budget, grids=one)
            with registry.force("sparse"):
                traced = run_passes(model, call, text)
            outputs.append(traced.outputs)
            notes = traced.notes
        first, second = (x[0] if isinstance(x, tuple) else x for x in outputs)
        first, second = (getattr(x, "sample", x) for x in (first, second))
        yield {
            "model": name,
            "tile": tile,
            "grids": grids,
            "budget": budget,
            "said": [f"{note.action}: {note.reason}" for note in notes],
            "largest_difference": float((first - second).abs().max()),
            "largest_output": float(first.abs().max()),
        }


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of CPU time of calls that take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.process_time()
            call()
            taken[name].append(time.process_time() - begin)
    return {name: statistics.median(found) for name, found in taken.items()}


def timed_model(rounds: int) -> dict[str, Any]:
    """Time Wan's code with 6,240 tokens, in rows and in tile order."""
    model, call = wan(4, 30, 52, heads=4, dim=64)
    model = model.eval().requires_grad_(False)
    calls = {}
    for grids in ("off", "runs"):
        options = {
            "preset": "sparse", "sparse.tile": (4, 8, 4), "sparse.budget": 0.2,
            "sparse.dense_tokens": 0, "sparse.tile_order": grids,
        }  # fmt: skip
        torch._dynamo.reset()
        fast = torch.compile(model, backend="light_interaction", options=options)
        calls[grids] = lambda fast=fast: fast(*call)
    with torch.no_grad(), registry.force("sparse"):
        for run in calls.values():
            run()
        found = in_turns(calls, rounds)
    return {"seconds": found, "speedup": found["off"] / found["runs"]}


def timed_attention(rounds: int) -> dict[str, Any]:
    """Time the attention of one layer over 6,240 tokens, 4 heads of 64, a fifth of the blocks."""
    grid, tile = (4, 30, 52), (4, 8, 4)
    q, k, v = torch.randn(3, 1, 4, 4 * 30 * 52, 64).unbind(0)
    calls, plans = {}, {}
    for name, in_order in (("tiles", False), ("runs", True)):
        layout = KvLayout.build(("current",), (grid,), tile, ("current",) if in_order else ())
        plans[name] = plan_attention(
            q, [k], layout, BlockGrid(grid, tile, in_order), budget=0.2, scale=0.125, role="self",
            sink_latents=0,
        )  # fmt: skip
        calls[f"native, {name}"] = lambda plan=plans[name]: block_sparse_attention(q, k, v, plan)
    why = flex.prepare()
    if not why:
        calls["flex, runs"] = lambda: block_sparse_attention(
            q, k, v, plans["runs"], provider="flex"
        )
    with torch.no_grad():
        for run in calls.values():
            run()
        found = in_turns(calls, rounds)
    density = {name: float(plan.density()) for name, plan in plans.items()}
    return {"seconds": found, "density": density, "flex": why or "runs"}


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--time", action="store_true", help="time Wan's code and one layer too")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    prepare()
    found: dict[str, Any] = {"models": list(table())}
    if args.time:
        found["attention"] = timed_attention(args.rounds)
        found["wan"] = timed_model(args.rounds)
    print(json.dumps({**found, **environment()}, indent=1))


if __name__ == "__main__":
    main()
