"""A world model of one's own under lipass; run it to see one walk, dense and accelerated."""

import time

import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.policy.trajectory import parse_trajectory

CHANNELS, ROWS, COLUMNS, CHUNK_LATENTS = 8, 16, 16, 4
SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])  # a tensor: floats would be compiled in
# Graph and session read different options of these, so both are given all of them.
OPTIONS = {"preset": "all", "chunk_latents": CHUNK_LATENTS}


class Block(nn.Module):
    """Attention of a chunk over its history and itself."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x, cache):
        """Return the tokens, and their keys and values."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        keys, values = k, v
        if cache is not None:  # history first, then the chunk's own tokens
            keys, values = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
        attended = F.scaled_dot_product_attention(q, keys, values)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.wide(x))), (k, v)


class World(nn.Module):
    """Denoise chunks behind a history, or encode one."""

    def __init__(self, width=256, heads=4, depth=2):
        super().__init__()
        self.embed, self.head = nn.Linear(CHANNELS, width), nn.Linear(width, CHANNELS)
        self.camera, self.level = nn.Linear(12, width), nn.Linear(1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, latents, sigma, w2c, caches=None):
        """Velocity of `latents` `[B, C, T, Y, X]`; without caches also keys and values of them."""
        frames, rows, columns = latents.shape[2:]
        x = self.embed(latents.permute(0, 2, 3, 4, 1)) + self.level(sigma.view(-1, 1, 1, 1, 1))
        x = (x + self.camera(w2c[:, :, :3].flatten(2))[:, :, None, None]).flatten(1, 3)
        own = []
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x, pair = block(x, cache)
            own.append(pair)
        velocity = self.head(x).unflatten(1, (frames, rows, columns)).permute(0, 4, 1, 2, 3)
        return velocity, own


@torch.no_grad()  # attention that records gradients stays dense
def roll_out(model, w2c, session):
    """Generate a chunk for each four cameras `[N, 4, 4]`; latents `[1, C, N, Y, X]`."""
    noise = torch.Generator().manual_seed(0)
    history = torch.zeros(1, CHANNELS, 0, ROWS, COLUMNS)
    for start in range(0, len(w2c), CHUNK_LATENTS):
        past, new = w2c[:start], w2c[start : start + CHUNK_LATENTS]
        with session.chunk(
            poses=past if start else None,  # world to camera, OpenCV axes, metres
            query=new,
            latents=history[0].transpose(0, 1) if start else None,
        ) as chunk:
            keep, caches = chunk.context, None
            if keep:  # encode the latents worth reading only; all of them would undo the choice
                _, caches = model(history[:, :, keep], torch.zeros(1), w2c[None, keep])
            x = torch.randn(1, CHANNELS, len(new), ROWS, COLUMNS, generator=noise)
            for step in chunk.steps(SIGMAS):  # the steps worth computing
                velocity, _ = model(x, step.sigma, new[None], caches)
                x = x + (step.sigma_next - step.sigma) * velocity
        history = torch.cat([history, x], 2)  # grows: Dynamo makes its length dynamic by itself
    return history


def main(inner="inductor", walk="left-15, right-16"):
    """Walk out and back, dense and accelerated."""
    torch.manual_seed(0)
    model, w2c, seconds = World().eval(), parse_trajectory(walk), {}
    for name, options in (("dense", {"preset": "off"}), ("all", OPTIONS)):
        given = {**options, "inner": inner}
        compiled = torch.compile(model, backend="light_interaction", options=given)
        for _ in range(2):  # the first one compiles
            begin = time.perf_counter()
            with lipass.Session(**options) as session:  # tells at its end if nothing was left out
                roll_out(compiled, w2c, session)
            seconds[name] = time.perf_counter() - begin
    print(lipass.report().table(), f"\ndense {seconds['dense']:.2f} s, all {seconds['all']:.2f} s")


if __name__ == "__main__":
    main()
