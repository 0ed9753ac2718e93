"""Try, in eager code, what it is worth to give the history to the heads that read it alone.

As in Dummy Forcing: the heads that look least at the middle of the history, what is neither sink
nor the latest chunks, attend to sink, latest chunks and their own only. Beside it, a window for
all heads at the same number of products. `python -m benchmarks.split_heads --chunks 64` prints a
JSON line each: dB to the renderer on the way back, dB to dense, share of the products.
"""

from __future__ import annotations

import argparse
import json

import torch
from torch import Tensor
from torch.nn import functional as F

from lipass.examples.tinyworld.camera import relative_to
from lipass.examples.tinyworld.metrics import psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, camera_transforms, tokenize
from lipass.examples.tinyworld.stream import StreamWorld, places_of_text, text_in_world, with_chunk
from lipass.examples.tinyworld.stream_rollout import GrownCache, stream
from lipass.examples.tinyworld.stream_walks import out_and_back
from lipass.examples.tinyworld.train_batches import prompt_of
from lipass.examples.tinyworld.weights import load_stream
from lipass.examples.tinyworld.world import Attributes, make_room, render

SAMPLED = 85
"""Queries of a call whose weights are looked at."""


class BySite(StreamWorld):
    """The streaming model, whose heads may read only a sink, the latest chunks and their own.

    Attributes:
        readers: for each block, whether each head reads all.
        sink, window: chunks that the others read.
        mass: for each block and head, the weights summed that queries gave to the middle.
        products: pairs of a query's head and a key that were computed, in chunks of queries.
    """

    def limit(self, readers: list[list[bool]], sink: int, window: int) -> None:
        """Begin a rollout."""
        self.readers, self.sink, self.window = readers, sink, window
        self.mass = torch.zeros(len(self.blocks), self.config.heads)
        self.products = 0
        self.draw = torch.Generator().manual_seed(0)

    def forward(self, latents, sigma, w2c, text, cache=None, walls=None, *, refresh=False):  # noqa: D102
        x = self.tokens(latents, relative_to(w2c, w2c[:, 0]), walls)
        rows = self.rows(sigma, x.dtype)
        transforms = camera_transforms(w2c)
        cameras = tuple(matrices.to(x.dtype) for matrices in transforms)
        place = places_of_text(transforms[1][:, :1])
        left = []
        for i, block in enumerate(self.blocks):
            shape = block.modulated(rows)
            q, k, v = block.project(x, shape, cameras, self.rotary)
            kept = (k, v) if cache is None else with_chunk(cache[i], (k, v), None)
            out = self._attend(i, q, text_in_world(text[i], place), kept)
            x = block.finish(x, out, shape, cameras)
            left.append(kept)
        return left if refresh else self.velocity(x, latents, sigma)

    def _attend(
        self, at: int, q: Tensor, text: tuple[Tensor, ...], kept: tuple[Tensor, ...]
    ) -> Tensor:
        tokens = q.shape[2]
        sink, latest = self.sink * tokens, (self.window + 1) * tokens
        every = kept[0].shape[2]
        if every > sink + latest:
            some = torch.randperm(tokens, generator=self.draw)[:SAMPLED]
            scores = q[:, :, some] @ torch.cat([text[0], kept[0]], 2).mT * q.shape[-1] ** -0.5
            weights = scores.softmax(-1).mean((0, 2))[:, text[0].shape[2] :]
            self.mass[at] += weights[:, sink : every - latest].sum(-1)
        out = torch.empty_like(q)
        for reads_all in (True, False):
            heads = [head for head, reads in enumerate(self.readers[at]) if reads == reads_all]
            if not heads:
                continue
            keys, values = (
                one
                if reads_all or every <= sink + latest
                else torch.cat([one[:, :, :sink], one[:, :, -latest:]], 2)
                for one in kept
            )
            self.products += keys.shape[2] // tokens * len(heads)
            joined = (
                torch.cat(pair, 2)[:, heads] for pair in zip(text, (keys, values), strict=True)
            )
            out[:, heads] = F.scaled_dot_product_attention(q[:, heads], *joined)
        return out


def readers_of(mass: Tensor, count: int) -> list[list[bool]]:
    """Take the heads that look most at the middle for readers."""
    chosen = mass.flatten().topk(count).indices
    return torch.zeros(mass.numel()).index_fill(0, chosen, 1).view_as(mass).bool().tolist()


def window_of(products: int, sites: int, chunks: int, sink: int) -> int:
    """Return the window for all heads whose rollout computes as many products, or nearly."""

    def cost(window: int) -> int:
        reads = (min(chunk + 1, window + sink + 1) for chunk in range(chunks))
        # a given chunk is refreshed, a generated one denoised four times before
        return sum(n * (1 if i < chunks // 2 else 5) for i, n in enumerate(reads)) * sites

    return min(range(chunks), key=lambda window: abs(cost(window) - products))


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Print the rows of one room."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--room", type=int, default=9001)
    parser.add_argument("--readers", type=int, nargs="+", default=[15, 9])
    parser.add_argument("--sink", type=int, default=1)
    parser.add_argument("--window", type=int, default=2, help="chunks, of heads that do not read")
    args = parser.parse_args(argv)
    loaded, codec = load_stream()
    model = BySite(loaded.config).eval()
    model.load_state_dict(loaded.state_dict())
    room = make_room(args.room)
    w2c = out_and_back(room, args.chunks * CHUNK_LATENTS)
    half, text = len(w2c) // 2, model.text(tokenize(prompt_of(Attributes()))[None])
    walked = render(room, w2c[:half], [Attributes()])[0]
    given, truth = codec.encode(walked).transpose(0, 1)[None], walked.flip(0)

    def rolled(readers: list[list[bool]], window: int) -> Tensor:
        model.limit(readers, args.sink, window)
        made = stream(model, text, given, w2c[None], seed=args.room, cache=GrownCache())
        return codec.decode(made[0, :, half:].transpose(0, 1))

    def show(name: str, shown: Tensor) -> None:
        row = {
            "method": name,
            "chunks": args.chunks,
            "psnr_vs_truth_db": round(psnr_db(shown, truth), 2),
            "psnr_vs_dense_db": None if shown is dense else round(psnr_db(shown, dense), 2),
            "products": round(model.products / every, 3),
        }
        print(json.dumps(row), flush=True)

    sites = model.config.heads * len(model.blocks)
    dense = rolled(
        readers_of(torch.ones(len(model.blocks), model.config.heads), sites), args.window
    )
    every, mass = model.products, model.mass.clone()
    show("dense", dense)
    shares = (mass / mass.sum() * 100).round().int().tolist()
    print(
        json.dumps({"share of the mass on the middle, %, by block and head": shares}), flush=True
    )
    for count in args.readers:
        shown = rolled(readers_of(mass, count), args.window)
        products = model.products
        show(f"{count} of {sites} heads read all", shown)
        window = window_of(products, sites, args.chunks, args.sink)
        shown = rolled([[False] * model.config.heads] * len(model.blocks), window)
        show(f"window of {window} and sink for all", shown)


if __name__ == "__main__":
    main()
