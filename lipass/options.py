"""Say what the approximations can be told, and refuse what they cannot be.

No defaults: those live in `lipass.presets`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

POLICY_MODES = ("adaptive", "reference", "matrix-game")
STEP_FORMS = ("merge", "lookup")
RANKINGS = ("product", "cosine")
CHOICES = ("means", "buckets")
TILE_ORDERS = ("off", "whole", "runs")

# Half a circle in radians is less; no lens of a camera that walks sees so little.
_NARROWEST_DEG = math.pi


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What the view-based policies know about the camera and the chunk.

    Attributes:
        chunk_latents: latent frames generated together.
        hfov_deg: full horizontal field of view, degrees.
        vfov_deg: full vertical field of view, degrees.
        near: nearest depth where the scene may be, in the unit of the poses (metres).
        far: farthest depth where the scene may be, same unit.
    """

    chunk_latents: int
    hfov_deg: float
    vfov_deg: float
    near: float
    far: float

    def __post_init__(self) -> None:
        check(self.chunk_latents >= 1, "chunk_latents must be >= 1", self.chunk_latents, "use 4")
        for name in ("hfov_deg", "vfov_deg"):
            value = getattr(self, name)
            check(0 < value < 180, f"{name} must be in (0, 180) degrees", value, "use 60")
            check(
                value >= _NARROWEST_DEG,
                f"{name} must be in degrees, of a lens that people use",
                value,
                f"write {math.degrees(value):.0f} if it is in radians",
            )
        check(
            0 < self.near < self.far < math.inf,
            "near and far must satisfy 0 < near < far < inf",
            (self.near, self.far),
            "use near=0.5, far=8.0 for a room in metres",
        )


@dataclass(frozen=True, kw_only=True)
class ContextOptions(ViewOptions):
    """Which history latents the model reads.

    Attributes:
        mode: "adaptive" (this project's rules), "reference" (the released HY-WorldPlay gates) or
            "matrix-game" (those for Matrix-Game 3, whose cameras are of video frames; set
            `overlap_min` to 0.45, the released threshold).
        sink_latents: first latents of the history, always kept and always candidates of a revisit.
        memory_latents: most latents retrieved by view overlap (spatial memory).
        memory_chunks: most whole chunks retrieved so, in place of `memory_latents`, for models
            that cache keys a chunk at a time; None retrieves latents. Adaptive mode only.
        window_chunks_min: shortest temporal window, chunks.
        window_chunks_max: longest temporal window, chunks (`L_m` of the paper).
        window_latents: latents of the temporal window, where a model always reads so many whatever
            its chunks are, as Matrix-Game-3.0 reads 4 past ones; None leaves it to the two above.
            Adaptive mode only.
        dynamics_low: at or below this `MSE(z[t-1], z[t-2])` the window is longest; unit: variance
            of the latents, 1 for normalised ones.
        dynamics_high: at or above it the window is shortest.
        overlap_min: latents that show less than this share of the new view are not retrieved.
        gain_min: a retrieved latent must add at least this share of the new view to what the kept
            ones show, unless it is of an earlier visit; adaptive mode only.
        departure_min: a latent is of an earlier visit if a later one shows the new view by this
            share less; adaptive mode only.
    """

    mode: str
    sink_latents: int
    memory_latents: int
    memory_chunks: int | None
    window_chunks_min: int
    window_chunks_max: int
    window_latents: int | None
    dynamics_low: float
    dynamics_high: float
    overlap_min: float
    gain_min: float
    departure_min: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("context.mode", self.mode, POLICY_MODES)
        for name in ("sink_latents", "memory_latents"):
            value = getattr(self, name)
            check(value >= 0, f"context.{name} must be >= 0", value, "use 0 to switch it off")
        check(
            1 <= self.window_chunks_min <= self.window_chunks_max,
            "context window must satisfy 1 <= window_chunks_min <= window_chunks_max",
            (self.window_chunks_min, self.window_chunks_max),
            "use (1, 3)",
        )
        check(
            self.memory_chunks is None or self.memory_chunks >= 0,
            "context.memory_chunks must be None or >= 0",
            self.memory_chunks,
            "use 8",
        )
        check(
            self.window_latents is None or self.window_latents >= 1,
            "context.window_latents must be None or >= 1",
            self.window_latents,
            "use 4",
        )
        check(
            0 <= self.dynamics_low < self.dynamics_high < math.inf,
            "context dynamics must satisfy 0 <= dynamics_low < dynamics_high < inf",
            (self.dynamics_low, self.dynamics_high),
            "use (0.02, 0.1) for latents of unit variance",
        )
        _check_share("context.overlap_min", self.overlap_min)
        _check_share("context.gain_min", self.gain_min)
        _check_share("context.departure_min", self.departure_min)


@dataclass(frozen=True, kw_only=True)
class SparseOptions:
    """Block-sparse attention.

    Attributes:
        tile: tokens of one block of keys along (T, Y, X) of the latent grid.
        query_tile: the same of queries, a multiple of `tile`; None is `tile`. Larger blocks of
            queries choose more coarsely and run faster.
        budget_prefill: share of the freely chosen key blocks visited while the context is encoded.
        budget_self: the same where all frames are denoised at once, without a history.
        budget_decode: the same while a chunk is denoised behind a history.
        sink_latents: first latents of the history whose blocks are always visited.
        ranking: what ranks blocks, "product" of the means of queries and keys or its "cosine".
        choose: what a block of a history holds, by which it is chosen: "means" of tokens that lie
            together, or "buckets" of keys of like direction, wherever they lie.
        tile_order: tokens lie tile by tile from the model's input to its output, a block being a
            run of them: "off"; "whole" where tiles divide the grid; "runs" on any grid, where a
            short block goes on with tokens of the next tile.
        token_grid: tokens of one latent frame (Y, X), or of a clip (T, Y, X), where they are
            packed outside of what is compiled; None infers it from the graph.
        dense_layers: attention layers kept dense, counted from 0 in call order.
        dense_chunks: attention stays dense while the history holds fewer chunks than this; this
            and `dense_tokens` do not hold for graphs that read no history.
        dense_tokens: attention stays dense in chunks whose context is at most so many tokens: a
            context that is this short has been chosen, and has no blocks to spare.
        dense_steps: attention stays dense in so many first steps, which settle what is where.
        plan_every: one layer in so many of a graph chooses blocks, and those behind it follow.
        plan_once: blocks of a history are chosen once for the steps of a session's chunk.
    """

    tile: tuple[int, int, int]
    query_tile: tuple[int, int, int] | None
    budget_prefill: float
    budget_self: float
    budget_decode: float
    sink_latents: int
    ranking: str
    choose: str
    tile_order: str
    token_grid: tuple[int, ...] | None
    dense_layers: tuple[int, ...]
    dense_chunks: int
    dense_tokens: int
    dense_steps: int
    plan_every: int
    plan_once: bool

    def __post_init__(self) -> None:
        volume = math.prod(self.tile)
        check(
            len(self.tile) == 3 and min(self.tile) >= 1 and volume & (volume - 1) == 0,
            "sparse.tile must be three positive ints whose product is a power of two",
            f"{self.tile} = {volume}",
            "use (4, 4, 4) or (4, 8, 4)",
        )
        rests = [q % k for q, k in zip(self.query_tile or self.tile, self.tile, strict=True)]
        check(
            min(self.query_tile or self.tile) >= 1 and not any(rests),
            "sparse.query_tile must be None or a multiple of sparse.tile along each axis",
            f"{self.query_tile} for tile {self.tile}",
            "use None for blocks of one size",
        )
        for name in ("budget_prefill", "budget_self", "budget_decode"):
            value = getattr(self, name)
            check(
                0 < value <= 1,
                f"sparse.{name} must be in (0, 1]",
                value,
                "use 0.3; 1.0 is dense; set 'sparse': False to switch the section off",
            )
        for name in ("sink_latents", "dense_chunks", "dense_tokens", "dense_steps"):
            value = getattr(self, name)
            check(value >= 0, f"sparse.{name} must be >= 0", value, "use 0 to switch it off")
        every, rule = self.plan_every, "sparse.plan_every must be >= 1"
        check(every >= 1, rule, every, "use 1 to let each layer choose")
        check_choice("sparse.ranking", self.ranking, RANKINGS)
        check_choice("sparse.choose", self.choose, CHOICES)
        check_choice("sparse.tile_order", self.tile_order, TILE_ORDERS)
        check(
            self.token_grid is None
            or (len(self.token_grid) in (2, 3) and min(self.token_grid) >= 1),
            "sparse.token_grid must be None or positive ints (Y, X) or (T, Y, X)",
            self.token_grid,
            "use None to infer it",
        )
        check(
            all(layer >= 0 for layer in self.dense_layers),
            "sparse.dense_layers must be layer numbers >= 0",
            self.dense_layers,
            "use (0,) to keep the first layer dense",
        )


@dataclass(frozen=True, kw_only=True)
class StepOptions(ViewOptions):
    """Which denoising steps compute.

    Attributes:
        mode: "adaptive" (this project's revisit rule), "reference" (the released gate) or
            "matrix-game" (that for Matrix-Game 3, see `context.mode`).
        overlap_min: an earlier latent must show at least this share of the new view for steps to
            be reused; 0 reuses in every chunk that has a history.
        departure_min: the camera must have been away since: some later latent shows at least this
            much less of the new view; adaptive mode only.
        form: "merge" (reused steps leave the sigma list) or "lookup" (they return the stored
            output of the last computed step).
        reuse: "middle" (all but the first and the last step) or the indices of the steps to reuse;
            the first and the last step always compute.
    """

    mode: str
    overlap_min: float
    departure_min: float
    form: str
    reuse: str | tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("steps.mode", self.mode, POLICY_MODES)
        check_choice("steps.form", self.form, STEP_FORMS)
        _check_share("steps.overlap_min", self.overlap_min)
        _check_share("steps.departure_min", self.departure_min)
        if isinstance(self.reuse, str):
            check_choice("steps.reuse", self.reuse, ("middle",))
        else:
            check(
                all(index >= 0 for index in self.reuse),
                "steps.reuse must be step indices >= 0",
                self.reuse,
                "use (1, 2) or 'middle'",
            )


@dataclass(frozen=True, kw_only=True)
class SteeringOptions:
    """Attention weighs the prompts of a change and older history as a session says.

    There is nothing to choose: what weighs how much is up to `Session.steer`.
    """


def check(holds: bool, rule: str, value: object, remedy: str) -> None:
    """Raise ValueError with rule, value and remedy unless something holds."""
    if not holds:
        raise ValueError(f"{rule}, got {value}; {remedy}")


def _check_share(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} must be a share in [0, 1]", value, "use 0 to switch it off")


def check_choice(
    name: str, value: object, choices: tuple[str, ...], otherwise: str | None = None
) -> None:
    """Raise ValueError unless a value is one of some words.

    Args:
        name: of the option.
        value: what was given.
        choices: the words.
        otherwise: remedy where none is like the value; None recommends the first.
    """
    if value in choices:
        return
    from lipass.passes.nearest import did_you_mean  # only where something is wrong

    remedy = did_you_mean(value, choices, otherwise or f"use {choices[0]!r}")
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")
