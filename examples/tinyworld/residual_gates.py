"""Step gates that look at the model: TeaCache's and the first-block cache's, around TinyWorld.

Both answer a step without the blocks where what they look at has hardly changed since the last
step that computed: the tokens get the change that the blocks made then. They know no poses.

Sources, rules only: TeaCache (arXiv 2411.19108) adds up how far the modulated input of the first
block moves, relative to itself, and computes when the sum reaches a threshold; first-block caching
(ParaAttention, as in diffusers) computes the first block and compares what it added.
"""

from torch import Tensor
from torch.nn import functional as F

from .model import KeyValue, TinyWorld, camera_transforms

RULES = ("teacache", "first block")


class GatedWorld:
    """TinyWorld behind a gate; called as the model is.

    Args:
        model: the model.
        rule: one of `RULES`.
        threshold: relative change from which on the blocks compute; 0 always does.

    Raises:
        ValueError: another rule.

    Attributes:
        computed: decode calls in which the blocks ran.
        calls: decode calls.
    """

    def __init__(self, model: TinyWorld, rule: str, threshold: float) -> None:
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        self.model, self.rule, self.threshold = model, rule, threshold
        self.computed = self.calls = 0
        self._history: list[KeyValue] | None = None
        self._seen: Tensor | None = None
        self._sum = 0.0
        self._change: Tensor | None = None

    def __call__(
        self,
        latents: Tensor,
        sigma: Tensor,
        w2c: Tensor,
        text: list[KeyValue],
        history: list[KeyValue] | None = None,
        walls: Tensor | None = None,
    ) -> Tensor | list[KeyValue]:
        """Prefill as the model does; decode through the gate."""
        if history is None:
            return self.model(latents, sigma, w2c, text, None, walls)
        if history is not self._history:  # another chunk
            self._history, self._seen, self._change, self._sum = history, None, None, 0.0
        model, self.calls = self.model, self.calls + 1
        own = w2c[:, -latents.shape[2] :]
        first = model.tokens(latents, own, walls)
        rows = model.rows(sigma, first.dtype)
        cameras = tuple(matrices.to(first.dtype) for matrices in camera_transforms(own))

        def through(x: Tensor, blocks: slice) -> Tensor:
            places = range(len(model.blocks))[blocks]
            for i in places:
                x, _ = model.blocks[i](x, rows, cameras, model.rotary, text[i], history[i])
            return x

        if self.rule == "teacache":
            shift, scale = model.blocks[0].modulated(rows)[:2]
            seen = F.layer_norm(first, first.shape[-1:]) * (1 + scale) + shift
            begin, rest = first, slice(0, None)
        else:
            begin, rest = through(first, slice(0, 1)), slice(1, None)
            seen = begin - first
        if self._skips(seen):
            assert self._change is not None
            x = begin + self._change
        else:
            x = through(begin, rest)
            self.computed += 1
            self._change = x - begin
        return model.velocity(x, latents, sigma)

    def _skips(self, seen: Tensor) -> bool:
        """Decide, and remember what the next decision compares with."""
        before, moved = self._seen, 0.0
        if before is not None:
            moved = float((seen - before).abs().mean() / before.abs().mean())
        if self.rule == "teacache":
            self._seen, self._sum = seen, self._sum + moved
            skips = before is not None and self._sum < self.threshold
            self._sum = self._sum if skips else 0.0
            return skips
        skips = before is not None and moved < self.threshold
        if not skips:
            self._seen = seen
        return skips
