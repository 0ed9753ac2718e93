"""Figures of docs/results.md that are not in its tables are those of recorded results."""

import json
import re

import pytest
from page_blocks import ROOT

RECORDED = ROOT / "benchmarks/results"


def recorded(name):
    return json.loads((RECORDED / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def page():
    return " ".join((ROOT / "docs/results.md").read_text().split())


def test_compile_time_of_many_layers_is_the_recorded_one(page):
    found = recorded("compile_time")
    few, many = found["rows"]
    told = f"A model of {many['layers']} layers took {found['ratio']:.1f} times as long as one of"
    assert f"{told} {few['layers']} layers" in page


def test_memory_of_a_long_rollout_is_the_recorded_one(page):
    found = recorded("long_rollout")
    assert found["graphs_after_warm_up"] == 0
    told = f"no graph compiled after warm-up, memory {100 * found['memory_drift']:.1f} % higher"
    assert f"{found['chunks']} chunks one after the other under `all`: {told}" in page


def test_speed_of_the_browser_world_is_the_recorded_one():
    page = " ".join((ROOT / "docs/play.md").read_text().split())
    found = recorded("live_world")
    fast, dense = found["fast"], found["dense"]
    took = [f"{side['chunk_ms_p50']:.0f} ms" for side in (fast, dense)]
    assert f"took {took[0]} with lipass and {took[1]} without" in page
    speed = f"{fast['own_fps']:.0f} and {dense['own_fps']:.1f} frames a second"
    assert f"{speed}, {found['ratio_of_chunk_times']:.1f}x" in page
    waits = found["latency_ms_p50"], found["latency_ms_p95"]
    assert "{} ms in the middle, {} ms for 19 of 20".format(*waits) in page
    assert found["graphs_after_warm_up"] == 0
    first, _, last = found["resident_mb"]
    assert f"memory went from {first} to {last} MB" in page


def test_waits_of_several_visitors_are_the_recorded_ones():
    page = (ROOT / "docs/play.md").read_text()
    for row in recorded("live_curve")["curve"]:
        pairs = [(row[name]["p50"], row[name]["p99"]) for name in ("chunk_ms", "wait_ms")]
        cells = [f"{half:.0f}, {most:.0f}" for half, most in pairs]
        assert f"| {row['visitors']} | {' | '.join(cells)} | {row['resident_mb']} |" in page


def test_speed_of_the_kernel_is_that_of_its_own_page(page):
    kernel = (ROOT / "kernels/block_sparse/README.md").read_text()
    rows = re.findall(r"^\| 16 x 128 (\w+) \| 0.19 \| (.*) \|$", kernel, re.MULTILINE)
    cells = {dtype: [float(c.rstrip("x")) for c in text.split(" | ")] for dtype, text in rows}
    (_, ours32, _, flex32, *_), (_, ours16, _, flex16, *_) = cells["fp32"], cells["bf16"]
    assert f"{ours32:.1f}x in fp32 and {ours16:.1f}x in bf16 of dense SDPA" in page
    assert f"FlexAttention with the same blocks gives {flex32:.1f}x and {flex16:.1f}x" in page
