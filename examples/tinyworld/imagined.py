"""Judge what a world imagines: is it one of the things that there are, sharp, and kept?

`python -m lipass.examples.tinyworld.imagined` lets a model roll out held-out rooms of the
catalogue freely, each with several lists of denoising steps, and asks a recogniser trained on the
renderer what hangs and stands where no given latent looked. Steps matter where more of them get
more answers. It prints one JSON document.
"""

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lipass.quality import loop_score, psnr_db, returns

from .catalogue import CATALOGUE_HELD_OUT_SEED, NAMES, PICTURES, THINGS, WALLPAPERS, choose
from .codec import Codec
from .model import TinyWorld, tokenize
from .recogniser import Recogniser, examined, recogniser_at, shares, slots
from .rollout import SIGMAS, roll_out
from .scenario import Scenario, make_scenario
from .train_batches import prompt_of
from .weights import SHIPPED, load

# Lists of noise levels by their number of steps; the demo's has four.
STEPS: dict[int, tuple[float, ...]] = {
    1: (1.0, 0.0),
    2: (1.0, SIGMAS[2], 0.0),
    4: SIGMAS,
    8: (1.0, 0.97, 0.9375, 0.89, 0.83333333, 0.74, 0.625, 0.4, 0.0),
}
# Cycles a frame at which bands end: what a ramp has, what edges have, and the finest.
BANDS = {"coarse": (1, 4), "middle": (4, 10), "fine": (10, 24)}

_PATH = "left/right"
# A place is unseen if no given view had this much of it, and judged from this much of a view on,
# where no other place of its kind could be meant.
_UNSEEN_SHARE, _JUDGED_SHARE, _OTHER_SHARE = 0.005, 0.02, 0.01
_SURE, _SURE_NOT = 0.9, 0.1
_WALL_SHARE = 0.15


def spectrum(frames: Tensor) -> Tensor:
    """Mean power of the brightness of frames `[F, 3, P, P]` by whole cycles a frame `[P / 2]`."""
    grey = frames.mean(1)
    side = grey.shape[-1]
    window = torch.hann_window(side, periodic=False).to(grey)
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window * window[:, None]
    power = torch.fft.fft2(grey).abs().square().mean(0)
    cycles = torch.fft.fftfreq(side, 1 / side).to(grey)
    radius = (cycles.square() + cycles[:, None].square()).sqrt().round().long()
    inside = radius < side // 2
    total = torch.zeros(side // 2).to(grey).index_add(0, radius[inside], power[inside])
    return total / torch.bincount(radius[inside], minlength=side // 2).to(grey)


def spectral_gap_db(frames: Tensor, truth: Tensor) -> dict[str, float]:
    """How far the power of frames lies above that of others, by band, in dB; blur is below."""
    gap = 10 * (spectrum(frames) / spectrum(truth).clamp_min(1e-12)).clamp_min(1e-12).log10()
    return {name: round(float(gap[a:b].mean()), 2) for name, (a, b) in BANDS.items()}


@dataclass(frozen=True)
class Answers:
    """What a recogniser says of places of one kind.

    `views` rows of place and answer: a name, "none", or None where it is not sure.
    """

    views: list[tuple[Any, str | None]]

    def figures(self) -> dict[str, float | int]:
        """Shares of sure answers, how many names there are, and how often a place keeps its own.

        `names` is two to the entropy of all names given: as many as the catalogue has where they
        are all as frequent. `kept` is the share of sure answers that are their place's most
        frequent one, over places that were asked for more than once.
        """
        count = max(1, len(self.views))
        given = Counter(said for _, said in self.views)
        named = {name: n for name, n in given.items() if name not in (None, "none")}
        total = sum(named.values())
        entropy = -sum(n / total * math.log2(n / total) for n in named.values())
        by_place: dict[Any, Counter] = {}
        for place, said in self.views:
            if said is not None:
                by_place.setdefault(place, Counter())[said] += 1
        often = [counts for counts in by_place.values() if counts.total() > 1]
        same = sum(counts.most_common(1)[0][1] for counts in often)
        return {
            "views": len(self.views),
            "named": round(total / count, 3),
            "none": round(given["none"] / count, 3),
            "unsure": round(given[None] / count, 3),
            "names": round(2**entropy, 2) if total else 0.0,
            "kept": round(same / max(1, sum(counts.total() for counts in often)), 3),
        }


def answers(
    probabilities: Tensor, places: Tensor, given: int, names: Sequence[str], room: int
) -> Answers:
    """Ask for one kind: `probabilities [F, names]` and the share of each place `[F, places]`.

    Places that the first `given` views show are left out.
    """
    columns = [NAMES.index(name) for name in names]
    unseen = places[:given].amax(0) < _UNSEEN_SHARE if given else torch.ones(places.shape[1]) > 0
    views: list[tuple[Any, str | None]] = []
    for frame in range(given, len(places)):
        seen = places[frame]
        place = int(seen.argmax())
        others = seen.clone()
        others[place] = 0
        if not unseen[place] or seen[place] < _JUDGED_SHARE or others.max() > _OTHER_SHARE:
            continue
        likely = probabilities[frame, columns]
        best = int(likely.argmax())
        said = names[best] if likely[best] >= _SURE else None
        if likely[best] <= _SURE_NOT:
            said = "none"
        views.append(((room, place), said))
    return Answers(views)


@dataclass(frozen=True)
class Film:
    """Frames `[F, 3, P, P]` of a scenario, generated or rendered."""

    scenario: Scenario
    frames: Tensor


@torch.no_grad()
def figures_of(films: list[Film], recogniser: Recogniser) -> dict[str, Any]:
    """Figures of films of the same scenarios: what is named, spectra, and what comes back."""
    said: dict[str, list] = {"pictures": [], "things": []}
    right, loops, made, truth = [], [], [], []
    for film in films:
        scene = film.scenario
        given, room = len(scene.given), scene.room.seed
        likely = recogniser(film.frames)
        walls, corners = slots(room, scene.w2c)
        said["pictures"] += answers(likely, walls, given, PICTURES, room).views
        said["things"] += answers(likely, corners, given, THINGS, room).views
        paper = choose(room).wallpaper
        shown = shares(room, scene.w2c)[given:, NAMES.index(paper)] > _WALL_SHARE
        best = likely[given:, : len(WALLPAPERS)].argmax(-1)[shown]
        right += (best == WALLPAPERS.index(paper)).tolist()
        loops.append(loop_score(film.frames, returns(scene.w2c, given)))
        made.append(film.frames[given:])
        truth.append(scene.truth[given:].cpu())
    known = [score for score in loops if score is not None]
    return {
        **{kind: Answers(views).figures() for kind, views in said.items()},
        "wallpaper_right": round(sum(right) / max(1, len(right)), 3),
        "spectrum_db": spectral_gap_db(torch.cat(made), torch.cat(truth)),
        "loop_score": round(sum(known) / len(known), 3) if known else None,
        "psnr_vs_truth_db": round(psnr_db(torch.cat(made), torch.cat(truth)), 2),
    }


@torch.no_grad()
def judge(
    model: TinyWorld, codec: Codec, recogniser: Recogniser, rooms: Sequence[int],
    steps: Sequence[int], progress: Callable[[int, int], None] = lambda steps, room: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Judge a model: figures of the renderer, of the codec, and of the model by steps."""
    device = codec.latent_mean.device
    scenes = [make_scenario(_PATH, "free", room, codec) for room in rooms]
    again = [codec.decode(codec.encode(scene.truth)).cpu() for scene in scenes]
    films = {
        "renderer": [Film(scene, scene.truth.cpu()) for scene in scenes],
        "codec": [Film(*pair) for pair in zip(scenes, again, strict=True)],
    }
    for count in steps:
        films[f"{count} steps"] = made = []
        for scene in scenes:
            text = model.text(tokenize(prompt_of(scene.attributes))[None].to(device))
            rolled = roll_out(
                model, text, scene.given, scene.w2c, scene.walls,
                seed=scene.room.seed, sigmas=STEPS[count],
            )  # fmt: skip
            made.append(Film(scene, codec.decode(rolled.latents).cpu()))
            progress(count, scene.room.seed)
    return {name: figures_of(shown, recogniser) for name, shown in films.items()}


def main(argv: list[str] | None = None) -> None:
    """Print the figures of some weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="small", help="of the weights: small or sampler")
    parser.add_argument("--folder", type=Path, default=SHIPPED, help="of weights and codec")
    parser.add_argument("--rooms", type=int, default=6, help="how many held-out rooms")
    parser.add_argument("--steps", type=int, nargs="+", choices=tuple(STEPS), default=[1, 2, 4])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--recogniser", type=Path, default=Path("build/tinyworld/recogniser.safetensors"),
        help="where it is, or is kept when it has been trained",
    )  # fmt: skip
    args = parser.parse_args(argv)
    model, codec = load(args.size, args.folder)
    device = torch.device(args.device)
    recogniser = recogniser_at(args.recogniser, load()[1].to(device))
    begin = time.perf_counter()
    seeds = range(CATALOGUE_HELD_OUT_SEED, CATALOGUE_HELD_OUT_SEED + args.rooms)
    found = judge(model.to(device), codec.to(device), recogniser, list(seeds), args.steps)
    document = {
        "weights": args.size,
        "shipped": args.folder == SHIPPED,
        "rooms": args.rooms,
        "path": _PATH,
        "recogniser": examined(recogniser, load()[1]),
        "figures": found,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
