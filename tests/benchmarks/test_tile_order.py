"""The table of slots that tile order saves."""

from benchmarks import tile_order

WHAT = {"tile": "1x4x4", "grids": "whole", "budget": 0.4}


def test_row_says_what_was_saved_and_that_nothing_else_changed(monkeypatch):
    case = ("TinyWorld", tile_order.tinyworld, (), *WHAT.values())
    monkeypatch.setattr(tile_order, "CASES", (case,))
    (row,) = tile_order.table()
    assert {key: row[key] for key in WHAT} == WHAT
    assert row["said"] == [
        "rewritten: in tile order for 2 calls: slots a useful pair 1.00 to 1.00"
    ]
    assert row["largest_difference"] < 1e-5 < row["largest_output"]


def test_turns_time_each_call_as_often():
    calls = {"a": [], "b": []}
    found = tile_order.in_turns({name: lambda x=x: x.append(1) for name, x in calls.items()}, 3)
    assert set(found) == {"a", "b"}
    assert all(len(x) == 3 for x in calls.values())
