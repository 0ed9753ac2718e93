"""Score the streaming model: a walk with loops is given, the way back over it is generated.

All of the way back has been seen, so the renderer is the truth; what a window of a few chunks
still holds is little of it. `python -m lipass.examples.tinyworld.stream_scores` prints one JSON
line a walk.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from .codec import Codec
from .metrics import psnr_db
from .model import CHUNK_LATENTS, tokenize
from .stream import StreamWorld
from .stream_rollout import GrownCache, stream
from .stream_walks import out_and_back
from .train_batches import prompt_of
from .weights import SHIPPED, load_stream
from .world import HELD_OUT_SEED, Attributes, make_room, render


@torch.no_grad()
def way_back(
    model: StreamWorld, codec: Codec, seed: int, chunks: int, window_chunks: int | None = None
) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Generate the second half of `chunks` chunks in a room: scores in dB, frames and truth.

    The scores are of the whole way back and of its quarters, in the order of time.
    """
    room = make_room(seed)
    w2c = out_and_back(room, chunks * CHUNK_LATENTS)
    half = len(w2c) // 2
    device = codec.latent_mean.device
    out = render(room, w2c[:half].to(device), [Attributes()])[0]
    truth = out.flip(0)
    text = model.text(tokenize(prompt_of(Attributes()))[None].to(device))
    begin = time.perf_counter()
    given = codec.encode(out).transpose(0, 1)[None]
    poses = w2c[None].to(device)
    made = stream(model, text, given, poses, seed=seed, cache=GrownCache(window_chunks))
    seconds = time.perf_counter() - begin
    shown = codec.decode(made[0, :, half:].transpose(0, 1))
    quarters = zip(shown.chunk(4), truth.chunk(4), strict=True)
    row = {
        "room": seed,
        "chunks": chunks,
        "window_chunks": window_chunks,
        "psnr_vs_truth_db": round(psnr_db(shown, truth), 2),
        "quarters_db": [round(psnr_db(x, y), 2) for x, y in quarters],
        "seconds": round(seconds, 1),
    }
    return row, shown, truth


def main(argv: list[str] | None = None) -> None:
    """Print the scores of some rooms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=SHIPPED / "stream.safetensors")
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--rooms", type=int, default=2, help="how many held-out rooms")
    parser.add_argument("--window-chunks", type=int, help="keep the latest chunks only")
    args = parser.parse_args(argv)
    model, codec = load_stream(args.weights)
    for seed in range(HELD_OUT_SEED + 1, HELD_OUT_SEED + 1 + args.rooms):
        row, _, _ = way_back(model, codec, seed, args.chunks, args.window_chunks)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
