"""Try what could make TinyWorld sample, on a problem small enough for a core and two minutes each.

    python -m benchmarks.sampler_trials

One view of a room of the catalogue is to be imagined from its bare walls alone: what is papered,
hung and placed there is one of a few things. The same small transformer is trained on latents with
each loss for the same CPU time, then draws views in one to eight steps, and the recogniser of
`lipass.examples.tinyworld.recogniser` says of how many it is sure. One JSON row a loss and number
of steps, and one for the renderer through the codec.

    median   absolute error of the clean latents, as TinyWorld's last stages ask for
    mean     squared error of the clean latents at all levels: flow matching
    energy   energy distance of two drawn predictions: each is a sample, whatever the steps
    codes    a learned codebook of tokens, revealed where the network is most certain
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lipass.examples.tinyworld.catalogue import (
    CATALOGUE_HELD_OUT_SEED,
    CATALOGUE_SEED,
    PICTURES,
    THINGS,
)
from lipass.examples.tinyworld.codec import Codec
from lipass.examples.tinyworld.data import draw as draw_walk
from lipass.examples.tinyworld.data import load as load_rooms
from lipass.examples.tinyworld.data import record, recorded
from lipass.examples.tinyworld.imagined import STEPS, answers, spectral_gap_db
from lipass.examples.tinyworld.recogniser import Recogniser, recogniser_at, slots
from lipass.examples.tinyworld.weights import CODEC, load

LOSSES = ("median", "mean", "energy", "codes")
CODES = 512
_WIDTH, _BLOCKS, _BATCH, _RATE = 128, 4, 32, 2e-3
_CHANNELS, _TOKENS = 16, 64
_DRAWN = 4


class Block(nn.Module):
    """Attention among 64 tokens, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.first, self.second = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, 64, width]` to itself."""
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.proj(seen)
        return x + self.down(F.gelu(self.up(self.second(x))))


class View(nn.Module):
    """Map `x [B, inputs, 8, 8]`, a level `[B]` and walls to `[B, outputs, 8, 8]`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.embed = nn.Linear(inputs + _CHANNELS, _WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(_TOKENS, _WIDTH))
        self.level = nn.Sequential(nn.Linear(16, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, _WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(_BLOCKS)))
        self.head = nn.Sequential(nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, outputs))

    def forward(self, x: Tensor, level: Tensor, walls: Tensor) -> Tensor:
        """Predict."""
        angles = level[:, None] * torch.exp2(torch.arange(8.0))
        told = self.level(torch.cat([angles.sin(), angles.cos()], -1))
        tokens = torch.cat([x, walls], 1).flatten(2).mT
        out = self.head(self.blocks(self.embed(tokens) + self.places + told[:, None]))
        return out.mT.unflatten(2, (8, 8))


def levels(count: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels `[count]` as the sampler meets them, often the first one."""
    level = torch.rand(count, generator=generator)
    level = 5 * level / (1 + 4 * level)
    return torch.where(torch.rand(count, generator=generator) < 0.15, 1.0, level.clamp_min(0.3))


class Trial:
    """One loss: `step` gives a loss of latents and walls, `sample` draws latents in steps."""

    def __init__(self, loss: str, latents: Tensor) -> None:
        self.loss, self.generator = loss, torch.Generator().manual_seed(0)
        extra = _CHANNELS if loss == "energy" else 0
        self.codebook = codebook(latents, self.generator) if loss == "codes" else None
        self.model = View(
            _CHANNELS + (1 if loss == "codes" else extra), CODES if loss == "codes" else _CHANNELS
        )
        self.parameters = list(self.model.parameters())

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def _clean(self, x: Tensor, level: Tensor, walls: Tensor) -> Tensor:
        if self.loss == "energy":
            x = torch.cat([x, self._noise(*x.shape)], 1)
        return self.model(x, level, walls)

    def step(self, y: Tensor, walls: Tensor) -> Tensor:
        """Loss of clean latents `y [B, 16, 8, 8]`."""
        if self.codebook is not None:
            return self._masked(y, walls)
        level = levels(len(y), self.generator)
        s = level[:, None, None, None]
        x = (1 - s) * y + s * self._noise(*y.shape)
        made = self._clean(x, level, walls)
        if self.loss == "median":
            return (made - y).abs().mean()
        if self.loss == "energy":
            other = self._clean(x, level, walls)
            near = (made - y).flatten(1).norm(dim=1) + (other - y).flatten(1).norm(dim=1)
            return (near - (made - other).flatten(1).norm(dim=1)).mean() / 32
        return ((made - y).square().mean((1, 2, 3)) / level).mean()

    def _masked(self, y: Tensor, walls: Tensor) -> Tensor:
        codes = self._codes(y)
        share = torch.cos(torch.rand(len(y), generator=self.generator) * torch.pi / 2)
        hidden = torch.rand(codes.shape, generator=self.generator) < share[:, None]
        logits = self.model(*self._shown(codes, hidden), walls).flatten(2)
        return F.cross_entropy(logits, codes, reduction="none")[hidden].mean()

    def _codes(self, y: Tensor) -> Tensor:
        assert self.codebook is not None
        return torch.cdist(y.flatten(2).mT, self.codebook[None]).argmin(-1)

    def _shown(self, codes: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        assert self.codebook is not None
        tokens = self.codebook[codes] * ~hidden[..., None]
        x = torch.cat([tokens, hidden[..., None].float()], -1)
        return x.mT.unflatten(2, (8, 8)), hidden.float().mean(1)

    @torch.no_grad()
    def sample(self, walls: Tensor, sigmas: tuple[float, ...]) -> Tensor:
        """Draw latents `[B, 16, 8, 8]`."""
        if self.codebook is not None:
            return self._reveal(walls, len(sigmas) - 1)
        x = self._noise(len(walls), _CHANNELS, 8, 8)
        for sigma, after in itertools.pairwise(sigmas):
            clean = self._clean(x, torch.full((len(x),), sigma), walls)
            x = x + (after - sigma) * (x - clean) / sigma
        return x

    def _reveal(self, walls: Tensor, steps: int) -> Tensor:
        assert self.codebook is not None
        codes = torch.zeros(len(walls), _TOKENS, dtype=torch.long)
        hidden = torch.ones_like(codes, dtype=torch.bool)
        for step in range(1, steps + 1):
            logits = self.model(*self._shown(codes, hidden), walls).flatten(2).mT
            draw = torch.rand(logits.shape, generator=self.generator)
            drawn = (logits - torch.log(-torch.log(draw))).argmax(-1)
            sure = logits.log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
            codes = torch.where(hidden, drawn, codes)
            # The most certain are kept, with a little chance, so that views differ.
            chance = torch.rand(sure.shape, generator=self.generator)
            sure = sure - 2 * (1 - step / steps) * torch.log(-torch.log(chance))
            left = int(_TOKENS * torch.cos(torch.tensor(step / steps * torch.pi / 2)))
            sure = sure.masked_fill(~hidden, torch.inf)
            hidden = torch.zeros_like(hidden)
            if step < steps:
                hidden.scatter_(1, sure.topk(max(1, left), largest=False).indices, True)
        return self.codebook[codes].mT.unflatten(2, (8, 8))


def codebook(latents: Tensor, generator: torch.Generator, rounds: int = 12) -> Tensor:
    """Find `CODES` centres `[CODES, 16]` of tokens by k-means."""
    tokens = latents.flatten(2).mT.flatten(0, 1)
    tokens = tokens[torch.randperm(len(tokens), generator=generator)[:20_000]]
    centres = tokens[:CODES].clone()
    for _ in range(rounds):
        nearest = torch.cdist(tokens, centres).argmin(-1)
        count = torch.bincount(nearest, minlength=CODES)[:, None]
        mean = torch.zeros_like(centres).index_add(0, nearest, tokens) / count.clamp_min(1)
        centres = torch.where(count > 0, mean, centres)
    return centres


def train(trial: Trial, latents: Tensor, walls: Tensor, seconds: float) -> int:
    """Train for CPU seconds; returns the steps that were taken."""
    optimizer = torch.optim.AdamW(trial.parameters, _RATE, betas=(0.9, 0.98))
    begin, step = time.process_time(), 0
    while (done := (time.process_time() - begin) / seconds) < 1:
        rate = _RATE * min(1.0, (step + 1) / 50) * max(0.02, 1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(latents), (_BATCH,), generator=trial.generator)
        loss = trial.step(latents[rows].float(), walls[rows].float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trial.parameters, 1.0)
        optimizer.step()
        step += 1
    return step


def row_of(latents: Tensor, truth: Tensor, places: tuple, codec: Codec, who: Recogniser) -> dict:
    """Figures of drawn latents of held-out views."""
    frames = torch.cat([codec.decode(part) for part in latents.split(200)])
    wanted = torch.cat([codec.decode(part) for part in truth.split(200)])
    likely = torch.cat([who(part) for part in frames.split(200)])
    figures = {}
    for kind, seen, names in zip(("pictures", "things"), places, (PICTURES, THINGS), strict=True):
        figures[kind] = answers(likely, seen, 0, names, 0).figures()
        # Views are drawn one by one: nothing is to be kept.
        del figures[kind]["kept"]
    return {
        **figures,
        "spectrum_db": spectral_gap_db(frames, wanted),
    }


def main(argv: list[str] | None = None) -> None:
    """Train and judge all losses."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="of CPU time a loss")
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--rooms", type=int, default=60, help="that are recorded and trained on")
    parser.add_argument("--held-out", type=int, default=16, help="rooms that are drawn views of")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/tinyworld"), help="of rooms and recogniser"
    )
    args = parser.parse_args(argv)
    _, codec = load()
    who = recogniser_at(args.folder / "recogniser.safetensors", codec)
    folder, seeds = args.folder / "catalogue", range(CATALOGUE_SEED, CATALOGUE_SEED + args.rooms)
    record(seeds, folder, CODEC, (64,), torch.device("cpu"), 1, math.inf, lambda count: None)
    rooms = load_rooms(folder, 64)["latents"]
    latents, walls = rooms[:, 0].flatten(0, 1), rooms[:, -1].flatten(0, 1)
    views = []
    seeds = range(CATALOGUE_HELD_OUT_SEED, CATALOGUE_HELD_OUT_SEED + args.held_out)
    for seed in seeds:
        walk = draw_walk(seed)
        of = recorded(walk, codec, (64,))["64"][:, ::_DRAWN].float()
        views.append((of[0], of[-1], *slots(seed, walk.w2c[::_DRAWN])))
    truth, bare, pictures, corners = (torch.cat(column) for column in zip(*views, strict=True))
    shown = (truth, (pictures, corners), codec, who)
    with torch.no_grad():
        print(json.dumps({"loss": "the renderer, through the codec",
                          **row_of(truth, *shown)}), flush=True)  # fmt: skip
    for loss in args.losses:
        torch.manual_seed(0)
        trial = Trial(loss, latents.float()[::7])
        steps = train(trial, latents, walls, args.seconds)
        print(f"{loss}: {steps} steps", file=sys.stderr, flush=True)
        for count, sigmas in STEPS.items():
            with torch.no_grad():
                made = row_of(trial.sample(bare, sigmas), *shown)
            print(json.dumps({"loss": loss, "trained_steps": steps, "rooms": len(rooms),
                              "steps": count, **made}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
