import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def readme():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(room, speed, **more):
    return {
        "preset": "all", "trajectory": "loop", "regime": "free", "room": room,
        "speedup_vs_off": speed, "psnr_vs_off_db": 30.0, "psnr_vs_truth_db": 20.0,
        "self_consistency_db": None, "context_latents_mean": 8.0, "density": 0.5,
        "steps_computed": 44, "steps_total": 60, **more,
    }  # fmt: skip


def test_a_line_is_the_mean_over_rooms(readme):
    assert readme.table([row(1, 2.0), row(2, 3.0)], "free").splitlines()[-1] == (
        "| loop | `all` | 2.50x | 30.0 | 20.0 |  | 8.0 | 0.50 | 44/60 |"
    )


def test_equal_output_has_no_db(readme):
    line = readme.table([row(1, 1.0, preset="exact", psnr_vs_off_db=100.0)], "free")
    assert "| `exact` | 1.00x | same |" in line


def test_regimes_are_kept_apart(readme):
    assert "`all`" not in readme.table([row(1, 2.0)], "explored")


def test_only_the_two_tables_of_the_results_change(readme):
    text = (ROOT / "docs/results.md").read_text()
    filled = readme.fill(text, [row(1, 2.0), row(1, 2.0, regime="explored")])
    kept = [x for x in text.splitlines() if not x.startswith("|")]
    assert [x for x in filled.splitlines() if not x.startswith("|")] == kept
    assert filled.count("`all` | 2.00x") == 2


def test_short_table_has_the_range_over_the_paths_and_the_change_to_off(readme):
    rows = []
    for path, speed, truth in (("loop", 2.0, 20.5), ("left/right", 3.0, 19.0)):
        for regime in readme.REGIMES:
            given = {"trajectory": path, "regime": regime}
            rows.append(row(1, 1.0, preset="off", **given))
            near = {"psnr_vs_off_db": 10 + 10 * speed}
            rows.append(row(1, speed, psnr_vs_truth_db=truth, **near, **given))
    text = readme.fill((ROOT / "docs/results.md").read_text(), rows)
    (line,) = [x for x in readme.presets_table(text).splitlines() if x.startswith("| `all`")]
    cells = "| 2.0x to 3.0x | 30 to 40 | -1.0 to +0.5 "
    assert line.endswith(f"{cells * 2}|")


def test_a_preset_that_was_not_measured_has_empty_cells(readme):
    text = readme.fill((ROOT / "docs/results.md").read_text(), [
        row(1, 1.0, preset="off", regime=regime) for regime in readme.REGIMES
    ])  # fmt: skip
    assert "| `cache` | denoising steps are reused |  |  |  |  |  |  |" in (
        readme.presets_table(text)
    )


def test_streams_are_compared_with_dense_ones_of_the_same_length(readme):
    def streamed(method, chunks, seconds, **more):
        return {"method": method, "chunks": chunks, "chunk_s_last": seconds, **more}

    kept = {"psnr_vs_truth_db": 26.0, "kv_tokens": 832, "kv_bytes_peak": 75_500_000}
    table = readme.stream_table(
        [
            streamed("dense", 16, 9.0),
            streamed("dense", 64, 2.0, psnr_vs_truth_db=25.0, kv_tokens=16128),
            streamed("dense", 256, 9.0),
            streamed("all", 64, 0.25, **kept),
            streamed("all", 256, 0.3, **kept | {"psnr_vs_truth_db": 24.0}),
        ]
    )
    assert table.splitlines()[0].startswith(
        "| history | tokens read | speed, 64 chunks | speed, 256"
    )
    assert "| all of it | 16,128 | 1.0x | 1.0x | 25.0 |  |" in table
    assert "| 832 | 8.0x | 30.0x | 26.0, 24.0 | 76 MB |" in table


def test_a_way_to_steer_that_a_room_never_follows_is_never_there(readme):
    def steered(room, change, chunks, below):
        way = {"model": "small", "room": room, "change": change, "way": "hard, one text"}
        scores = {"chunks_to_settled": chunks, "db_below_settled": below, "jump": 4.0}
        return way | scores | {"objects": 0.5}

    rows = [steered(1, "night", 1, -0.2), steered(2, "night", 3, 0.2), steered(1, "fog", None, 9)]
    head, _, line = readme.steering_table(rows).splitlines()
    assert head.startswith("| policy | night: chunks | dB below | jump | fog: chunks |")
    assert line == "| `hard`, one text | 1 to 3 | 0.0 | 4.0 | never | 9.0 | 4.0 | 0.50 |"


def test_results_have_what_was_recorded_of_steering(readme):
    rows = json.loads((ROOT / "benchmarks/results/steering.json").read_text())["rows"]
    results = (ROOT / "docs/results.md").read_text()
    assert readme.steered(results, rows) == results, "run make pages"


def test_readme_has_what_was_recorded(readme):
    text = (ROOT / "README.md").read_text()
    counts = json.loads((ROOT / "benchmarks/results/real_models.json").read_text())["rows"]
    streamed = json.loads((ROOT / "benchmarks/results/long_context.json").read_text())["rows"]
    results = (ROOT / "docs/results.md").read_text()
    again = readme.readme_of(text, results, ROOT / "docs/models", counts, streamed)
    assert again == text, "run make pages"


def test_an_examined_model_has_what_it_left_out(readme, tmp_path):
    said = "  ok    all: frames dropped: 0 of 9\n  ok    all: key blocks skipped: 2 sites\n"
    (tmp_path / "a.md").write_text(f"# A\n\n{said}")
    counts = [
        {"family": "a", "preset": "all", "flop_ratio_to_off": 2.0},
        {"family": "a", "preset": "all, longest window", "flop_ratio_to_off": 1.5},
    ]
    line = readme.models_table(tmp_path, counts).splitlines()[-1]
    assert line == "| [A](docs/models/a.md) | yes |  |  | 1/1.50 to 1/2.00 |  |"
