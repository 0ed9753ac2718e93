"""HY-WorldPlay: what its autoregressive transformer and pipeline keep from graphs and sessions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lipass.adapters.adoption import Adoption
from lipass.adapters.families import Family
from lipass.adapters.hy_worldplay_rollout import drive
from lipass.adapters.rope import rotary_tables

_CODE = "worldplay_1_5_transformer"


def _adopt(model: Any, adoption: Adoption) -> None:
    code = [one.__module__ for one in type(model).__mro__ if one.__module__.endswith(_CODE)]
    if not code:
        raise TypeError(
            f"a model of family hy_worldplay must be of the class in {_CODE}.py or below it, got "
            f"{type(model).__name__}; pass the pipeline or its transformer"
        )
    package = code[0].partition(".")[0]
    _say_how_it_runs(package, model, adoption)
    # A first context of four latents could be a prompt by its length.
    pieces = {"find-attention.segments": ("text", "history", "current")}
    adoption.tell(model, pieces, "keys are text, history and current, in this order")
    # Written in each call and read by none that is compiled here; absent at first, it would be a
    # guard that fails at the second call.
    there = {"thw": None, "layer-name": None, **model.attn_param}
    adoption.rebind(
        model, "attn_param", there, "keys that each call writes are there from the first"
    )
    adoption.rebind(
        model, "forward_vision", _with_tables(model), "rotary tables of the call's own tokens"
    )


def _say_how_it_runs(package: str, model: Any, adoption: Adoption) -> None:
    """Make the two states that attention asks for, which are made lazily, for CUDA."""
    infer = sys.modules.get(f"{package}.commons.infer_state")
    parallel = sys.modules.get(f"{package}.commons.parallel_states")
    attention = sys.modules.get(f"{package}.models.transformers.modules.attention")
    if infer is None or parallel is None or attention is None:
        return
    made, alone = "made before it is asked for", "one process, made before asked for"
    state = infer.get_infer_state()
    if not adoption.hold(infer, "__infer_state", made) and state is None:
        state = infer.InferState()
        adoption.rebind(infer, "__infer_state", state, made)
    if (
        not adoption.hold(parallel, "__parallel_dims", alone)
        and vars(parallel)["__parallel_dims"] is None
    ):
        single: Any = object.__new__(parallel.ParallelDims)
        single.sp = single.world_size = 1
        adoption.rebind(parallel, "__parallel_dims", single, alone)
    adoption.rebind(
        attention, "maybe_fallback_attn_mode", _torch_for_flash, "flash attention is torch's"
    )
    whole = "blocks are compiled with the model, not alone"
    held = adoption.hold(state, "enable_torch_compile", whole)
    if not held and getattr(state, "enable_torch_compile", False):
        adoption.rebind(state, "enable_torch_compile", False, whole)
    vision = attention.sequence_parallel_attention_vision
    if state.enable_sageattn:
        blocks = ", ".join(map(str, state.sage_blocks_range))
        why = f"blocks {blocks} call sageattention, which no graph shows"
        adoption.lint(vision, vision.__name__, why, model)
    if parallel.get_parallel_state().sp_enabled:
        why = "its collectives between processes are left as they are"
        adoption.lint(vision, vision.__name__, why, model)


def _torch_for_flash(mode: str, infer_state: Any = None, block_idx: int | None = None) -> str:
    """Name the code that computes attention: where it is flash attention's, that of torch."""
    sage = infer_state is not None and infer_state.enable_sageattn
    if sage and block_idx in infer_state.sage_blocks_range:
        return "sageattn"
    return "torch" if mode.startswith("flash") else mode


def _with_tables(model: Any) -> Callable[..., Any]:
    own = model.forward_vision

    def forward_vision(
        hidden_states: Tensor,
        *,
        start_rope_start_idx: int = 0,
        freqs_cos: Tensor | None = None,
        freqs_sin: Tensor | None = None,
        **given: Any,
    ) -> Any:
        if freqs_cos is None and freqs_sin is None:
            sizes = [
                size // patch
                for size, patch in zip(hidden_states.shape[2:], model.patch_size, strict=True)
            ]
            freqs_cos, freqs_sin = rotary_tables(
                model.rope_dim_list,
                start_rope_start_idx,
                sizes,
                model.rope_theta,
                hidden_states.device,
            )
        return own(hidden_states, freqs_cos=freqs_cos, freqs_sin=freqs_sin, **given)

    return forward_vision


FAMILY = Family(
    name="hy_worldplay",
    classes=(f"{_CODE}.HunyuanVideo_1_5_DiffusionTransformer",),
    adopt=_adopt,
    drive=drive,
)
