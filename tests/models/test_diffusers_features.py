"""What diffusers does to a transformer itself, with a compiled one: it works, or it is told."""

import contextlib
import warnings

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from video_zoo import VIDEO

import lipass
from lipass.receipt import current_report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),  # the model as it is
]

BUDGET_ONE = {"preset": "sparse", "inner": "eager", "sparse.budget": 1.0}
GRID = {**BUDGET_ONE, "sparse.token_grid": (3, 4, 6)}
LEVELS = (900, 700, 500)


@pytest.fixture(autouse=True)
def the_backend_of_all_models(monkeypatch):
    """`set_attention_backend` of one model is that of every model made later."""
    monkeypatch.setattr(
        _AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend
    )


def first_block_cache(model, _):
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.05))


def mag_cache(model, _):
    ratios = [1.0] * len(LEVELS)
    given = {"num_inference_steps": len(LEVELS), "mag_ratios": ratios, "threshold": 0.06}
    model.enable_cache(diffusers.MagCacheConfig(**given))


def taylor_seer(model, _):
    given = {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1}
    model.enable_cache(diffusers.TaylorSeerCacheConfig(**given))


def pyramid(model, level):
    model.enable_cache(
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 950),
            current_timestep_callback=lambda: level[0],
        )
    )


def group_offload(model, _):
    cpu = torch.device("cpu")
    given = {"offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, **given)


def layerwise_casting(model, _):
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def lora(model, _):
    peft = pytest.importorskip("peft")
    targets = ["to_q", "to_k", "to_v"]
    given = {"r": 2, "lora_alpha": 4, "init_lora_weights": False}
    model.add_adapter(peft.LoraConfig(target_modules=targets, **given))


def fused_lora(model, _):
    lora(model, _)
    model.fuse_lora()


def fused_projections(model, _):
    model.fuse_qkv_projections()


def flex_backend(model, _):
    model.set_attention_backend("flex")


def native_backend(model, _):
    model.set_attention_backend("native")


def math_backend(model, _):
    model.set_attention_backend("_native_math")


def generate(change, compiling):
    """Run a few steps; return the outputs, and what was told while they ran."""
    torch.manual_seed(0)
    model, inputs = VIDEO["wan"]()
    level, outputs = [0], []
    change(model.eval(), level)
    made = compiling(model)
    run = model if made is None else made
    kept = getattr(model, "cache_context", lambda _: contextlib.nullcontext())
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for level[0] in LEVELS:
            inputs["timestep"] = torch.tensor(level)
            with kept("one"):
                outputs.append(run(**inputs, return_dict=False)[0].clone())
    return outputs, [str(one.message) for one in told if one.category is lipass.LipassWarning]


def compiled(options):
    return lambda model: torch.compile(model, backend="light_interaction", options=options)


def repeated(options):
    return lambda model: model.compile_repeated_blocks(
        backend="light_interaction", options=options
    )


def in_place(options):
    return lambda model: model.compile(backend="light_interaction", options=options)


def _equal_with(change, compiling):
    expected, _ = generate(change, lambda model: None)
    actual, told = generate(change, compiling)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    found = [one for one in current_report().sites.values() if one.action == "rewritten"]
    return len(found), told


@pytest.mark.parametrize(
    "change",
    [
        flex_backend,
        lora,
        pytest.param(pyramid, marks=pytest.mark.slow),
        pytest.param(taylor_seer, marks=pytest.mark.slow),
        pytest.param(native_backend, marks=pytest.mark.slow),
        pytest.param(fused_lora, marks=pytest.mark.slow),
        pytest.param(fused_projections, marks=pytest.mark.slow),
    ],
)
def test_attention_becomes_sparse_all_the_same(change):
    assert _equal_with(change, compiled(BUDGET_ONE)) == (2, [])


def test_a_backend_that_the_user_chose_stays():
    assert _equal_with(math_backend, compiled(BUDGET_ONE)) == (0, [])
    reasons = [one.reason for one in current_report().sites.values() if one.role == "self"]
    assert len(reasons) == 2
    assert all(why.startswith("the user chose the kernel with sdpa_kernel") for why in reasons)


@pytest.mark.parametrize(
    "change", [first_block_cache, pytest.param(group_offload, marks=pytest.mark.slow)]
)
def test_hooks_that_dynamo_does_not_enter_are_told_and_blocks_need_the_grid(change):
    count, told = _equal_with(change, compiled(GRID))
    assert count == 2
    assert any("WanTransformer3DModel.forward, which Python runs from now on" in x for x in told)


@pytest.mark.slow
@pytest.mark.parametrize("change", [mag_cache, layerwise_casting])
def test_hooks_inside_of_blocks_keep_attention_from_graphs_and_are_told(change):
    _, told = _equal_with(change, compiled(GRID))
    assert not any(one.role == "self" for one in current_report().sites.values())
    assert any("WanTransformer3DModel.forward, which Python runs from now on" in x for x in told)


def test_hooks_that_dynamo_does_not_enter_are_an_error_under_strict():
    with pytest.raises(lipass.LipassError, match="strict: every call of a compiled"):
        generate(first_block_cache, compiled({**GRID, "strict": True}))


@pytest.mark.parametrize("compiling", [repeated, in_place])
def test_ways_to_compile_a_model_of_diffusers(compiling):
    """Equal blocks that share a graph are counted one by one."""
    assert _equal_with(lambda model, _: None, compiling(GRID)) == (2, [])


def test_repeated_blocks_say_that_they_need_the_grid():
    assert _equal_with(lambda model, _: None, repeated(BUDGET_ONE)) == (0, [])
    reasons = {one.reason for one in current_report().sites.values()}
    assert all("sparse.token_grid gives the grid of latents that are" in why for why in reasons)
