"""Build a small HY-WorldPlay from a checkout, and roll it out as its pipeline does."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lipass.adapters.checkouts.hy_worldplay_loop import (
    CHUNK,
    CONTEXT,
    LATENT,
    RECENT,
    STATES,
    STEPS,
    Given,
    Loop,
    own_rollout,
    retrieved,
)
from lipass.adapters.checkouts.imports import imported_from
from lipass.adapters.checkouts.poses import there_and_back
from lipass.adapters.checkouts.subject import Check, Ran, Subject
from lipass.policy.reference_worldplay import gate_chunk
from lipass.receipt import ChunkRecord

OPTIONS = {"chunk_latents": CHUNK, "sparse.dense_tokens": 0, "sparse.tile": (2, 4, 4)}
_NEEDED = ("diffusers", "einops", "loguru")
_MODULES = (
    "hyvideo.commons.infer_state",
    "hyvideo.commons.parallel_states",
    "hyvideo.models.transformers.worldplay_1_5_transformer",
    "hyvideo.pipelines.worldplay_video_pipeline",
    "hyvideo.schedulers.scheduling_flow_match_discrete",
)
_SHIFT, _RETRIEVED_CHUNKS = 5.0, 10


def build(checkout: Path, layers: int = 2) -> Subject:
    """Import a checkout and make a few layers of its transformer with random weights."""
    with imported_from(checkout, _NEEDED, "hyvideo") as stubbed:
        infer_state, parallel_states, transformer, module, schedulers = map(
            importlib.import_module, _MODULES
        )
    _run_as_one_process(infer_state, parallel_states)
    torch.manual_seed(0)
    model = _small(transformer.HunyuanVideo_1_5_DiffusionTransformer, layers)
    loop = Loop(lambda: schedulers.FlowMatchDiscreteScheduler(shift=_SHIFT), module)
    pipeline = _pipeline(module, model, schedulers.FlowMatchDiscreteScheduler(shift=_SHIFT))
    return Subject(
        family="hy_worldplay",
        model=model,
        rollout=loop,
        seen=latents_embedded,
        expected=expected,
        options=OPTIONS,
        pipeline=pipeline,
        drive=functools.partial(own_rollout, pipeline),
        more=functools.partial(_retrieval_is_reproduced, module),
        stubbed=tuple(stubbed),
    )


def latents_embedded(operator: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Read the latents of a call from its patch embedding, `[B, C, T, Y, X]`."""
    return shapes[0][2] if operator == "aten::conv3d" else None


def expected(record: ChunkRecord) -> Ran:
    """Say what a chunk runs: its context once, if it has one, and itself in each step."""
    assert record.plan.steps is not None
    context = len(record.plan.context.indices)
    steps = record.plan.steps.total - record.steps_skipped
    return Ran(bool(context) + steps, context + steps * CHUNK)


def _retrieval_is_reproduced(pipeline: Any) -> Iterator[Check]:
    """Compare the gates of mode reference, with its settings, with what the checkout retrieves."""
    w2c = there_and_back(_RETRIEVED_CHUNKS, CHUNK)
    points = Given(1).points
    starts = range(CHUNK, len(w2c), CHUNK)
    same = 0
    for start in starts:
        gate = gate_chunk(
            w2c[:start].double(),
            w2c[start : start + CHUNK].double(),
            context_latents=CONTEXT,
            temporal_latents=RECENT,
            context_threshold=0.0,
        )
        same += list(gate.indices) == retrieved(pipeline, w2c, start, points)
    yield Check(
        "reference: context of the release",
        same == len(starts),
        f"{same} of {len(starts)} chunks as select_aligned_memory_frames chooses",
    )


def _pipeline(module: Any, model: nn.Module, scheduler: Any) -> Any:
    """Make a pipeline of a transformer and a scheduler alone; its constructor wants encoders."""
    pipeline = object.__new__(module.HunyuanVideo_1_5_Pipeline)
    vars(pipeline).update(
        transformer=model,
        scheduler=scheduler,
        chunk_latent_frames=CHUNK,
        num_inference_steps=STEPS,
        num_warmup_steps=0,
        target_dtype=torch.float32,
        autocast_enabled=False,
        enable_offloading=False,
        execution_device=torch.device("cpu"),
        _guidance_scale=1.0,
        _progress_bar_config={"disable": True},
        _internal_dict={},
    )
    return pipeline


def _run_as_one_process(infer_state: Any, parallel_states: Any) -> None:
    """Make the states that its command line makes, without the mesh of CUDA devices."""
    if infer_state.get_infer_state() is None:
        vars(infer_state)["__infer_state"] = infer_state.InferState()
    if vars(parallel_states)["__parallel_dims"] is None:
        single = object.__new__(parallel_states.ParallelDims)
        single.sp = single.world_size = 1
        vars(parallel_states)["__parallel_dims"] = single


def _small(kind: Callable[..., nn.Module], layers: int) -> nn.Module:
    model: Any = kind(
        patch_size=[1, 1, 1],
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        hidden_size=64,
        heads_num=2,
        mm_double_blocks_depth=layers,
        mm_single_blocks_depth=0,
        rope_dim_list=[8, 12, 12],
        attn_mode="torch",
        text_states_dim=STATES,
    )
    model.add_action_parameters()
    for parameter in model.parameters():  # some start at zero and would hide a wrong gate
        nn.init.normal_(parameter, std=0.05 if parameter.dim() > 1 else 0.1)
    return model.eval()
