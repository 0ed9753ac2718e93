"""The table of what happens along a walk is the recorded one, and marks what is lost."""

import json

from benchmarks import along
from lipass.quality.summary import KEPT


def method(name, mean, kept):
    figures = {"mean": mean, "low": 1.0, "high": 2.0, "worst": mean}
    metrics = {metric: figures for metric in (*KEPT, "psnr_vs_truth_db")}
    return {"model": "small", "method": name, "metrics": metrics, "kept": kept, "verdicts": {}}


def test_what_is_outside_of_the_interval_is_set_in_bold():
    lost = dict.fromkeys(KEPT, True) | {"seam": False}
    document = {"methods": [method("off", 1.5, {}), method("all", 3.0, lost)]}
    head, _, dense, other, _, said = along.table(document).splitlines()
    assert said == "`all` of small: seams over inside not kept."
    assert head.count("|") == dense.count("|") == other.count("|") == 9
    assert "1.50 (1.00 to 2.00)" in dense
    assert other.count("**") == 2
    assert "| **3.00** |" in other


def test_a_method_that_broke_is_said_to_and_has_no_figures_to_show():
    lost = {**method("all", 3.0, dict.fromkeys(KEPT, False)), "verdicts": {"broken": 2}}
    del lost["metrics"]["psnr_vs_truth_db"]
    *_, line, _, said = along.table({"methods": [method("off", 1.5, {}), lost]}).splitlines()
    assert line.endswith("| none |")
    assert said.endswith("gated loop score not kept; 2 of 2 walks broke.")


def test_page_shows_what_was_recorded():
    recorded = json.loads(along.RECORDED.read_text())
    assert along.table(recorded) in along.PAGE.read_text(), (
        "python -m benchmarks.along --page-only"
    )
