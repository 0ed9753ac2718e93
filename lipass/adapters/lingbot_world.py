"""LingBot-World: one clip a call, whose latents all attend to each other; two models by level."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lipass.adapters.adoption import Adoption
from lipass.adapters.clips import drive_clips
from lipass.adapters.driving import module_of
from lipass.adapters.families import Family
from lipass.session import Session

_SCHEDULERS = ("FlowUniPCMultistepScheduler", "FlowDPMSolverMultistepScheduler")


def _adopt(model: nn.Module, adoption: Adoption) -> None:
    for part in (model, model.blocks[0].self_attn):  # type: ignore[index, union-attr]
        if "forward" in vars(part):
            why = "its attention exchanges heads between processes, which no graph shows"
            adoption.lint(vars(part)["forward"], "forward", why, model)


def _drive(pipeline: Any, session: Session, adoption: Adoption) -> None:
    """Make each call of `pipeline.generate` a chunk, whose cameras are those of its own clip."""
    module: Any = module_of(pipeline, "interpolate_camera_poses", *_SCHEDULERS)
    clips = drive_clips(pipeline, session, adoption, "generate")
    own = module.interpolate_camera_poses

    def cameras(*given: Any, **named: Any) -> Tensor:
        c2w: Tensor = own(*given, **named)
        clips.see(c2w)
        return c2w

    adoption.rebind(module, own.__name__, cameras, "cameras of a clip, one a latent, are seen")
    for name in _SCHEDULERS:
        why = "its steps are those of the session"
        adoption.rebind(module, name, clips.scheduler(getattr(module, name)), why)


FAMILY = Family(
    name="lingbot_world",
    classes=("wan.modules.model.WanModel",),
    adopt=_adopt,
    drive=_drive,
    takes=("dit_cond_dict", "seq_len"),
)
