"""Pipelines of diffusers, with a compiled transformer in them, tiny and random."""

import contextlib

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from video_zoo import VIDEO, _wan_like

import lipass
from lipass.kernels import registry
from lipass.receipt import current_report

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]

TURN = torch.tensor([*range(12), *range(12, 0, -1)]) * 0.15
VIEWS = torch.eye(4).repeat(24, 1, 1)
VIEWS[:, 0, 0] = VIEWS[:, 2, 2] = TURN.cos()
VIEWS[:, 0, 2], VIEWS[:, 2, 0] = TURN.sin(), -TURN.sin()

_CLIP = {"height": 64, "width": 96, "num_frames": 9}


def _wan_vae():
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip


def _unipc():
    return diffusers.UniPCMultistepScheduler(
        flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )


def wan():
    model, _ = VIDEO["wan"]()
    return diffusers.WanPipeline(None, None, _wan_vae(), _unipc(), transformer=model), {}


def skyreels():
    model, _ = _wan_like("SkyReelsV2Transformer3DModel")
    make = diffusers.SkyReelsV2DiffusionForcingPipeline
    pipe = make(None, None, model, _wan_vae(), _unipc())
    return pipe, {"prompt": None, "overlap_history": None, "base_num_frames": 9}


def cogvideox():
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    )  # fmt: skip
    model, _ = VIDEO["cogvideox"]()
    scheduler = diffusers.CogVideoXDDIMScheduler()
    return diffusers.CogVideoXPipeline(None, None, vae, model, scheduler), {}


def ltx():
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1, patch_size_t=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
    )  # fmt: skip
    model, _ = VIDEO["ltx"]()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    masks = {f"{x}prompt_attention_mask": torch.ones(1, 7) for x in ("", "negative_")}
    small = {"height": 32, "width": 32}
    return diffusers.LTXPipeline(scheduler, vae, None, None, model), {**masks, **small}


def hunyuan_video():
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )  # fmt: skip
    model, _ = VIDEO["hunyuan-video"]()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0)
    given = {"pooled_prompt_embeds": torch.randn(1, 8), "prompt_attention_mask": torch.ones(1, 7)}
    make = diffusers.HunyuanVideoPipeline
    return make(None, None, model, vae, scheduler, None, None), given


PIPELINES = [
    wan,
    cogvideox,
    skyreels,
    pytest.param(ltx, marks=pytest.mark.slow),
    pytest.param(hunyuan_video, marks=pytest.mark.slow),
]


@pytest.fixture
def made(request):
    """Return a pipeline whose transformer can be compiled, and a function that generates."""
    torch.manual_seed(0)
    pipe, given = request.param()
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.eval()
    prompts = {"prompt_embeds": torch.randn(1, 7, 16)}
    if request.param is not hunyuan_video:
        prompts["negative_prompt_embeds"] = torch.randn(1, 7, 16)
    given = {**_CLIP, **prompts, **given, "num_inference_steps": 4}

    def generate(**more):
        seed = torch.Generator().manual_seed(0)
        kind = {"output_type": "latent", "return_dict": False}
        return pipe(**given, **kind, generator=seed, **more)[0]

    return pipe, generate


def _compile(pipe, **options):
    given = {"inner": "eager", "sparse.budget": 1.0, **options}
    pipe.transformer = torch.compile(pipe.transformer, backend="light_interaction", options=given)


@pytest.mark.parametrize("made", PIPELINES, indirect=True)
def test_a_clip_at_budget_one_is_that_of_the_plain_pipeline(made):
    pipe, generate = made
    plain, ended = generate(), []
    _compile(pipe, preset="sparse")
    fast = generate(callback_on_step_end=lambda pipe, i, t, given: ended.append(i) or given)
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert ended == [0, 1, 2, 3]
    rewritten = [one for one in current_report().sites.values() if one.action == "rewritten"]
    assert len(rewritten) == 2


@pytest.mark.parametrize("made", [wan, cogvideox], indirect=True)
def test_a_clip_that_comes_back_reuses_steps(made):
    pipe, generate = made
    plain = generate()
    _compile(pipe, preset="all")
    registry.reset_telemetry()
    counts, clips = [], []
    with lipass.Session(preset="all", chunk_latents=3, **{"sparse.budget": 1.0}) as session:
        for i in (0, 15):
            clip = {"poses": VIEWS[:i] if i else None, "query": VIEWS[i : i + 3]}
            with (
                session.chunk(**clip, stream=f"{i}") as chunk,
                chunk.follow(pipe.scheduler),
            ):
                clips.append(generate())
            calls = max(one.calls for one in registry.telemetry().values())
            counts.append((chunk.steps_skipped(), chunk.misses, calls))
    torch.testing.assert_close(clips[0], plain, atol=1e-4, rtol=1e-4)
    # both branches of guidance are one call in CogVideoX and two in Wan
    a_step = counts[0][2] // 4
    assert counts == [(0, 0, 4 * a_step), (2, 0, 6 * a_step)]
    assert clips[1].isfinite().all()
    assert not torch.allclose(clips[1], plain)


@pytest.mark.parametrize("made", [skyreels], indirect=True)
def test_a_pipeline_that_steps_copies_of_its_scheduler_computes_all_and_says_so(made):
    pipe, generate = made
    plain = generate()
    _compile(pipe, preset="all")
    with lipass.Session(preset="all", chunk_latents=3, **{"sparse.budget": 1.0}) as session:
        chunk = session.chunk(poses=VIEWS[:15], query=VIEWS[15:18])
        told = pytest.warns(lipass.LipassWarning, match="steps copies of it")
        with contextlib.ExitStack() as scopes:
            for one in (told, chunk, chunk.follow(pipe.scheduler)):
                scopes.enter_context(one)
            fast = generate()
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)
    assert chunk.steps_skipped() == 0
