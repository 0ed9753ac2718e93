import pytest

from benchmarks.break_even import break_even, table


def rows(*pairs):
    return [{"density": d, "seconds": s, "dense_seconds": 2.0} for d, s in pairs]


def test_break_even_lies_between_the_densities_that_were_timed():
    assert break_even(rows((1.0, 2.5), (0.5, 1.5))) == pytest.approx(0.75)


def test_sparse_that_is_always_faster_breaks_even_at_one():
    assert break_even(rows((0.2, 0.5), (1.0, 1.9))) == 1.0


def test_sparse_that_is_never_faster_breaks_even_close_to_nothing():
    assert break_even(rows((0.2, 4.0), (1.0, 8.0))) == pytest.approx(0.1)


def test_each_case_and_dtype_has_a_row():
    named = [
        row | {"case": case, "dtype": "float32", "queries": 1, "keys": 2, "provider": "gate"}
        for case in ("a", "b")
        for row in rows((1.0, 1.0))
    ]
    assert [row["case"] for row in table(named, "gate")] == ["a", "b"]
