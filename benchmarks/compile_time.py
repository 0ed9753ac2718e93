"""Compile 2 and 24 equal layers, each cold and in a process of its own, and print the ratio.

    python -m benchmarks.compile_time              one JSON document, some minutes

The layers are those of the example model; prefill and decode are both compiled, with Inductor.
"""

import json
import subprocess
import sys
import tempfile
import time

PRESET = "exact"


def compile_once(layers: int) -> dict[str, float]:
    """Compile a model of so many layers and compare it with eager."""
    import torch

    import lipass
    from lipass.examples.tinyworld.model import ModelConfig, TinyWorld, tokenize

    torch.manual_seed(0)
    model = TinyWorld(ModelConfig(blocks=layers)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fast = torch.compile(model, backend="light_interaction", mode=PRESET, dynamic=True)
    context, noise = torch.randn(1, 16, 12, 8, 8), torch.randn(1, 16, 4, 8, 8)
    clean, level = torch.zeros(1, 12), torch.full((1, 4), 0.5)
    w2c = torch.eye(4).repeat(1, 16, 1, 1)

    def chunk(call):
        history = call(context, clean, w2c, text)
        return call(noise, level, w2c, text, history)

    with torch.no_grad():
        text = model.text(tokenize("a room")[None])
        begin = time.perf_counter()
        out = chunk(fast)
        seconds = time.perf_counter() - begin
        expected = chunk(model)
    return {
        "layers": layers,
        "seconds": seconds,
        "relative_error": float((out - expected).norm() / expected.norm()),
        "graphs": lipass.report().graphs,
        "sites": len(lipass.report().sites),
    }


def cold(layers: int) -> dict[str, float]:
    """Run `compile_once` in a new process with empty caches."""
    import os

    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.compile_time", str(layers)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print the two compilations and their ratio."""
    if len(sys.argv) > 1:
        print(json.dumps(compile_once(int(sys.argv[1]))))
        return
    few, many = cold(2), cold(24)
    from benchmarks.environment import environment

    ratio = many["seconds"] / few["seconds"]
    print(json.dumps({"rows": [few, many], "ratio": ratio, **environment()}, indent=1))


if __name__ == "__main__":
    main()
