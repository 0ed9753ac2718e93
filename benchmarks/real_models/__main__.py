"""Count what chunks of real models cost under each preset; try one call or block of each.

python -m benchmarks.real_models [--json] [--try-calls] [--try-blocks]
"""

import argparse
import json

import torch

import lipass
from benchmarks.environment import environment

from .attended import try_one
from .blocks import time_block
from .families import FAMILIES
from .rows import all_rows, own_options


def main() -> None:
    """Print rows, as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models", description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--try-calls", action="store_true", help="also time one attention call of each on the CPU"
    )
    parser.add_argument(
        "--try-blocks", action="store_true", help="also time a chunk through one block of each"
    )
    args = parser.parse_args()
    result: dict[str, object] = {**environment(), "rows": all_rows()}
    if args.try_calls or args.try_blocks:
        result["threads"] = torch.get_num_threads()
    if args.try_blocks:
        result["blocks"] = [time_block(family) for family in FAMILIES]
    if args.try_calls:
        result["calls"] = [
            {
                "family": family.name,
                **try_one(family, _sparse(own_options(family))),
            }
            for family in FAMILIES
        ]
    print(json.dumps(result, indent=1) if args.json else _table(result))


def _sparse(own: dict[str, object]) -> "lipass.options.SparseOptions":
    sparse = lipass.Config.resolve(None, {"preset": "sparse", **own}).sparse
    assert sparse is not None
    return sparse


def _table(result: dict[str, object]) -> str:
    rows = result["rows"]
    assert isinstance(rows, list)
    lines = [
        "| family | walk | preset | context latents | calls | attention TFLOP | linear TFLOP "
        "| density | KV GB | FLOPs of `off` | options |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['family']} | {r['walk']} | `{r['preset']}` | {r['context_latents_mean']:.1f} "
        f"| {r['model_calls']} | {r['attention_tflop']:,.0f} | {r['linear_tflop']:,.0f} "
        f"| {r['density']:.2f} | {r['kv_gb_peak']:.1f} | 1/{r['flop_ratio_to_off']:.2f} "
        f"| {', '.join(f'{name}={value}' for name, value in r['options'].items())} |"
        for r in rows
    ]
    calls = result.get("calls", [])
    assert isinstance(calls, list)
    for call in calls:
        for kind in ("slow", "noise"):
            one = call[kind]
            lines.append(
                f"{call['family']} {call['grid']} {kind}: density {one['density']:.2f}, error "
                f"{one['relative_error']:.3f}, mass kept {one['mass_kept']:.3f}, dense "
                f"{one['dense_ms']:.0f} ms, sparse {one['sparse_ms']:.0f} ms"
            )
    blocks = result.get("blocks", [])
    assert isinstance(blocks, list)
    for block in blocks:
        lines.append(f"{block['family']}, a chunk through one block, {block['grid']}:")
        lines += [
            f"  {preset}: {one['ms']:.0f} ms, {one['speed']:.2f}x of off, context "
            f"{one['context_latents']}, steps {one['steps']}"
            for preset, one in block["presets"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
