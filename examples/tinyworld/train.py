"""Train a world of TinyWorld: all stages, one after the other, by themselves.

`python -m lipass.examples.tinyworld.train --model small` begins with nothing, `base`, `stream` and
`sampler` with the weights of `small`. It goes on where it was stopped, writes weights that
`weights.load` reads and a card beside them, and says how near to the renderer they come, or how
much of what the sampler imagines has a name.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from .codec import Codec
from .data import codec_at, frames_of, load, record
from .ranks import train_together
from .stream_walks import record_walks
from .train_batches import LatentWalks, latent_walks
from .train_codec import measure, refine_decoder, train_codec
from .train_models import TRAINERS, learn
from .train_progress import bar, log, write
from .train_recipes import RECIPES, Recipe, Sizes
from .train_scores import score
from .weights import SHIPPED
from .world import HELD_OUT_SEED

# The codec sees every third camera of some of the rooms.
_CODEC_ROOMS, _HELD_OUT_ROOMS, _EVERY = 400, 20, 3
_FIRST_WALK, _WALKS_A_LINE = 3000, 10
# Weights that a stage has not seen at all are no result of it, however little time is left.
_LEAST_S = 1.0
# Their optimizers begin anew: less time than this is little but their warm-up.
_FINISHING, _LEAST_FINISHING_S = ("unseen", "rollouts"), 20.0
_OF_THE_CODEC = ("codec", "decoder")


@dataclass(frozen=True)
class Training:
    """One training: what, where, how long, and what it begins with.

    Attributes:
        recipe: stages and sizes.
        out: folder of all that it makes.
        device: where it trains.
        seconds: of all stages together.
        processes: that train together on a CPU, and that draw walks.
        init: weights to begin with; None begins with nothing.
    """

    recipe: Recipe
    out: Path
    device: torch.device
    seconds: float
    processes: int
    init: Path | None

    @property
    def sizes(self) -> Sizes:
        """What a step takes here."""
        return self.recipe.on_cpu if self.device.type == "cpu" else self.recipe.on_gpu

    @property
    def shares(self) -> dict[str, float]:
        """Stages and their shares of the time.

        Weights that are given keep their codec, and are scored before they are trained.
        """
        shares = self.recipe.shares
        if self.init is None:
            return shares
        later = {name: share for name, share in shares.items() if name not in _OF_THE_CODEC}
        return {"before": shares["score"], **later}

    def run(self) -> dict[str, Any]:
        """Run all stages that are not done; returns the card."""
        self.out.mkdir(parents=True, exist_ok=True)
        if self.init is not None and not (self.out / "codec.safetensors").exists():
            beside = self.init.parent / "codec.safetensors"
            shutil.copy(beside if beside.exists() else SHIPPED / beside.name, self.out)
        done = self.done()
        stages = self._stages()
        for name, share in self.shares.items():
            if name in done:
                continue
            # What earlier stages took too long is taken from all that follow.
            left = self.seconds - sum(done.values())
            later = {key: value for key, value in self.shares.items() if key not in done}
            if too_short := self._too_short(left, later):
                log(f"left out, as little time is left: {', '.join(too_short)}")
                done.update(dict.fromkeys(too_short, 0.0))
            if name in too_short:
                continue
            whole = sum(value for key, value in later.items() if key not in too_short)
            seconds = max(_LEAST_S, left * share / whole)
            if name == "score":
                self._card(done)  # scores take time too, in which it may be stopped
            begin = time.monotonic()
            stages[name](seconds)
            at_once = name in ("before", "rooms", "walks", "score")
            done[name] = max(time.monotonic() - begin, 0.0 if at_once else seconds)
            write(self.out / "done.json", done)
        return self._card(done)

    @staticmethod
    def _too_short(left: float, shares: dict[str, float]) -> list[str]:
        """Name stages of `shares` for which too little of the time that is left would remain."""
        second = max(0.0, left) / sum(shares.values())
        return [
            name for name, share in shares.items()
            if name in _FINISHING and share * second < _LEAST_FINISHING_S
        ]  # fmt: skip

    def done(self) -> dict[str, float]:
        """Seconds of each stage that is done."""
        return self._written("done")

    def _stages(self) -> dict[str, Callable[[float], None]]:
        learned = {name: partial(self._learn, name) for name in TRAINERS}
        return {"codec": self._codec, "rooms": self._rooms, "decoder": self._decoder,
                "walks": self._walks, "before": self._before, "score": self._score,
                **learned}  # fmt: skip

    @property
    def _encoder(self) -> Path:
        """The codec whose latents the model is trained on; its decoder may be refined later."""
        first = self.out / "codec-first.safetensors"
        return first if first.exists() else self.out / "codec.safetensors"

    def _frames(self, held_out: bool) -> torch.Tensor:
        path = self.out / f"frames-{'held-out' if held_out else 'codec'}.pt"
        if not path.exists():
            first, count = (HELD_OUT_SEED, _HELD_OUT_ROOMS) if held_out else (0, _CODEC_ROOMS)
            seeds = range(first, first + min(count, self.recipe.rooms))
            made = frames_of(seeds, self.recipe.pixels, _EVERY, self.device, self.processes)
            partial_ = path.with_suffix(".partial")
            torch.save(made, partial_)
            partial_.rename(path)
        return torch.load(path)

    def _codec(self, seconds: float) -> None:
        torch.manual_seed(0)
        codec = Codec().to(self.device)
        held_out = self._frames(held_out=True)
        train_codec(
            codec, self._frames(held_out=False), held_out, seconds, self.out / "codec.checkpoint",
            lambda step, done, db: bar("codec", done, f"step {step}, held out {db:.2f} dB"),
        )  # fmt: skip
        save_file(codec.state_dict(), self.out / "codec-first.safetensors")

    def _decoder(self, seconds: float) -> None:
        codec = Codec().to(self.device)
        codec.load_state_dict(load_file(self._encoder))
        held_out = self._frames(held_out=True)
        refine_decoder(
            codec, self._frames(held_out=False), held_out, seconds,
            self.out / "decoder.checkpoint",
            lambda step, done, db: bar("decoder", done, f"step {step}, held out {db:.2f} dB"),
        )  # fmt: skip
        write(self.out / "codec.json", {"held_out_db": round(measure(codec, held_out), 2)})
        save_file(codec.state_dict(), self.out / "codec.safetensors")

    def _rooms(self, seconds: float) -> None:
        first, rooms, pixels = self.recipe.first_room, self.recipe.rooms, self.recipe.pixels
        sizes = (pixels,) if self.init else (pixels, pixels // 2)
        record(
            range(first, first + rooms), self.out / "rooms", self._encoder, sizes, self.device,
            self.processes, seconds,
            lambda count: bar("rooms", count / rooms, f"{count} of at most {rooms}"),
        )  # fmt: skip

    def _walks(self, seconds: float) -> None:
        most = self.recipe.rooms

        def progress(count: int) -> None:
            if count % _WALKS_A_LINE == 0 or count == most:
                bar("walks", count / most, f"{count} of at most {most}")

        codec = codec_at(self._encoder).to(self.device)
        seeds = range(_FIRST_WALK, _FIRST_WALK + most)
        record_walks(seeds, self.out / "walks", codec, seconds, progress)

    def _learn(self, stage: str, seconds: float) -> None:
        if self.device.type == "cpu":
            train_together(learn, self, stage, seconds)
        else:
            learn(0, self, stage, seconds)
        average = load_file(self.out / f"{stage}-average.safetensors")
        halves = {name: weight.half() for name, weight in average.items()}
        # What is there at any time is the latest; the score is that of these halves.
        partial_ = self.out / f"{self.recipe.model}.partial"
        save_file(halves, partial_)
        partial_.rename(self.out / f"{self.recipe.model}.safetensors")

    def latest(self, stage: str) -> Path | None:
        """Weights that a stage begins with: those of the one before it, or the given ones."""
        before = list(self.shares)[: list(self.shares).index(stage)]
        made = [self.out / f"{name}-average.safetensors" for name in before if name in TRAINERS]
        there = [path for path in made if path.exists()]
        return there[-1] if there else self.init

    def walks(self, pixels: int) -> LatentWalks:
        """Load what was recorded of rooms in a size."""
        return latent_walks(load(self.out / "rooms", pixels))

    def _before(self, seconds: float) -> None:
        assert self.init is not None
        write(self.out / "before.json", self._scores(self.init, "before: "))

    def _score(self, seconds: float) -> None:
        weights = self.out / f"{self.recipe.model}.safetensors"
        write(self.out / "scores.json", self._scores(weights, ""))

    def _scores(self, weights: Path, when: str) -> dict[str, float]:
        return score(
            self.recipe, weights, self.out, self.device,
            lambda kind, value: log(f"{when}{kind}: {value:.2f} {self.recipe.score}"),
        )  # fmt: skip

    def _card(self, done: dict[str, float]) -> dict[str, Any]:
        """Say what came out, and of what; weights without a score have not reached the goal."""
        name, (kind, wanted) = self.recipe.model, self.recipe.goal
        scores, before = self._written("scores"), self._written("before")
        curves = {
            stage: json.loads(path.read_text())
            for stage in done
            if (path := self.out / f"{stage}-curve.json").exists()
        }
        card = {
            "model": name,
            "device": _name(self.device),
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "begun_with": None if self.init is None else self.init.name,
            "stages_s": {stage: round(seconds, 1) for stage, seconds in done.items()},
            "steps": {stage: curve["steps"] for stage, curve in curves.items()},
            "recorded": self._recorded(),
            **self._written("codec"),
            self.recipe.scores: scores,
            "goal": {kind: wanted},
            **({"before": before} if before else {}),
            # What was as good before it was trained has reached nothing.
            "reached": bool(scores)
            and scores[kind] >= wanted
            and scores[kind] > before.get(kind, -math.inf),
            "loss": {stage: curve["loss"] for stage, curve in curves.items()},
        }
        write(self.out / f"{name}.json", card)
        told = "not scored yet"
        if scores:
            told = f"{kind} {scores[kind]:.2f} {self.recipe.score}, goal {wanted:g}: "
            told += "reached" if card["reached"] else "not reached"
        log(f"{name}: {told}; {self.out}/{name}.safetensors")
        return card

    def _written(self, name: str) -> dict[str, Any]:
        """What a stage has written down, or nothing."""
        path = self.out / f"{name}.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        return found

    def _recorded(self) -> int:
        if (walks := self.out / "walks").exists():
            return len(list(walks.glob("*.pt")))
        blocks = (self.out / "rooms").glob("*.pt")
        return sum(len(torch.load(path, mmap=True)["w2c"]) for path in blocks)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def main(argv: list[str] | None = None) -> None:
    """Run or resume a training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=tuple(RECIPES), default="small")
    parser.add_argument("--seconds", type=float, help="of all stages together")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, help="default: build/tinyworld/MODEL")
    parser.add_argument(
        "--init", type=Path, help="weights to begin with; those of small for the other models"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.model]
    init = args.init
    if init is None and args.model != "small":
        init = SHIPPED / "small.safetensors"
    Training(
        recipe, args.out or Path("build/tinyworld") / args.model, torch.device(args.device),
        args.seconds or recipe.seconds, args.processes, init,
    ).run()  # fmt: skip


if __name__ == "__main__":
    main()
