"""Widths and token counts of released models: what a call of each multiplies.

Linear layers are counted as products a token: weights of one block that every token meets. `P` is
2 FLOPs a weight and token. What is once a clip (text encoders, codecs) is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

Grid = tuple[int, int]


@dataclass(frozen=True)
class Family:
    """One released model.

    Attributes:
        name: of its page.
        source: where the numbers are from.
        layers: blocks.
        width: of the residual stream.
        heads: of attention, each `width // heads` wide unless `head_dim` says otherwise.
        token_weights: weights of one block that each token meets in each call.
        row_weights: those that meet each token although only the latents differ (modulation): with
            preset `exact` they are applied once a latent.
        kept_weights: those that meet what no step changes (cameras, text keys): with preset
            `exact` once a chunk.
        latent_grid: tokens of one latent `(Y, X)`.
        chunk_latents: latents of a chunk; of a clip where the model makes one clip.
        text_tokens: keys of the prompt.
        joint_text: whether they are keys of self-attention; otherwise each token attends to them
            in a call of its own.
        streams: copies of the tokens that attend (HY-WorldPlay: rotary and projective).
        steps: denoising steps of a chunk.
        history: what a chunk does with the latents before it: `"encoded"` encodes the context,
            `"cached"` reads keys that are kept, `"joint"` denoises it with the chunk.
        passes: model calls a step (2 with guidance).
        extra_calls: calls a chunk beside the steps (a refresh of the cache).
        reads_latents: latents of earlier chunks that a chunk reads as released, at most.
    """

    name: str
    source: str
    layers: int
    width: int
    heads: int
    token_weights: int
    row_weights: int
    kept_weights: int
    latent_grid: Grid
    chunk_latents: int
    text_tokens: int
    joint_text: bool
    steps: int
    history: str
    streams: int = 1
    passes: int = 1
    extra_calls: int = 0
    reads_latents: int = 0
    head_dim: int = 128

    @property
    def latent_tokens(self) -> int:
        """Tokens of one latent."""
        return self.latent_grid[0] * self.latent_grid[1]

    @property
    def attention_width(self) -> int:
        """Columns of queries, keys and values."""
        return self.heads * self.head_dim

    def kv_bytes(self, latents: int) -> int:
        """Bytes of the keys and values of a history, bf16, all layers and streams."""
        tokens = latents * self.latent_tokens
        return self.layers * self.streams * 2 * self.attention_width * 2 * tokens


def _wan(width: int, ffn: int) -> int:
    # q, k, v, o; q and o of cross-attention; two of the MLP.
    return 6 * width * width + 2 * width * ffn


HY_WORLDPLAY = Family(
    "hy-worldplay", "HY-WorldPlay 8B, 480p, distilled: 832x480, 4 steps, no guidance",
    layers=54, width=2048, heads=16,
    # qkv, out, projective out, MLP of 4 widths
    token_weights=13 * 2048**2, row_weights=6 * 2048**2, kept_weights=0,
    latent_grid=(30, 52), chunk_latents=4, text_tokens=929, joint_text=True, steps=4, streams=2,
    history="encoded", reads_latents=20,
)  # fmt: skip
MATRIX_GAME_3 = Family(
    "matrix-game-3", "Matrix-Game-3.0, 720p, distilled: 3 steps, no guidance; without its action "
    "module; its own config was not at hand, so widths are those of Wan2.2-TI2V-5B below it",
    layers=30, width=3072, heads=24,
    token_weights=_wan(3072, 14336), row_weights=0, kept_weights=4 * 3072**2,
    latent_grid=(22, 40), chunk_latents=10, text_tokens=512, joint_text=False, steps=3,
    history="joint", reads_latents=9,
)  # fmt: skip
SELF_FORCING = Family(
    "self-forcing", "Self-Forcing (Wan2.1-T2V-1.3B), 480p: 4 steps and the refresh of the cache",
    layers=30, width=1536, heads=12,
    token_weights=_wan(1536, 8960), row_weights=0, kept_weights=0,
    latent_grid=(30, 52), chunk_latents=3, text_tokens=512, joint_text=False, steps=4,
    history="cached", extra_calls=1, reads_latents=18,
)  # fmt: skip
WAN_14B = Family(
    "wan-2.1-14b", "Wan2.1-T2V-14B, 480p, 81 frames: 50 steps with guidance",
    layers=40, width=5120, heads=40,
    token_weights=_wan(5120, 13824), row_weights=0, kept_weights=0,
    latent_grid=(30, 52), chunk_latents=21, text_tokens=512, joint_text=False, steps=50, passes=2,
    history="joint",
)  # fmt: skip
HUNYUAN_VIDEO = Family(
    "hunyuan-video", "HunyuanVideo 13B, 720p, 129 frames: 50 steps, guidance distilled; its 40 "
    "single blocks counted as its 20 double ones",
    layers=60, width=3072, heads=24,
    token_weights=12 * 3072**2, row_weights=0, kept_weights=0,
    latent_grid=(45, 80), chunk_latents=33, text_tokens=256, joint_text=True, steps=50,
    history="joint",
)  # fmt: skip
LINGBOT_WORLD = Family(
    "lingbot-world", "LingBot-World base with cameras, 480p, 161 frames: 70 steps with guidance",
    layers=40, width=5120, heads=40,
    # the rays of a block: two products to mix, one to scale and one to shift
    token_weights=_wan(5120, 13824), row_weights=0, kept_weights=4 * 5120**2,
    latent_grid=(30, 52), chunk_latents=41, text_tokens=512, joint_text=False, steps=70, passes=2,
    history="joint",
)  # fmt: skip
FAMILIES = (HY_WORLDPLAY, MATRIX_GAME_3, SELF_FORCING, LINGBOT_WORLD, WAN_14B, HUNYUAN_VIDEO)
