"""Train the streaming model from weights of the first one.

All chunks of a recorded walk pass in one forward (`stream_parallel`), noisy versions of some of
them beside the clean ones. In the second part of the time the clean chunks of half of the steps
are the model's own, from rollouts that it makes meanwhile, while what it is asked for stays
recorded: so it learns not to pass its own errors on. In a fixed share of the recorded stretches
the prompt changes at a chunk, and what is kept of those in front was made under another one.
"""

import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .camera import view_similarity
from .learner import Learner, Pace, normal, products_in_tf32, uniform
from .model import CHUNK_LATENTS
from .stream import StreamWorld
from .stream_parallel import chunks_of, forward_all
from .stream_rollout import GrownCache, stream
from .stream_walks import LongWalk
from .train_batches import CHANGE_SHARE, CONTEXT_NOISE
from .train_world import SIGMA_MIN, SIGMA_SHIFT


@dataclass(frozen=True)
class StreamOptions:
    """Sizes and rates.

    A step takes one of `chunks` chunks of `batch` walks with up to `targets` noisy ones: in the
    order of time, or (`recall_share`) those that look much the same way in any order, or
    (`back_share`) some and the way back over them. From share `own_from` of the time on,
    `own_share` of the steps take a rollout from a pool of `pool`, of which one is replaced every
    `own_every` steps. `told_share` of the walks are told the bare walls.
    """

    batch: int = 1
    chunks: tuple[int, ...] = (4, 6, 6, 8, 8, 12)
    targets: int = 8
    recall_share: float = 0.4
    back_share: float = 0.3
    told_share: float = 0.25
    own_from: float = 0.25
    own_share: float = 0.5
    own_every: int = 4
    own_chunks: tuple[int, ...] = (6, 8, 8, 12)
    pool: int = 16
    peak_rate: float = 1.2e-3
    average_steps: int = 120


Kind = Callable[[LongWalk, int, random.Random], list[int]]


@dataclass
class Stretch:
    """A stretch of a walk, batched.

    `history` and `recorded [B, C, 4N, Y, X]` differ from chunk `first_own` on, where the history
    is the model's own. `walls` are zeros in walks that the model is not told of. `tokens
    [B, TEXT_TOKENS]` is the prompt from chunk `changed_at` on, `earlier_tokens` that in front.
    """

    history: Tensor
    recorded: Tensor
    w2c: Tensor
    tokens: Tensor
    walls: Tensor
    first_own: int
    earlier_tokens: Tensor
    changed_at: int = 0


def stretch_of(
    walks: list[LongWalk],
    frames: list[list[int]],
    told: list[bool],
    device: torch.device,
    changed_at: int = 0,
) -> Stretch:
    """Take as many latents of each walk, in any order that keeps chunks together.

    Those in front of chunk `changed_at` are taken under the other prompt of their walk.
    """
    rows, cut = list(zip(walks, frames, strict=True)), changed_at * CHUNK_LATENTS
    taken, earlier = [], []
    for w, f in rows:
        other = w.latents if w.other_latents is None else w.other_latents
        taken.append(torch.cat([other[f[:cut]], w.latents[f[cut:]]]))
        earlier.append(w.tokens if w.other_tokens is None else w.other_tokens)
    latents = torch.stack([shown.float().transpose(0, 1) for shown in taken])
    walls = torch.stack([w.walls[f].float().transpose(0, 1) for w, f in rows])
    walls = walls * torch.tensor(told)[:, None, None, None, None]
    latents = latents.to(device)
    return Stretch(
        latents,
        latents,
        torch.stack([w.w2c[f] for w, f in rows]).to(device),
        torch.stack([w.tokens for w in walks]).to(device),
        walls.to(device),
        len(frames[0]) // CHUNK_LATENTS,
        torch.stack(earlier).to(device),
        changed_at,
    )


def in_time(walk: LongWalk, chunks: int, draw: random.Random) -> list[int]:
    """Draw successive latents."""
    first = draw.randrange(len(walk.w2c) - chunks * CHUNK_LATENTS + 1)
    return list(range(first, first + chunks * CHUNK_LATENTS))


def there_and_back(walk: LongWalk, chunks: int, draw: random.Random) -> list[int]:
    """Draw successive latents and the way back over them."""
    out = in_time(walk, chunks // 2, draw)
    return out + out[::-1]


def alike(walk: LongWalk, chunks: int, draw: random.Random) -> list[int]:
    """Draw chunks that look much the way that one of them does, in any order.

    In the order of time the chunk before tells most; here memory has to.
    """
    offset = draw.randrange(CHUNK_LATENTS)
    starts = list(range(offset, len(walk.w2c) - CHUNK_LATENTS + 1, CHUNK_LATENTS))
    middle = walk.w2c[[start + CHUNK_LATENTS // 2 for start in starts]]
    focus = middle[draw.randrange(len(middle))][None]
    weight = view_similarity(focus, middle)[0] + 0.05
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    chosen = torch.multinomial(weight, min(chunks, len(starts)), generator=generator).tolist()
    draw.shuffle(chosen)
    return [starts[c] + i for c in chosen for i in range(CHUNK_LATENTS)]


def stream_loss(
    model: StreamWorld, stretch: Stretch, targets: list[int], generator: torch.Generator
) -> Tensor:
    """Velocity loss of some chunks of a stretch, behind history of a little noise."""
    # What lies behind the last target is nobody's history.
    history = stretch.history[:, :, : max(targets) * CHUNK_LATENTS]
    clean = chunks_of(stretch.recorded, targets, 2)
    b, j, device = len(clean), len(targets), clean.device
    # Half of the histories are clean, as they are when the model runs.
    noisiness = CONTEXT_NOISE * (2 * uniform((b,), generator, device) - 1).clamp_min(0)
    # One level of each part of the range: the few at little noise weigh most.
    parts = uniform((b, j), generator, device).argsort(1)
    level = (parts + uniform((b, j), generator, device)) / j
    sigma = SIGMA_SHIFT * level / (1 + (SIGMA_SHIFT - 1) * level)
    sigma = sigma.clamp_min(SIGMA_MIN).repeat_interleave(CHUNK_LATENTS, 1)
    noisiness = noisiness[:, None].expand(-1, history.shape[2])
    noise, grain = (normal(x.shape, generator, device) for x in (clean, history))
    s, n = sigma[:, None, :, None, None], noisiness[:, None, :, None, None]
    earlier = model.text(stretch.earlier_tokens) if stretch.changed_at else None
    velocity, _ = forward_all(
        model, history + n * grain, noisiness, stretch.w2c, model.text(stretch.tokens),
        stretch.walls, (1 - s) * clean + s * noise, sigma, tuple(targets), earlier,
        stretch.changed_at,
    )  # fmt: skip
    return (velocity - (noise - clean)).square().mean()


class StreamTrainer(Learner):
    """Trains under a wall-clock budget; its state can be saved and resumed.

    On a GPU it multiplies in TF32: cameras in the frame of the world need more digits than bf16
    has.
    """

    def __init__(self, model: StreamWorld, options: StreamOptions = StreamOptions()) -> None:
        super().__init__(model, Pace(options.peak_rate, 12, 1 / 4, options.average_steps))
        self.options = options
        self.pool: deque[Stretch] = deque(maxlen=options.pool)

    def run(
        self,
        walks: list[LongWalk],
        seconds: float,
        progress: Callable[["StreamTrainer"], None],
        checkpoint_s: float = 180,
    ) -> None:
        """Train until `seconds` of training time have passed over all runs."""
        with products_in_tf32(self.device):
            self._run(walks, seconds, progress, checkpoint_s)

    def _run(
        self,
        walks: list[LongWalk],
        seconds: float,
        progress: Callable[["StreamTrainer"], None],
        checkpoint_s: float,
    ) -> None:
        options, saved = self.options, time.perf_counter()
        while self.elapsed_s < seconds:
            begin = time.perf_counter()
            draw = random.Random(self.step)
            self.generator.manual_seed(self.step)
            own = self.elapsed_s / seconds > options.own_from
            if own and (len(self.pool) < 4 or self.step % options.own_every == 0):
                self.pool.append(self.rollout(walks, draw))
            if own and draw.random() < options.own_share:
                stretch = draw.choice(self.pool)
                possible = range(stretch.first_own, stretch.recorded.shape[2] // CHUNK_LATENTS)
            else:
                kind = draw.choices((alike, there_and_back, in_time), self._shares)[0]
                told = [draw.random() < options.told_share for _ in range(options.batch)]
                chunks = draw.choice(options.chunks)
                change = draw.random() < CHANGE_SHARE
                stretch = self.stretch(walks, draw, chunks, kind, told, change)
                possible = range(1, stretch.recorded.shape[2] // CHUNK_LATENTS)
            targets = sorted(draw.sample(possible, min(options.targets, len(possible))))
            loss = stream_loss(self.model, stretch, targets, self.generator)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            self.update(1 - self.elapsed_s / seconds)
            self.elapsed_s += time.perf_counter() - begin
            self.losses.append((self.elapsed_s, loss.detach()))
            if time.perf_counter() - saved > checkpoint_s or self.elapsed_s >= seconds:
                saved = time.perf_counter()
                self.settle()
                progress(self)

    @property
    def _shares(self) -> tuple[float, float, float]:
        recall, back = self.options.recall_share, self.options.back_share
        return recall, back, 1 - recall - back

    def stretch(
        self,
        walks: list[LongWalk],
        draw: random.Random,
        chunks: int,
        kind: Kind,
        told: list[bool],
        change: bool = False,
    ) -> Stretch:
        """Draw as many stretches of recorded walks as `told` has entries.

        With `change` the prompt changes at one of the chunks, if all were recorded under two.
        """
        drawn = [draw.choice(walks) for _ in told]
        frames = [kind(walk, chunks, draw) for walk in drawn]
        changed_at = 0
        if change and all(walk.other_tokens is not None for walk in drawn):
            changed_at = draw.randrange(1, len(frames[0]) // CHUNK_LATENTS)
        return stretch_of(drawn, frames, told, self.device, changed_at)

    def rollout(self, walks: list[LongWalk], draw: random.Random) -> Stretch:
        """Let the model find the way back, or go on from the first chunk where it is told."""
        chunks = draw.choice(self.options.own_chunks)
        told = draw.random() < self.options.told_share
        stretch = self.stretch(walks, draw, chunks, there_and_back, [told] * self.options.batch)
        stretch.first_own = 1 if told else chunks // 2
        given = stretch.recorded[:, :, : stretch.first_own * CHUNK_LATENTS]
        with torch.no_grad():
            text = self.model.text(stretch.tokens)
        stretch.history = stream(
            self.model, text, given, stretch.w2c, stretch.walls, seed=self.step, cache=GrownCache()
        )
        return stretch
