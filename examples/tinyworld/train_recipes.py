"""What each model is trained with: sizes, stages and their shares of the time, and its goal."""

from dataclasses import dataclass, field

from .catalogue import CATALOGUE_HELD_OUT_SEED, CATALOGUE_SEED
from .model import BASE, SMALL, ModelConfig
from .train_rollouts import RolloutOptions
from .train_sampler import SamplerOptions
from .train_stream import StreamOptions
from .train_unseen import UnseenOptions
from .train_world import Phase, Walks


@dataclass(frozen=True)
class Sizes:
    """What a step takes; more on a GPU, which is not busy with less."""

    batch: int
    unseen: UnseenOptions = field(default_factory=UnseenOptions)
    rollouts: RolloutOptions = field(default_factory=RolloutOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    sampler: SamplerOptions = field(default_factory=SamplerOptions)


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Attributes:
        model: its name, and that of its weights.
        config: sizes of the transformer.
        pixels: of a frame.
        rooms: how many rooms, or long walks, are recorded at most.
        shares: stages in their order, with their shares of the time.
        seconds: time in all that is suggested on a CPU.
        on_cpu: what a step takes there.
        on_gpu: what it takes on a GPU.
        scored: held-out rooms, and regimes, or numbers of chunks of the streaming model, or of
            steps of the sampler.
        goal: which score is to be reached, and how much of it.
        score: what scores are.
        first_room: seed of the first room that is recorded.
    """

    model: str
    config: ModelConfig
    pixels: int
    rooms: int
    shares: dict[str, float]
    seconds: float
    on_cpu: Sizes
    on_gpu: Sizes
    scored: tuple[tuple[int, ...], tuple[str | int, ...]]
    goal: tuple[str, float]
    score: str = "dB to the renderer"
    first_room: int = 0

    @property
    def scores(self) -> str:
        """What a card calls the scores."""
        return self.score.lower().replace(" ", "_")


RECIPES = {
    "small": Recipe(
        "small", SMALL, 64, 1000,
        {"codec": 0.04, "rooms": 0.12, "world": 0.50, "decoder": 0.02, "unseen": 0.15,
         "rollouts": 0.15, "score": 0.02},
        20_000, Sizes(6),
        Sizes(64, UnseenOptions(contexts=48, anchors=16), RolloutOptions(lanes=48, anchors=16)),
        ((9001, 9002), ("explored", "free")), ("explored", 30.0),
    ),
    "base": Recipe(
        "base", BASE, 128, 1000,
        {"rooms": 0.17, "world": 0.60, "unseen": 0.09, "rollouts": 0.09, "score": 0.05},
        40_000,
        Sizes(2, UnseenOptions(contexts=2, anchors=1), RolloutOptions(lanes=2, anchors=1)),
        Sizes(16, UnseenOptions(contexts=12, anchors=4), RolloutOptions(lanes=12, anchors=4)),
        ((9001,), ("explored",)), ("explored", 30.0),
    ),
    "stream": Recipe(
        "stream", SMALL, 64, 150,
        {"walks": 0.10, "stream": 0.85, "score": 0.05},
        12_000, Sizes(1),
        Sizes(8, stream=StreamOptions(batch=8, chunks=(6, 8, 12, 12, 16), own_chunks=(8, 12, 16))),
        ((9001,), (16, 64)), ("64 chunks", 28.0),
    ),
    "sampler": Recipe(
        "sampler", SMALL, 64, 1000,
        {"rooms": 0.15, "sampler": 0.75, "score": 0.10},
        12_000, Sizes(1),
        Sizes(1, sampler=SamplerOptions(contexts=32, anchors=8, average_steps=200)),
        (tuple(range(CATALOGUE_HELD_OUT_SEED, CATALOGUE_HELD_OUT_SEED + 6)), (1, 4)),
        ("4 steps", 0.7), "share of pictures named", CATALOGUE_SEED,
    ),
}  # fmt: skip


def phases(coarse: Walks, fine: Walks, batch: int) -> list[Phase]:
    """Return the curriculum from nothing: half the pixels, then all, then own rollouts."""
    return [
        Phase(0.15, coarse, 4 * batch, targets=3, context_latents=(8,), share_own=0.0),
        Phase(0.5, fine, batch, targets=3, context_latents=(8,), share_own=0.0),
        *finishing_phases(fine, batch, 0.5),
    ]


def finishing_phases(fine: Walks, batch: int, start: float = 0.0) -> list[Phase]:
    """Return the curriculum of weights that can already see; it begins at share `start`."""
    middle = start + 0.3 * (1 - start)
    return [
        Phase(middle, fine, batch, targets=3, context_latents=(8, 8, 12), share_own=0.0),
        Phase(2.0, fine, batch, targets=2, context_latents=(4, 8, 12, 20), share_own=0.5),
    ]
