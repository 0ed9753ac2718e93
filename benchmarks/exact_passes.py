"""Time `preset="exact"` with each of its passes left out, against `off`, on two models.

    python -m benchmarks.exact_passes [--repeats 9] [--case tinyworld wan]

TinyWorld decodes a chunk of 4 steps behind 20 context latents. Wan is diffusers' code with random
weights at the width of the 1.3B model, 2 blocks, half a frame of 480p in 3 latents, and a prompt
of 40 tokens padded to 512, also for 4 steps. All variants take turns; figures are medians.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import lipass
from benchmarks.environment import environment
from lipass.passes import FACTS, PIPELINES

PASSES = [n for n in PIPELINES["exact"].split(",") if n not in FACTS.split(",")]
STEPS = 4
CONTEXT_LATENTS = 20

Run = Callable[[Callable], torch.Tensor]


def tinyworld() -> tuple[torch.nn.Module, Run]:
    """Return the model, and what decodes a chunk with a compiled form of it."""
    from lipass.examples.tinyworld.model import tokenize
    from lipass.examples.tinyworld.weights import load

    model, _ = load()
    text = model.text(tokenize("a room at day in clear air")[None])
    w2c = torch.eye(4).repeat(1, CONTEXT_LATENTS + 4, 1, 1)
    context = torch.randn(1, 16, CONTEXT_LATENTS, 8, 8)
    noise = torch.randn(1, 16, 4, 8, 8)

    def run(compiled: Callable) -> torch.Tensor:
        history = compiled(context, torch.zeros(1, CONTEXT_LATENTS), w2c, text)
        x = noise
        for _ in range(STEPS):
            x = x - 0.2 * compiled(x, torch.full((1, 4), 0.9), w2c, text, history)
        return x

    return model, run


def wan() -> tuple[torch.nn.Module, Run]:
    """Return the model, and what denoises a chunk with a compiled form of it."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=12, attention_head_dim=128, num_layers=2, ffn_dim=8960
    )
    prompt = torch.cat([torch.randn(1, 40, 4096), torch.zeros(1, 472, 4096)], 1)
    noise = torch.randn(1, 16, 3, 60, 52)

    def run(compiled: Callable) -> torch.Tensor:
        x = noise
        for i in range(STEPS):
            time_step = torch.tensor([900 - 200 * i])
            x = x - 0.2 * compiled(x, time_step, prompt, return_dict=False)[0]
        return x

    return model, run


CASES = {"tinyworld": tinyworld, "wan": wan}


def measure(case: str, repeats: int) -> dict[str, object]:
    """Time all variants of one case in turns."""
    torch.manual_seed(0)
    model, run = CASES[case]()
    model = model.eval().requires_grad_(False)
    variants = {"off": {"preset": "off"}, "exact": {"preset": "exact"}}
    variants |= {f"without {name}": {"preset": "exact", "disable": [name]} for name in PASSES}
    compiled, seconds, outputs = {}, {}, {}
    for name, options in variants.items():
        compiled[name] = torch.compile(model, backend="light_interaction", options=options)
        outputs[name], seconds[name] = _once(run, compiled[name])[0], []
    for _ in range(repeats):
        for name in variants:
            seconds[name].append(_once(run, compiled[name])[1])
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    return {
        "case": case,
        "steps": STEPS,
        "seconds": medians,
        "speedup": medians["off"] / medians["exact"],
        "gain_of_pass": {
            name: medians[f"without {name}"] / medians["exact"] - 1 for name in PASSES
        },
        "relative_error": {
            name: float((out - outputs["off"]).norm() / outputs["off"].norm())
            for name, out in outputs.items()
        },
    }


@torch.no_grad()
def _once(run: Run, compiled: Callable) -> tuple[torch.Tensor, float]:
    with lipass.Session(preset="exact"):
        begin = time.perf_counter()
        out = run(compiled)
        return out, time.perf_counter() - begin


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # one graph a variant, role and length
    rows = [measure(case, args.repeats) for case in args.case]
    print(json.dumps({"rows": rows, **environment()}, indent=1))


if __name__ == "__main__":
    main()
