import importlib.util
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


def test_only_the_two_tables_of_the_readme_change(readme):
    text = (ROOT / "README.md").read_text()
    filled = readme.fill(text, [row(1, 2.0), row(1, 2.0, regime="explored")])
    kept = [x for x in text.splitlines() if not x.startswith("|")]
    assert [x for x in filled.splitlines() if not x.startswith("|")] == kept
    assert filled.count("`all` | 2.00x") == 2
    assert "| preset | what may change | |" in filled
