"""Time what Inductor makes of the pointwise and norm patterns of video transformers.

    python -m benchmarks.fused_norms [--tokens 6240] [--width 2048] [--repeats 15]

Each pattern reads its inputs once and writes its output once at best, which is what a kernel of
our own could reach; `share_of_copy` is the time of copying as many bytes over the time taken. Runs
take turns; figures are medians.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.environment import environment

HEAD_DIM = 128


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Normalise each token."""
    return F.rms_norm(x, x.shape[-1:], weight)


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Normalise each token, then shift and scale by its latent's rows."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Add what a branch gave, by its latent's gate."""
    return x + gate * y


def silu_gate(x: Tensor) -> Tensor:
    """Multiply one half of the hidden features by the other through SiLU."""
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


def query_norm_rotary(q: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Normalise queries `[B, L, H, D]`, rotate them by position and put heads first."""
    q = F.rms_norm(q, q.shape[-1:], weight)
    first, second = q.chunk(2, -1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
    return rotated.transpose(1, 2).contiguous()


def patterns(tokens: int, width: int) -> dict[str, tuple[Callable, tuple[Tensor, ...]]]:
    """Return each pattern with inputs of one chunk of four latents."""
    x = torch.randn(1, 4, tokens // 4, width)
    row = torch.randn(1, 4, 1, width)
    heads = x.view(1, 4 * (tokens // 4), width // HEAD_DIM, HEAD_DIM)
    table = torch.randn(heads.shape[1], 1, HEAD_DIM // 2)
    return {
        "rms_norm": (rms_norm, (x, row.flatten()[:width])),
        "modulated_layer_norm": (modulated_layer_norm, (x, row, row)),
        "gated_residual": (gated_residual, (x, x.flip(2), row)),
        "silu_gate": (silu_gate, (x,)),
        "query_norm_rotary": (query_norm_rotary, (heads, torch.ones(HEAD_DIM), table, table)),
    }


def measure(tokens: int, width: int, repeats: int) -> list[dict[str, object]]:
    """Time every pattern and a copy of as many bytes in turns."""
    rows = []
    for name, (fn, args) in patterns(tokens, width).items():
        compiled = torch.compile(fn)
        out = compiled(*args)
        error = float((out - fn(*args)).abs().max())
        moved = sum(t.nbytes for t in {id(t): t for t in (*args, out)}.values())
        source = torch.randn(math.ceil(moved / 8))
        runs = {
            "inductor": lambda compiled=compiled, args=args: compiled(*args),
            "eager": lambda fn=fn, args=args: fn(*args),
            "copy": lambda source=source: source.clone(),
        }
        seconds: dict[str, list[float]] = {key: [] for key in runs}
        for _ in range(repeats):
            for key, run in runs.items():
                begin = time.perf_counter()
                run()
                seconds[key].append(time.perf_counter() - begin)
        medians = {key: statistics.median(taken) for key, taken in seconds.items()}
        rows.append(
            {
                "pattern": name,
                "seconds": medians,
                "speedup_over_eager": medians["eager"] / medians["inductor"],
                "share_of_copy": medians["copy"] / medians["inductor"],
                "max_error": error,
            }
        )
    return rows


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=6240)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = measure(args.tokens, args.width, args.repeats)
    print(json.dumps({"tokens": args.tokens, "width": args.width, "rows": rows, **environment()}))


if __name__ == "__main__":
    main()
