"""Say what merging a history can be told, and refuse what it cannot be.

No defaults: those live in `lipass.presets`.
"""

from __future__ import annotations

from dataclasses import dataclass

from lipass.options import check


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Keys of a cached history that correspond across latents become one.

    Attributes:
        threshold: how alike keys are that merge, 0..1: the factor by which the weights of the
            queries change, `exp(-s)` for scores that move by `s` in the root mean square. 1.0
            merges equal keys only, which changes nothing.
        kv_tokens: most tokens of the history that are kept a head, the sink among them; those that
            others joined least recently leave. None keeps all.
        sink_latents: first latents of the history that stay as they are.
    """

    threshold: float
    kv_tokens: int | None
    sink_latents: int

    def __post_init__(self) -> None:
        check(
            0 <= self.threshold <= 1,
            "merge.threshold must be in [0, 1]",
            self.threshold,
            "use 0.7; 1.0 merges equal keys only",
        )
        check(
            self.kv_tokens is None or self.kv_tokens >= 1,
            "merge.kv_tokens must be None or >= 1",
            self.kv_tokens,
            "use None to keep all",
        )
        check(
            self.sink_latents >= 0,
            "merge.sink_latents must be >= 0",
            self.sink_latents,
            "use 0 for no sink",
        )
