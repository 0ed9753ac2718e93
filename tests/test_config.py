import dataclasses

import pytest

from lipass.config import SECTIONS, Config
from lipass.grow_options import GrowOptions
from lipass.merge_options import MergeOptions
from lipass.options import (
    ContextOptions,
    SparseOptions,
    SteeringOptions,
    StepOptions,
    ViewOptions,
)
from lipass.presets import ADAPTIVE, PRESETS, REFERENCE, REFERENCE_MATRIX_GAME

SECTIONS_ON = {
    "off": "",
    "exact": "",
    "context": "context",
    "sparse": "sparse",
    "cache": "steps",
    "all": "context sparse steps",
    "reference": "context sparse steps",
    "reference-matrix-game": "context sparse steps",
}


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_turns_its_sections_on(preset):
    config = Config.resolve(preset)
    on = [name for name in SECTIONS if getattr(config, name) is not None]
    assert " ".join(on) == SECTIONS_ON[preset]


@pytest.mark.parametrize("preset", PRESETS)
def test_options_of_a_config_resolve_to_an_equal_one(preset):
    config = Config.resolve(preset, {"strict": True, "inner": "eager"})
    assert Config.resolve(None, config.to_options()) == config
    assert hash(Config.resolve(None, config.to_options())) == hash(config)


def test_reference_holds_the_released_numbers():
    config = Config.resolve("reference")
    context, sparse, steps = config.context, config.sparse, config.steps
    total = context.sink_latents + context.memory_latents
    assert total + context.window_chunks_max * context.chunk_latents == 12
    assert (context.overlap_min, steps.overlap_min) == (0.7, 0.7)
    assert (sparse.budget_prefill, sparse.budget_decode, sparse.tile) == (0.3, 0.175, (4, 8, 4))
    assert (sparse.dense_layers, sparse.dense_chunks) == ((0,), 3)
    assert (steps.form, steps.reuse) == ("lookup", (1, 2))


def test_reference_for_matrix_game_holds_the_released_numbers():
    config = Config.resolve("reference-matrix-game")
    context, sparse, steps = config.context, config.sparse, config.steps
    assert (context.mode, context.overlap_min) == ("matrix-game", 0.45)
    assert (sparse.tile, sparse.budget_self, sparse.ranking) == ((4, 4, 8), 0.2, "cosine")
    assert (sparse.dense_layers, sparse.dense_chunks) == ((), 1)
    assert (steps.mode, steps.form, steps.reuse) == ("matrix-game", "lookup", (1,))


@pytest.mark.parametrize(
    "kind", [ContextOptions, SparseOptions, StepOptions, MergeOptions, GrowOptions]
)
def test_every_field_has_a_default_in_both_tables_and_a_line_in_the_docstring(kind):
    kinds = (
        ContextOptions, SparseOptions, StepOptions, MergeOptions, SteeringOptions, GrowOptions,
    )  # fmt: skip
    name = dict(zip(kinds, SECTIONS, strict=True))[kind]
    fields = {field.name for field in dataclasses.fields(kind)}
    for defaults in (ADAPTIVE, REFERENCE, REFERENCE_MATRIX_GAME):
        assert set(defaults[name]) == fields
    text = (kind.__doc__ or "") + (ViewOptions.__doc__ or "")
    assert all(f"{field}:" in text for field in fields)


def test_default_is_all():
    assert Config.resolve() == Config.resolve("all") == Config.resolve(None, {"preset": "all"})


def test_shorthand_sets_every_section_that_is_on():
    config = Config.resolve("all", {"hfov_deg": 75, "near": 0.2, "sparse.budget": 0.5})
    assert config.context.hfov_deg == config.steps.hfov_deg == 75.0
    assert config.sparse.budget_prefill == config.sparse.budget_decode == 0.5
    assert Config.resolve("cache", {"hfov_deg": 75}).steps.hfov_deg == 75.0


def test_named_key_beats_shorthand_in_any_order():
    one = {"sparse.budget": 0.5, "sparse.budget_decode": 0.2}
    other = dict(reversed(one.items()))
    assert Config.resolve("all", one) == Config.resolve("all", other)
    assert Config.resolve("all", one).sparse.budget_decode == 0.2


def test_section_can_be_switched():
    assert Config.resolve("all", {"steps": False}).steps is None
    assert Config.resolve("exact", {"sparse": True}).sparse == Config.resolve("all").sparse
    off = {"sparse": False}
    assert Config.resolve("reference", off).sparse is None
    on = {"context": True, "context.memory_latents": 2}
    assert Config.resolve("sparse", on).context.memory_latents == 2


def test_lists_become_tuples_and_ints_floats():
    config = Config.resolve("all", {"sparse.tile": [2, 4, 4], "near": 1})
    assert config.sparse.tile == (2, 4, 4)
    assert type(config.context.near) is float


@pytest.mark.parametrize(
    ("mode", "options", "error", "words"),
    [
        ("al", {}, ValueError, "preset must be one of off, .* did you mean 'all'"),
        (None, {"preset": "xyzzy"}, ValueError, "got 'xyzzy'; use 'all', or 'exact'"),
        ("all", {"preset": "off"}, ValueError, "one preset, got mode='all' and preset='off'"),
        ("all", {"sparse.budgett": 0.3}, ValueError, "did you mean 'sparse.budget'"),
        (
            "all",
            {"overlap": 1},
            ValueError,
            "got 'overlap'; did you mean 'context.overlap_min' or 'steps.overlap_min'",
        ),
        ("all", {"inner": "inductr"}, ValueError, "did you mean 'inductor'"),
        (
            "all",
            {"strict": 1},
            TypeError,
            "option 'strict' must be True or False, got 1; write True",
        ),
        ("all", {"context.memory_latents": 2.0}, TypeError, "must be an int, got 2.0"),
        ("all", {"context.overlap_min": float("nan")}, TypeError, "must be a number, got nan"),
        ("all", {"context.overlap_min": True}, TypeError, "must be a number, got True"),
        ("all", {"context.overlap_min": 1.5}, ValueError, "share in \\[0, 1\\], got 1.5; use 0"),
        ("all", {"context.memory_latents": -1}, ValueError, ">= 0, got -1; use 0"),
        ("all", {"context.window_chunks_min": 4}, ValueError, "got \\(4, 3\\); use \\(1, 3\\)"),
        ("all", {"context.dynamics_low": 2.0}, ValueError, "got \\(2.0, 0.1\\)"),
        ("all", {"context.mode": "adaptve"}, ValueError, "did you mean 'adaptive'"),
        ("all", {"context.hfov_deg": 90.0}, ValueError, "one camera.* set both with 'hfov_deg'"),
        ("all", {"hfov_deg": 180}, ValueError, "\\(0, 180\\) degrees, got 180"),
        ("all", {"near": 9.0}, ValueError, "near < far < inf, got \\(9.0, 8.0\\)"),
        ("all", {"sparse.budget": 0}, ValueError, "\\(0, 1\\], got 0.0; use 0.3"),
        ("all", {"sparse.tile": (2, 8, 3)}, ValueError, "got \\(2, 8, 3\\) = 48; use"),
        ("all", {"sparse.tile": (4, 4)}, TypeError, "three ints, got \\(4, 4\\)"),
        ("all", {"sparse.query_tile": (4, 6, 4)}, ValueError, "multiple of sparse.tile.*got"),
        ("all", {"sparse.query_tile": (4, 4)}, TypeError, "tuple\\[int, int, int\\] | None"),
        ("all", {"sparse.dense_layers": (-1,)}, ValueError, "layer numbers >= 0"),
        ("all", {"verify": "always"}, ValueError, "verify must be one of off, first, got"),
        ("all", {"steps.reuse": "all"}, ValueError, "steps.reuse must be one of middle"),
        ("all", {"steps.reuse": (-1,)}, ValueError, "step indices >= 0, got \\(-1,\\)"),
        ("all", {"steps.form": "merged"}, ValueError, "did you mean 'merge'"),
        ("exact", {"sparse.budget": 0.3}, ValueError, "'sparse' is off in preset 'exact'; add"),
        ("sparse", {"context.hfov_deg": 60}, ValueError, "'context' is off in preset 'sparse'"),
        ("sparse", {"hfov_deg": "wide"}, TypeError, "hfov_deg"),
        (
            "context",
            {"tile-order.grids": "runs"},
            ValueError,
            "'sparse' is off in preset 'context'",
        ),
        ("all", {"context": False, "prune-context.tile": "4x4x4"}, ValueError, "'context' is off"),
    ],
)
def test_wrong_option_is_named_with_rule_value_and_remedy(mode, options, error, words):
    with pytest.raises(error, match=words) as raised:
        Config.resolve(mode, options)
    assert "; " in str(raised.value)


def test_options_of_passes_that_say_what_a_model_is_are_taken_by_any_preset():
    told = {"find-attention.segments": ("history", "current"), "share-blocks.nodes_min": 4}
    for preset in ("off", "exact", "context", "all"):
        assert dict(Config.resolve(preset, told).passes) == told
    own = {
        "pipeline": "canonicalize,find-attention,sparse-attention,tile-order",
        "tile-order.grids": "runs",
    }
    assert Config.resolve("off", own).passes == (("tile-order.grids", "runs"),)


def test_options_of_the_caller_are_not_changed():
    options = {"preset": "all", "steps": False, "sparse.tile": [4, 4, 4]}
    before = dict(options)
    Config.resolve(None, options)
    assert options == before
    Config.resolve("all", {"sparse.budget": 0.9})
    assert Config.resolve("all").sparse.budget_decode != 0.9


@pytest.mark.parametrize("preset", ["off", "exact", "sparse"])
def test_what_describes_a_walk_stays_when_another_preset_is_tried(preset):
    given = {"chunk_latents": 3, "near": 1, "hfov_deg": 90}
    assert Config.resolve(preset, given) == Config.resolve(preset)
    assert Config.resolve("all", given).context.chunk_latents == 3


@pytest.mark.parametrize("section", ["context", "steps"])
def test_cameras_of_frames_are_of_both_sections(section):
    with pytest.raises(ValueError, match=r"must both be 'matrix-game' or none, .* switch one"):
        Config.resolve("all", {f"{section}.mode": "matrix-game"})
    with pytest.raises(ValueError, match="must both be 'matrix-game' or none"):
        Config.resolve("reference-matrix-game", {f"{section}.mode": "adaptive"})
    alone = {"context": "steps", "steps": "context"}[section]
    mixed = {alone: False, f"{section}.mode": "matrix-game"}
    assert getattr(Config.resolve("all", mixed), section).mode == "matrix-game"
