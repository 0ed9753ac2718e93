"""Train TinyWorld from nothing: render rooms, train the codec, train the model.

`python -m lipass.examples.tinyworld.train --seconds 6000` does all of it under `build/tinyworld`,
resumes where it stopped and writes weights that `weights.load` reads.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from .codec import Codec
from .data import VIEWS, load_recordings, record_rooms
from .model import BASE, SMALL, TinyWorld
from .ranks import train_together
from .train_batches import LatentWalks, latent_walks
from .train_codec import measure, refine_decoder, train_codec
from .train_world import Phase, Trainer, Walks
from .world import HELD_OUT_SEED

ROOMS = 1000
HELD_OUT_ROOMS = 20
_CODEC_SHARE, _WORLD_SHARE = 0.05, 0.9
_RATE, _FINISHING_RATE = 2e-3, 1.2e-3


def _log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _bar(label: str, done: float, text: str) -> None:
    filled = int(30 * min(1.0, done))
    _log(f"{label:8s} [{'#' * filled}{'.' * (30 - filled)}] {100 * done:5.1f} %  {text}")


def _rooms(folder: Path, seeds: range) -> list:
    count = len(seeds)

    def progress(seed: int) -> None:
        if (seed - seeds.start) % 50 == 0:
            _bar("rooms", (seed - seeds.start + 1) / count, f"{seed - seeds.start + 1} of {count}")

    record_rooms(seeds, folder, os.cpu_count() or 1, progress)
    return load_recordings(folder, seeds)


def _frames(recordings: list, every: int) -> Tensor:
    stacked = np.concatenate([r.frames[: VIEWS - 1, ::every] for r in recordings], 1)
    return torch.from_numpy(stacked.reshape(-1, *stacked.shape[2:]))


@torch.no_grad()
def encode_walks(codec: Codec, recordings: list, half: bool, path: Path) -> None:
    """Encode all recordings into `path`, once for all runs; `half` shrinks to 32x32 first."""
    if path.exists():
        return
    rows = []
    for recording in recordings:
        frames = torch.from_numpy(recording.frames).flatten(0, 1).float() / 255
        frames = F.avg_pool2d(frames, 2) if half else frames
        rows.append(codec.encode(frames).unflatten(0, (VIEWS, -1)).half())
    torch.save(torch.stack(rows), path)


def phases(coarse: Walks, fine: Walks) -> list[Phase]:
    """Return the curriculum: 32x32 frames, then 64x64, then on its own rollouts."""
    return [
        Phase(0.15, coarse, batch=24, targets=3, context_latents=(8,), share_own=0.0),
        Phase(0.5, fine, batch=6, targets=3, context_latents=(8,), share_own=0.0),
        *finishing_phases(fine, 0.5),
    ]


def finishing_phases(fine: Walks, start: float = 0.0) -> list[Phase]:
    """Return the curriculum of weights that can already see; it begins at share `start`."""
    middle = start + 0.3 * (1 - start)
    return [
        Phase(middle, fine, batch=6, targets=3, context_latents=(8, 8, 12), share_own=0.0),
        Phase(2.0, fine, batch=6, targets=2, context_latents=(4, 8, 12, 20), share_own=0.5),
    ]


def main(argv: list[str] | None = None) -> None:
    """Run or resume the training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6000, help="training time in all")
    parser.add_argument("--size", choices=("small", "base"), default="small")
    parser.add_argument("--out", type=Path, default=Path("build/tinyworld"))
    parser.add_argument(
        "--init", type=Path, help="weights to start from, such as the shipped ones"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    recordings = _rooms(args.out / "rooms", range(ROOMS))
    held_out = _rooms(args.out / "rooms", range(HELD_OUT_SEED, HELD_OUT_SEED + HELD_OUT_ROOMS))
    codec_path = args.out / "codec.safetensors"
    if not codec_path.exists():
        codec = train_codec(
            _frames(recordings, 2), _frames(held_out, 6), _CODEC_SHARE * args.seconds,
            lambda step, done, db: _bar("codec", done, f"step {step}, held out {db:.2f} dB"),
        )  # fmt: skip
        save_file(codec.state_dict(), codec_path)
    codec = Codec()
    codec.load_state_dict(load_file(codec_path))
    codec_db = measure(codec, _frames(held_out, 6))
    _log(f"codec: {codec_db:.2f} dB on held-out rooms")

    for half in (False,) if args.init else (True, False):
        encode_walks(codec, recordings, half, _latents(args.out, half))
    recordings = [dataclasses.replace(r, frames=r.frames[:0]) for r in recordings]
    train_together(_train, args, recordings, codec_db)
    refine(codec, args.out, _CODEC_SHARE * args.seconds)


def refine(codec: Codec, out: Path, seconds: float) -> None:
    """Train the decoder on latents as wrong as the model's; writes `codec-refined`."""
    frames = _frames(load_recordings(out / "rooms", range(ROOMS)), 2)
    seeds = range(HELD_OUT_SEED, HELD_OUT_SEED + HELD_OUT_ROOMS)
    held_out = _frames(load_recordings(out / "rooms", seeds), 6)
    refine_decoder(
        codec, frames, held_out, seconds,
        lambda step, done, db: _bar("decoder", done, f"step {step}, held out {db:.2f} dB"),
    )  # fmt: skip
    save_file(codec.state_dict(), out / "codec-refined.safetensors")


def _latents(out: Path, half: bool) -> Path:
    return out / f"latents-{'half' if half else 'full'}.pt"


def _train(rank: int, args: argparse.Namespace, recordings: list, codec_db: float) -> None:
    """Train the model as one of `args.processes`."""
    torch.manual_seed(0)
    size = SMALL if args.size == "small" else BASE
    trainer = Trainer(TinyWorld(size), peak_rate=_FINISHING_RATE if args.init else _RATE)
    checkpoint = args.out / f"{args.size}.checkpoint"
    if args.init:
        trainer.model.load_state_dict(load_file(args.init))
        trainer.average.load_state_dict(load_file(args.init))
    if checkpoint.exists():
        trainer.load(torch.load(checkpoint))
        _log(f"resumed at step {trainer.step}, {trainer.elapsed_s:.0f} s")
    seconds = _WORLD_SHARE * args.seconds

    def save(state: Trainer) -> None:
        if rank:
            return
        state.save(checkpoint, args.out / f"{args.size}.safetensors")
        recent = [loss for _, loss in state.losses[-100:]]
        mean = sum(recent) / len(recent)
        _bar("world", state.elapsed_s / seconds, f"step {state.step}, loss {mean:.4f}")
        curve = state.losses[:: max(1, len(state.losses) // 200)]
        card = {
            "steps": state.step,
            "seconds": round(state.elapsed_s),
            "codec_db": codec_db,
            "rooms": len(recordings),
            "loss": curve,
            "date": time.strftime("%Y-%m-%d"),
        }
        (args.out / f"{args.size}.json").write_text(json.dumps(card))

    def walks(half: bool) -> LatentWalks:
        return latent_walks(recordings, torch.load(_latents(args.out, half)))

    def fine() -> LatentWalks:
        return walks(half=False)

    curriculum = finishing_phases(fine) if args.init else phases(lambda: walks(half=True), fine)
    trainer.run(curriculum, seconds, save)


if __name__ == "__main__":
    main()
