"""Turn a preset and flat options into one comparable, frozen Config, or say what is wrong.

The dataclasses have no defaults: those live in `lipass.presets`. Options are plain data (str,
bool, int, float, tuples), so that `torch.compile(options=...)` can compare them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lipass.presets import ADAPTIVE, PRESETS, REFERENCE

INNERS = ("inductor", "aot_eager", "eager")
POLICY_MODES = ("adaptive", "reference")
STEP_FORMS = ("merge", "lookup")
VERIFY = ("off", "first")
SECTIONS = ("context", "sparse", "steps")

_ONE_SIDED = ("preset", "inner", "strict", "verify")


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
        _check(self.chunk_latents >= 1, "chunk_latents must be >= 1", self.chunk_latents, "use 4")
        for name in ("hfov_deg", "vfov_deg"):
            value = getattr(self, name)
            _check(0 < value < 180, f"{name} must be in (0, 180) degrees", value, "use 60")
        _check(
            0 < self.near < self.far < math.inf,
            "near and far must satisfy 0 < near < far < inf",
            (self.near, self.far),
            "use near=0.5, far=8.0 for a room in metres",
        )


@dataclass(frozen=True, kw_only=True)
class ContextOptions(ViewOptions):
    """Which history latents the model reads.

    Attributes:
        mode: "adaptive" (this project's rules) or "reference" (the released HY-WorldPlay gates).
        sink_latents: first latents of the history, always kept and always candidates of a revisit.
        memory_latents: most latents retrieved by view overlap (spatial memory).
        window_chunks_min: shortest temporal window, chunks.
        window_chunks_max: longest temporal window, chunks (`L_m` of the paper).
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
    window_chunks_min: int
    window_chunks_max: int
    dynamics_low: float
    dynamics_high: float
    overlap_min: float
    gain_min: float
    departure_min: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("context.mode", self.mode, POLICY_MODES)
        for name in ("sink_latents", "memory_latents"):
            value = getattr(self, name)
            _check(value >= 0, f"context.{name} must be >= 0", value, "use 0 to switch it off")
        _check(
            1 <= self.window_chunks_min <= self.window_chunks_max,
            "context window must satisfy 1 <= window_chunks_min <= window_chunks_max",
            (self.window_chunks_min, self.window_chunks_max),
            "use (1, 3)",
        )
        _check(
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
        budget_decode: the same while a chunk is denoised.
        sink_latents: first latents of the history whose blocks are always visited.
        token_grid: tokens of one latent frame (Y, X); None infers it from the graph.
        dense_layers: attention layers kept dense, counted from 0 in call order.
        dense_chunks: attention stays dense while the history holds fewer chunks than this.
        dense_latents: attention stays dense in chunks whose context is at most so many latents: a
            context that is this short has been chosen, and has no blocks to spare.
    """

    tile: tuple[int, int, int]
    query_tile: tuple[int, int, int] | None
    budget_prefill: float
    budget_decode: float
    sink_latents: int
    token_grid: tuple[int, int] | None
    dense_layers: tuple[int, ...]
    dense_chunks: int
    dense_latents: int

    def __post_init__(self) -> None:
        volume = math.prod(self.tile)
        _check(
            len(self.tile) == 3 and min(self.tile) >= 1 and volume & (volume - 1) == 0,
            "sparse.tile must be three positive ints whose product is a power of two",
            f"{self.tile} = {volume}",
            "use (4, 4, 4) or (4, 8, 4)",
        )
        rests = [q % k for q, k in zip(self.query_tile or self.tile, self.tile, strict=True)]
        _check(
            min(self.query_tile or self.tile) >= 1 and not any(rests),
            "sparse.query_tile must be None or a multiple of sparse.tile along each axis",
            f"{self.query_tile} for tile {self.tile}",
            "use None for blocks of one size",
        )
        for name in ("budget_prefill", "budget_decode"):
            value = getattr(self, name)
            _check(
                0 < value <= 1,
                f"sparse.{name} must be in (0, 1]",
                value,
                "use 0.3; 1.0 is dense; set 'sparse': False to switch the section off",
            )
        for name in ("sink_latents", "dense_chunks", "dense_latents"):
            value = getattr(self, name)
            _check(value >= 0, f"sparse.{name} must be >= 0", value, "use 0 to switch it off")
        _check(
            self.token_grid is None or (len(self.token_grid) == 2 and min(self.token_grid) >= 1),
            "sparse.token_grid must be None or two positive ints (Y, X)",
            self.token_grid,
            "use None to infer it",
        )
        _check(
            all(layer >= 0 for layer in self.dense_layers),
            "sparse.dense_layers must be layer numbers >= 0",
            self.dense_layers,
            "use (0,) to keep the first layer dense",
        )


@dataclass(frozen=True, kw_only=True)
class StepOptions(ViewOptions):
    """Which denoising steps compute.

    Attributes:
        mode: "adaptive" (this project's revisit rule) or "reference" (the released gate).
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
        _check_choice("steps.mode", self.mode, POLICY_MODES)
        _check_choice("steps.form", self.form, STEP_FORMS)
        _check_share("steps.overlap_min", self.overlap_min)
        _check_share("steps.departure_min", self.departure_min)
        if isinstance(self.reuse, str):
            _check_choice("steps.reuse", self.reuse, ("middle",))
        else:
            _check(
                all(index >= 0 for index in self.reuse),
                "steps.reuse must be step indices >= 0",
                self.reuse,
                "use (1, 2) or 'middle'",
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a compilation and a session are told; build it with `Config.resolve`.

    Attributes:
        preset: name the values came from.
        inner: compiler behind the passes, one of `INNERS`.
        strict: raise where a site that the preset names would stay dense.
        verify: "first" compares the first attention site of each form with its rewrite at budget
            1.0, on small random inputs while the graph is compiled; what differs is kept. "off"
            trusts the matchers.
        pipeline: text of the pass pipeline; None takes the preset's.
        disable: names of passes to leave out of the pipeline.
        counted_writes: True promises that weights and inputs are only written to in ways that
            torch counts, so not through `Tensor.data` or numpy; projected prompts are then kept
            from call to call of a session.
        context, sparse, steps: options of the three approximations; None is off.
        passes: options of single passes, `("pass-name.option", value)` in the order of the names.
    """

    preset: str
    inner: str
    strict: bool
    verify: str
    pipeline: str | None
    disable: tuple[str, ...]
    counted_writes: bool
    context: ContextOptions | None
    sparse: SparseOptions | None
    steps: StepOptions | None
    passes: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        _check_choice("preset", self.preset, tuple(PRESETS))
        _check_choice("inner", self.inner, INNERS)
        _check_choice("verify", self.verify, VERIFY)
        if self.context is not None and self.steps is not None:
            for field in dataclasses.fields(ViewOptions):
                ours, theirs = getattr(self.context, field.name), getattr(self.steps, field.name)
                _check(
                    ours == theirs,
                    f"context.{field.name} and steps.{field.name} must agree (one camera)",
                    (ours, theirs),
                    f"set both with '{field.name}'",
                )

    @classmethod
    def resolve(cls, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Config:
        """Build the Config of a preset with some options changed.

        Args:
            mode: preset name; None means `options["preset"]`, or "all" without one.
            options: flat keys: fields of Config ("inner"), of a section ("sparse.tile"), a
                section's switch ("steps": False), a shorthand that sets several (`SHORTHANDS`),
                or an option of one pass ("find-steps.steps_min"), which the pipeline checks.

        Raises:
            ValueError: unknown key or preset, value out of range, option of a section that is off.
            TypeError: value of the wrong kind.
        """
        options = dict(options or {})
        named = options.pop("preset", None)
        if mode is not None and named is not None and mode != named:
            raise ValueError(
                f"there must be one preset, got mode={mode!r} and preset={named!r}; drop one"
            )
        preset = mode if mode is not None else named if named is not None else "all"
        _check_choice("preset", preset, tuple(PRESETS))
        unknown = [key for key in options if key not in _known_keys()]
        of_passes = {key: options.pop(key) for key in unknown if _names_a_pass(key)}
        if unknown := [key for key in unknown if key not in of_passes]:
            raise ValueError(_unknown_key(unknown[0]))

        values = _preset_values(preset)
        values["passes"] = tuple(
            (key, tuple(value) if isinstance(value, list) else value)
            for key, value in sorted(of_passes.items())
        )
        defaults = REFERENCE if preset == "reference" else ADAPTIVE
        for name in SECTIONS:
            if name in options:
                switch = _coerce(name, options.pop(name), bool)
                if switch and values[name] is None:
                    values[name] = dict(defaults[name])
                elif not switch:
                    values[name] = None
        # A named key beats a shorthand that covers it, whatever their order.
        for key in sorted(options, key=lambda key: key not in SHORTHANDS):
            targets = SHORTHANDS.get(key, (key,))
            live = [t for t in targets if "." not in t or values[t.split(".")[0]] is not None]
            if not live:
                raise ValueError(_section_off(key, targets, preset))
            for target in live:
                section, _, field = target.rpartition(".")
                where = values[section] if section else values
                where[field] = _coerce(key, options[key], _FIELD_KINDS[target])
        for name, kind in _SECTION_TYPES.items():
            if values[name] is not None:
                values[name] = kind(**values[name])
        return cls(**values)

    def fingerprint(self) -> str:
        """Name what a compiled graph and a session must agree on: equal where they agree on all.

        The inner compiler, `verify` and `strict` are no part of it; it is the same in every
        process and version that has the same options.
        """
        flat = self.to_options()
        kept = {key: flat[key] for key in flat if key not in _ONE_SIDED}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]

    def to_options(self) -> dict[str, Any]:
        """Give the flat options that `resolve(None, ...)` turns back into this Config."""
        names = ("preset", "inner", "strict", "verify", "disable", "counted_writes")
        flat: dict[str, Any] = {name: getattr(self, name) for name in names} | dict(self.passes)
        if self.pipeline is not None:
            flat["pipeline"] = self.pipeline
        for name in SECTIONS:
            section = getattr(self, name)
            flat[name] = section is not None
            if section is not None:
                for field in dataclasses.fields(section):
                    flat[f"{name}.{field.name}"] = getattr(section, field.name)
        return flat


_SECTION_TYPES: dict[str, Any] = {
    "context": ContextOptions,
    "sparse": SparseOptions,
    "steps": StepOptions,
}

SHORTHANDS: dict[str, tuple[str, ...]] = {
    "sparse.budget": ("sparse.budget_prefill", "sparse.budget_decode"),
    **{
        field.name: (f"context.{field.name}", f"steps.{field.name}")
        for field in dataclasses.fields(ViewOptions)
    },
}

_FIELD_KINDS: dict[str, Any] = {
    "inner": str,
    "strict": bool,
    "verify": str,
    "pipeline": str,
    "disable": "tuple[str, ...]",
    "counted_writes": bool,
    **{
        f"{name}.{field.name}": field.type
        for name, kind in _SECTION_TYPES.items()
        for field in dataclasses.fields(kind)
    },
}


def _preset_values(preset: str) -> dict[str, Any]:
    """Copy a preset's entry, sections included, so that options can be written into it."""
    values: dict[str, Any] = {"preset": preset}
    for key, value in PRESETS[preset].items():
        values[key] = dict(value) if isinstance(value, dict) else value
    return values


def _known_keys() -> set[str]:
    return {"preset", *SECTIONS, *_FIELD_KINDS, *SHORTHANDS}


def _names_a_pass(key: str) -> bool:
    name, dot, _ = str(key).partition(".")
    if not dot or name in SECTIONS:
        return False
    from lipass import passes  # imports no pass

    return name in passes.PASSES or name in passes.registered()


def _unknown_key(key: str) -> str:
    close = difflib.get_close_matches(str(key), sorted(_known_keys()), n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]!r}?" if close else "see lipass.config for the fields"
    return f"options must name fields of Config, got {key!r}; {remedy}"


def _section_off(key: str, targets: tuple[str, ...], preset: str) -> str:
    section = targets[0].split(".")[0]
    return (
        f"an option needs its section, got {key!r} while {section!r} is off in preset {preset!r}; "
        f"add '{section}': True, or use preset 'all'"
    )


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """Check the kind of a value; only ints to floats and lists to tuples are converted."""
    kind = {str: "str", bool: "bool"}.get(kind, kind)
    plain_int = isinstance(value, int) and not isinstance(value, bool)
    if isinstance(value, list):
        value = tuple(value)
    ints = isinstance(value, tuple) and all(type(item) is int for item in value)
    accepts = {
        "str": isinstance(value, str),
        "bool": isinstance(value, bool),
        "int": plain_int,
        "float": plain_int or (isinstance(value, float) and not math.isnan(value)),
        "tuple[int, int, int]": ints and len(value) == 3,
        "tuple[int, int, int] | None": value is None or (ints and len(value) == 3),
        "tuple[int, int] | None": value is None or (ints and len(value) == 2),
        "tuple[int, ...]": ints,
        "str | tuple[int, ...]": isinstance(value, str) or ints,
        "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(x, str) for x in value),
    }
    if not accepts[kind]:
        raise TypeError(f"option {key!r} must be {kind}, got {value!r}; pass a value of that kind")
    return float(value) if kind == "float" else value


def _check(holds: bool, rule: str, value: object, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {value}; {remedy}")


def _check_share(name: str, value: float) -> None:
    _check(0 <= value <= 1, f"{name} must be a share in [0, 1]", value, "use 0 to switch it off")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    remedy = f"did you mean {close[0]!r}?" if close else f"use {choices[0]!r}"
    raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}; {remedy}")
