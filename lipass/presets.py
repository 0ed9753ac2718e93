"""List the default of every option, one entry per preset; the only place that has defaults.

An entry holds the fields of `Config` and of its sections by name; None is a section that is off.
"""

from __future__ import annotations

from typing import Any

# One camera: HY-WorldPlay's 60 x 35 degrees; depths of a room in metres.
_VIEW = {"chunk_latents": 4, "hfov_deg": 60.0, "vfov_deg": 35.0, "near": 0.5, "far": 8.0}

ADAPTIVE: dict[str, dict[str, Any]] = {
    "context": {
        **_VIEW,
        "mode": "adaptive",
        "sink_latents": 1,
        "memory_latents": 3,
        "memory_chunks": None,
        "window_chunks_min": 1,
        # Upstream HY-WorldPlay reads 12 recent latents, hence L_m = 3.
        "window_chunks_max": 3,
        "window_latents": None,
        # Unrelated latents of unit variance differ by an MSE of 2, a standing camera's by ~0. So
        # the window is one chunk as soon as the camera moves.
        "dynamics_low": 0.02,
        "dynamics_high": 0.1,
        "overlap_min": 0.3,
        "gain_min": 0.02,
        "departure_min": 0.1,
    },
    "sparse": {
        "tile": (4, 4, 4),
        "query_tile": None,
        "budget_prefill": 0.3,
        "budget_self": 0.3,
        "budget_decode": 0.3,
        "sink_latents": 1,
        "ranking": "product",
        "choose": "means",
        "tile_order": "off",
        "token_grid": None,
        "dense_layers": (),
        "dense_chunks": 0,
        # What poses have chosen is not thinned a second time where latents are small; DESIGN.md
        # says why.
        "dense_tokens": 640,
        "dense_steps": 0,
        "plan_every": 1,
        "plan_once": False,
    },
    "steps": {
        **_VIEW,
        "mode": "adaptive",
        "overlap_min": 0.8,
        "departure_min": 0.1,
        "form": "merge",
        "reuse": "middle",
    },
    "merge": {"threshold": 0.7, "kv_tokens": None, "sink_latents": 1},
    "steering": {},
    "grow": {"delta": 0.0, "spectrum": None, "grid": None, "steps": 0},
}

# Light Interaction's release for HY-WorldPlay: 12 context latents (4 sink, 4 retrieved, 4 recent),
# threshold 0.7, tile 4x8x4, budgets 30 % and 17.5 %, layer 0 and chunks 0-2 dense, steps 1 and 2
# looked up; without a history 20 %, as in its release for Matrix-Game-3.0. Its similarity has no
# near plane; 0.1 only satisfies 0 < near.
_REFERENCE_VIEW = {**_VIEW, "near": 0.1}
REFERENCE: dict[str, dict[str, Any]] = {
    "context": {
        **ADAPTIVE["context"],
        **_REFERENCE_VIEW,
        "mode": "reference",
        "sink_latents": 4,
        "memory_latents": 4,
        "window_chunks_min": 1,
        "window_chunks_max": 1,
        "overlap_min": 0.7,
    },
    "sparse": {
        **ADAPTIVE["sparse"],
        "tile": (4, 8, 4),
        "budget_prefill": 0.3,
        "budget_self": 0.2,
        "budget_decode": 0.175,
        "sink_latents": 0,
        "dense_layers": (0,),
        "dense_chunks": 3,
        "dense_tokens": 0,
    },
    "steps": {
        **ADAPTIVE["steps"],
        **_REFERENCE_VIEW,
        "mode": "reference",
        "overlap_min": 0.7,
        "form": "lookup",
        "reuse": (1, 2),
    },
    "merge": ADAPTIVE["merge"],
    "steering": ADAPTIVE["steering"],
    "grow": ADAPTIVE["grow"],
}

# Its release for Matrix-Game-3.0: threshold 0.45, the sink and up to four retrieved latents, tile
# 4x4x8, 20 % by cosine in all layers, the first clip dense, step 1 of 3 looked up. Options of the
# camera are not read in mode "matrix-game".
REFERENCE_MATRIX_GAME: dict[str, dict[str, Any]] = {
    "context": {
        **REFERENCE["context"],
        "mode": "matrix-game",
        "sink_latents": 1,
        "overlap_min": 0.45,
    },
    "sparse": {
        **REFERENCE["sparse"],
        "tile": (4, 4, 8),
        "budget_self": 0.2,
        "ranking": "cosine",
        "dense_layers": (),
        "dense_chunks": 1,
    },
    "steps": {
        **REFERENCE["steps"],
        "mode": "matrix-game",
        "overlap_min": 0.45,
        "reuse": (1,),
    },
    "merge": ADAPTIVE["merge"],
    "steering": ADAPTIVE["steering"],
    "grow": ADAPTIVE["grow"],
}

_TOP: dict[str, Any] = {
    "inner": "inductor",
    "strict": False,
    "verify": "first",
    "pipeline": None,
    "disable": (),
    "counted_writes": False,
}
_OFF: dict[str, Any] = {
    "context": None, "sparse": None, "steps": None, "merge": None, "steering": None, "grow": None,
}  # fmt: skip
# No preset merges: how much may be merged depends on what a model keeps in its cache. None steers:
# a row of zeros on the scores keeps attention from its fastest kernels. None grows: of few steps
# fewer are as cheap and nearer.
_LEFT_OUT: dict[str, Any] = {"merge": None, "steering": None, "grow": None}

SECTIONS_OF = {"reference": REFERENCE, "reference-matrix-game": REFERENCE_MATRIX_GAME}
"""Preset name to its own defaults of the sections; those of the others are `ADAPTIVE`."""

PRESETS: dict[str, dict[str, Any]] = {
    "off": {**_TOP, **_OFF},
    "exact": {**_TOP, **_OFF},
    "context": {**_TOP, **_OFF, "context": ADAPTIVE["context"]},
    "sparse": {**_TOP, **_OFF, "sparse": ADAPTIVE["sparse"]},
    "cache": {**_TOP, **_OFF, "steps": ADAPTIVE["steps"]},
    "all": {**_TOP, **ADAPTIVE, **_LEFT_OUT},
    "reference": {**_TOP, **REFERENCE, **_LEFT_OUT},
    "reference-matrix-game": {**_TOP, **REFERENCE_MATRIX_GAME, **_LEFT_OUT},
}
