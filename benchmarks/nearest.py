"""Compare ways to choose blocks of a history by the attention mass that they keep, and by time.

    OMP_NUM_THREADS=1 python -m benchmarks.nearest --rollouts --json > results/nearest.json

Queries and keys are those of a rollout of the streaming model. `recall` is the share of the
attention mass on the history that the visited keys hold, where each way visits the same share of
it; `ms` is CPU time of one call of one layer. `text` is what a prompt costs in released models.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import lipass

# Registers the operators that are timed.
import lipass.kernels.ops
from benchmarks.environment import environment
from benchmarks.real_models.count import call_cost
from benchmarks.real_models.families import FAMILIES, Family
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, TEXT_TOKENS, tokenize
from lipass.examples.tinyworld.rollout import SIGMAS, chunk_noise
from lipass.examples.tinyworld.stream import StreamWorld
from lipass.examples.tinyworld.stream_rollout import GrownCache, stream
from lipass.examples.tinyworld.stream_walks import out_and_back
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load_stream
from lipass.examples.tinyworld.world import HELD_OUT_SEED, Attributes, make_room, render
from lipass.kernels import BlockGrid, registry
from lipass.kernels.nearest.basis import basis_of
from lipass.kernels.nearest.order import pool_in_order, sort_keys, sort_queries

LATENT_TOKENS = 64
OWN = CHUNK_LATENTS * LATENT_TOKENS
CHUNKS, WATCHED, STEP = 24, (14, 19, 23), 1
SHARES = (0.1, 0.2, 0.3)
# Budget, choice and dense steps of the rollouts.
ROLLED = (
    (0.1, "means", 0), (0.1, "buckets", 0), (0.2, "means", 0), (0.2, "buckets", 0),
    (0.2, "means", 1), (0.2, "buckets", 1), (0.3, "means", 0),
)  # fmt: skip
AXES, PLANES = 8, 6
# Words of a long prompt, of the 512 that such models pad to.
WORDS = 80

Order = tuple[Tensor, Tensor]
"""Queries `[H, Lq]` and keys `[H, L]` by place."""


class Attended(NamedTuple):
    """Queries `[1, H, Lq, D]`, and keys of text, history and own tokens."""

    q: Tensor
    text: Tensor
    history: Tensor
    own: Tensor


class Watch(TorchFunctionMode):
    """Keep queries and keys of one step of some chunks while a model runs."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = layers
        self.calls: dict[int, int] = {}
        self.found: dict[tuple[int, int], Attended] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at attention; everything runs as it would."""
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            chunk = k.shape[2] // OWN - 1
            step, layer = divmod(self.calls.get(chunk, 0), self.layers)
            self.calls[chunk] = self.calls.get(chunk, 0) + 1
            if chunk in WATCHED and step == STEP:
                parts = k.split([TEXT_TOKENS, k.shape[2] - TEXT_TOKENS - OWN, OWN], 2)
                self.found[chunk, layer] = Attended(q.clone(), *(x.clone() for x in parts))
        return func(*args, **(kwargs or {}))


def watched() -> dict[tuple[int, int], Attended]:
    """Roll out a walk and its way back; return attention calls by chunk and layer."""
    model, codec = load_stream()
    room = make_room(HELD_OUT_SEED + 1)
    w2c = out_and_back(room, CHUNKS * CHUNK_LATENTS)
    seen = render(room, w2c[: len(w2c) // 2], [Attributes()])[0]
    text = model.text(tokenize(prompt_of(Attributes()))[None])
    given = codec.encode(seen).transpose(0, 1)[None]
    with Watch(len(model.blocks)) as watch:
        stream(model, text, given, w2c[None], seed=0, cache=GrownCache())
    return watch.found


def in_tiles(one: Attended, block: int, queries: int) -> Order:
    """Order tokens by tiles that span four latents, as the means of tiles choose."""
    sizes = {64: (4, 4, 4), 32: (2, 4, 4), 128: (4, 8, 4)}

    def order(x: Tensor, tile: int) -> Tensor:
        grid = BlockGrid((x.shape[2] // LATENT_TOKENS, 8, 8), sizes[tile])
        return grid.token_index().flatten().expand(x.shape[1], -1)

    return order(one.q, queries), order(one.history, block)


def in_halves(one: Attended, block: int, queries: int) -> Order:
    """Order tokens as `nearest-blocks` does."""
    basis = basis_of(one.history, AXES, 0, 0)
    by_query = sort_queries(one.q, basis, queries)
    return by_query[0].long(), sort_keys(one.history, basis, 0, block)[0].long()


def in_buckets(one: Attended, block: int, queries: int) -> Order:
    """Order tokens by the sides of random planes through their means, along a Gray code."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(one.q.shape[1], one.q.shape[3], PLANES, generator=generator)

    def order(x: Tensor) -> Tensor:
        sides = (x[0] - x[0].mean(1, keepdim=True)) @ normals > 0
        code = (sides.long() << torch.arange(PLANES)).sum(-1)
        for shift in (1, 2, 4):
            code = code ^ (code >> shift)
        return code.argsort(dim=-1, stable=True)

    return order(one.q), order(one.history)


ORDERS: dict[str, Callable[[Attended, int, int], Order]] = {
    "means": in_tiles,
    "buckets": in_halves,
    "random planes": in_buckets,
}


def recall_rows(calls: dict[tuple[int, int], Attended]) -> list[dict[str, Any]]:
    """Return the mass that each way keeps, a row for each size of blocks and share."""
    rows = []
    for block, queries in ((64, 32), (64, 64), (128, 64)):
        kept: dict[float, dict[str, list[float]]] = {share: {} for share in SHARES}
        for one in calls.values():
            keys = torch.cat([one.text, one.history, one.own], 2)
            weights = (one.q @ keys.mT * one.q.shape[3] ** -0.5).softmax(-1)
            mass = weights[0, :, :, TEXT_TOKENS:-OWN]
            for share, found in kept.items():
                best = mass.topk(math.ceil(share * mass.shape[2]), -1).values.sum()
                found.setdefault("exact keys", []).append(float(best / mass.sum()))
            for name, order in ORDERS.items():
                _add(kept, name, one, mass, order(one, block, queries), block, queries)
        for share, found in kept.items():
            means = {name: round(statistics.mean(x), 3) for name, x in found.items()}
            rows.append(
                {"key_block": block, "query_block": queries, "share": share, "recall": means}
            )
    return rows


def _add(
    kept: dict[float, dict[str, list[float]]],
    name: str,
    one: Attended,
    mass: Tensor,
    order: Order,
    block: int,
    queries: int,
) -> None:
    """Add what the best blocks by means keep, and what the best blocks there are would."""
    by_query, by_key = order
    heads, rows, _ = mass.shape
    placed = mass.gather(1, by_query[..., None].expand_as(mass))
    placed = placed.gather(2, by_key[:, None].expand_as(placed))
    blocks = placed.view(heads, rows // queries, queries, -1, block).sum((2, 4))
    means = (
        pool_in_order(x, order[None].int(), size)[0]
        for x, order, size in ((one.q, by_query, queries), (one.history, by_key, block))
    )
    score = next(means) @ next(means).mT
    for share, found in kept.items():
        count = math.ceil(share * blocks.shape[2])
        chosen = blocks.gather(-1, score.topk(count, -1).indices).sum() / mass.sum()
        best = blocks.topk(count, -1).values.sum() / mass.sum()
        found.setdefault(name, []).append(float(chosen))
        found.setdefault(f"{name}, best blocks", []).append(float(best))


def time_rows(calls: dict[tuple[int, int], Attended]) -> list[dict[str, Any]]:
    """Return CPU times of one layer by the length of its history, in turns."""
    one = calls[WATCHED[-1], 2]
    return [_times(one, latents) for latents in (24, 88, 256)]


def _times(one: Attended, latents: int) -> dict[str, Any]:
    repeats = -(-latents * LATENT_TOKENS // one.history.shape[2])
    generator = torch.Generator().manual_seed(0)
    drifted = [
        one.history + 0.3 * torch.randn(one.history.shape, generator=generator)
        for _ in range(repeats)
    ]
    history = torch.cat(drifted, 2)[:, :, : latents * LATENT_TOKENS].contiguous()
    keys = [one.text, history, one.own]
    values = [torch.randn(x.shape, generator=generator) for x in keys]
    grids = [1, 1, TEXT_TOKENS, latents, 8, 8, CHUNK_LATENTS, 8, 8]
    operators = torch.ops.lipass
    basis = operators.key_basis(history, AXES, 0, LATENT_TOKENS)
    order = operators.key_order(history, basis, LATENT_TOKENS, 64)
    means = operators.pool_in_order(history, order, 64)
    of_tiles = operators.pool_blocks(history, [latents, 8, 8], [4, 4, 4])

    def call(route: Any, tile: list[int], share: float, **named: Any) -> Callable[[], object]:
        def run() -> object:
            with registry.force(route):
                return operators.sparse_attention(
                    one.q, keys, values, [CHUNK_LATENTS, 8, 8], grids, "text,history,current",
                    tile, share, one.q.shape[3] ** -0.5, 1, "decode", None, "site", **named,
                )  # fmt: skip

        return run

    by_order = {
        "history_means": means, "planner": "buckets", "history_order": order,
        "history_basis": basis,
    }  # fmt: skip
    forms: dict[str, Callable[[], object]] = {"dense": call("dense", [4, 4, 4], 0.2)}
    for share in SHARES:
        tile = [4, 4, 4]
        forms[f"means {share}"] = call("sparse", tile, share, history_means=of_tiles)
        forms[f"buckets {share}"] = call("sparse", [*tile, 2, 4, 4], share, **by_order)
    forms["sorting once a chunk"] = lambda: operators.pool_in_order(
        history,
        operators.key_order(
            history, operators.key_basis(history, AXES, 0, LATENT_TOKENS), LATENT_TOKENS, 64
        ),
        64,
    )
    best = dict.fromkeys(forms, math.inf)
    for _ in range(7):
        for name, run in forms.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], 1e3 * (time.process_time() - begin))
    return {"history_latents": latents, "ms": {name: round(ms, 2) for name, ms in best.items()}}


def rollout_rows() -> list[dict[str, Any]]:
    """Return dB of a way back to that of dense attention and to the renderer."""
    model, codec = load_stream()
    w2c = out_and_back(make_room(HELD_OUT_SEED + 1), CHUNKS * CHUNK_LATENTS)
    half = len(w2c) // 2
    seen = render(make_room(HELD_OUT_SEED + 1), w2c[:half], [Attributes()])[0]
    text = model.text(tokenize(prompt_of(Attributes()))[None])
    given = codec.encode(seen).transpose(0, 1)[None]

    def frames(options: dict[str, Any]) -> Tensor:
        torch._dynamo.reset()
        registry.reset_telemetry()
        latents = _way_back(model, given, w2c[None], text, options)
        return codec.decode(latents[0].transpose(0, 1))

    dense = frames({"preset": "off"})
    rows = [{"options": {"preset": "off"}, "db_to_renderer": _db(dense, seen.flip(0))}]
    for budget, choose, dense_steps in ROLLED:
        options = {
            "sparse.budget_decode": budget,
            "sparse.choose": choose,
            "sparse.dense_steps": dense_steps,
        }
        made = frames({"preset": "sparse", "sparse.dense_tokens": 0, **options})
        density = [site.density for site in registry.telemetry().values()]
        rows.append(
            {
                "options": options,
                "density": round(statistics.mean(density), 3),
                "db_to_dense": _db(made, dense),
                "db_to_renderer": _db(made, seen.flip(0)),
            }
        )
    return rows


def _db(one: Tensor, other: Tensor) -> float:
    return round(psnr_db(one, other), 1)


def _way_back(
    model: StreamWorld, given: Tensor, w2c: Tensor, text: Any, options: dict[str, Any]
) -> Tensor:
    """Generate the second half of a walk; refreshes are the model's own."""
    options = {"inner": "eager", **options}
    names = {
        "find-attention.segments": ("text", "history", "current"),
        "find-attention.token_grid": (8, 8),
    }
    fast = torch.compile(
        model, backend="light_interaction", options={**options, **names}, dynamic=True
    )

    def level(sigma: float) -> Tensor:
        return torch.full((1, CHUNK_LATENTS), sigma)

    latents, cache = given, None
    with lipass.Session(**options) as session:
        for start in range(0, w2c.shape[1], CHUNK_LATENTS):
            here = slice(start, start + CHUNK_LATENTS)
            x = latents[:, :, here].contiguous()
            if start >= given.shape[2]:
                x = chunk_noise(0, start, (1, *given.shape[1:2], CHUNK_LATENTS, 8, 8)).to(given)
                with session.chunk(latents=latents[0].transpose(0, 1)) as chunk:
                    for step in chunk.steps(SIGMAS):
                        with registry.force("sparse"):  # whatever is faster here
                            made = fast(x, level(step.sigma), w2c[:, here], text, cache)
                        x = x + (step.sigma_next - step.sigma) * made
                latents = torch.cat([latents, x], 2)
            cache = model(x, level(0.0), w2c[:, here], text, cache, refresh=True)
    return latents[:, :, given.shape[2] :]


def text_rows() -> list[dict[str, Any]]:
    """Return the share of FLOPs that attention to a prompt has, padded and with one key for it."""
    return [_text_row(family) for family in FAMILIES]


def _text_row(family: Family) -> dict[str, Any]:
    joint = family.history == "joint"
    history = 0 if joint else family.reads_latents
    new = family.chunk_latents + (family.reads_latents if joint else 0)
    role = "decode" if history else "self"
    whole = call_cost(family, role, new, history, None, hoisted=True, first=False).total
    key = 4.0 * family.attention_width * (family.streams if family.joint_text else 1)
    key *= family.layers * new * family.latent_tokens
    words = min(WORDS, family.text_tokens)
    return {
        "family": family.name,
        "text_keys": family.text_tokens,
        "share_of_flops": round(key * family.text_tokens / whole, 4),
        f"share_of_{words}_words": round(key * words / whole, 4),
    }


def main() -> None:
    """Print what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="the whole document")
    parser.add_argument("--rollouts", action="store_true", help="also roll out; five minutes")
    args = parser.parse_args()
    with torch.no_grad():
        calls = watched()
        found = {"recall": recall_rows(calls), "time": time_rows(calls), "text": text_rows()}
        if args.rollouts:
            found["rollouts"] = rollout_rows()
    if args.json:
        print(json.dumps({"environment": environment(), **found}, indent=1))
        return
    for name, rows in found.items():
        print(name)
        for row in rows:
            print(" ", json.dumps(row))


if __name__ == "__main__":
    main()
