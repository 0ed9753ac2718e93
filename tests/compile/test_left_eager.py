"""What Dynamo gives up to compile is told: a limit of recompilations, a break in a loop."""

import json
import warnings

import pytest
import torch
from torch import nn

import lipass
from lipass.compile.left_eager import in_words
from lipass.errors import LipassWarning
from lipass.passes.graph.compat import can_isolate
from lipass.receipt import reset_report

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.ones(2, 3)


def sliced(x, n):
    """A rope table that is made for a number of frames."""
    return x * torch.linspace(0, n, n + 1)[:n].sum()


def named(x, mode):
    return x + len(mode)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        return sliced(x, self.n)


def ranks(x):
    return x.reshape(-1) * x.dim()


def nonzero_in_a_loop(x):
    for row in x:
        for at in row.nonzero():
            x = x + at
    return x


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            if x.sum() > 0:
                x = x * 2
        return x


def compiled(fn, **options):
    options = {"preset": "exact", "inner": "eager", **options}
    return torch.compile(fn, backend="light_interaction", options=options)


def run(fn, calls, **options):
    fast = compiled(fn, **options)
    with torch.no_grad():
        for call in calls:
            torch.testing.assert_close(fast(*call), fn(*call))


def counting():
    model = Counting()

    def calls():
        for model.n in range(12):
            yield (X,)

    return model, calls()


LIMITS = {
    "argument": (lambda: (sliced, [(X, n) for n in range(4, 56, 4)]), "`n` was 4, 8, 12, 16, ..",
                 "pass `n` as a tensor"),
    "text": (lambda: (named, [(X, "m" * n) for n in range(2, 14)]), "`mode` was 'mm', 'mmm'",
             "compile the model once for each value of `mode`"),
    "attribute": (counting, "`self.n` was 0, 1, 2, 3, ..", "pass `self.n` as a tensor"),
    "rank": (lambda: (ranks, [(torch.ones([1] * n),) for n in range(1, 12)]),
             "tensor 'x' rank mismatch", "recompile_limit"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS.values(), ids=LIMITS)
def test_limit_of_recompilations_is_told_with_the_guard_that_failed(case):
    make, reason, remedy = case
    fn, calls = make()
    with pytest.warns(LipassWarning, match="which Python runs from now on") as told:
        run(fn, calls)
    assert len(told) == 1
    (found,) = lipass.report().left_eager
    assert f"limit of 8 recompilations is reached: {reason}" in found.reason
    assert remedy in found.remedy
    table = lipass.report().table()
    assert f"not compiled: {found.source}" in table
    assert max(map(len, table.splitlines())) <= 80
    assert json.loads(lipass.report().to_json())["left_eager"][0]["source"] == found.source


@pytest.mark.parametrize("fn", [nonzero_in_a_loop, Branching()], ids=["nonzero", "branch"])
def test_break_in_a_loop_is_told(fn):
    with pytest.warns(LipassWarning, match="nothing of it is a graph"):
        run(fn, [(X,)] * 3)
    (found,) = lipass.report().left_eager
    assert found.source.startswith("test_left_eager.py:")
    assert found.remedy


@pytest.mark.parametrize(
    ("fn", "calls"),
    [(nonzero_in_a_loop, [(X,)]), (sliced, [(X, n) for n in range(2, 14)])],
    ids=["break", "limit"],
)
def test_strict_raises(fn, calls):
    with pytest.raises(
        lipass.LipassError, match="strict: every call of a compiled model must run compiled"
    ):
        run(fn, calls, strict=True)
    # and leaves Dynamo as it should be
    torch._dynamo.reset()
    reset_report()
    run(lambda x: x + 1, [(X,)], strict=False)
    assert lipass.report().left_eager == []


@pytest.mark.parametrize("fn", [sliced, nonzero_in_a_loop])
def test_other_backends_are_not_in_the_receipt(fn):
    fast = torch.compile(fn, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", LipassWarning)
        for n in range(2, 14):
            fast(X, n) if fn is sliced else fast(X)
    assert lipass.report().left_eager == []


def test_guards_that_compare_nothing_are_shown_as_they_are():
    assert in_words(["len(d) != 7"]) == "len(d) != 7"
    assert in_words([]) == "torch does not say which guard failed"
    assert in_words(["n == 1", "n == 2", "h is None"]) == "`n` was 1, 2"


HELD = {"end": 1}


def test_an_int_that_a_module_holds_is_better_an_argument():
    fast = compiled(lambda x: x * HELD["end"])

    def count():
        for HELD["end"] in range(2, 14):
            assert torch.equal(fast(X), X * HELD["end"])

    with torch.no_grad(), pytest.warns(LipassWarning, match="end'.` as an argument") as told:
        count()
    assert "as a tensor" not in str(told[0].message)


def test_values_of_a_module_are_named_as_code_names_them():
    held = "__import_wan_dot_modules_dot_model._META['end']"
    assert (
        in_words([f"{held} == 3", f"{held} == 6"]) == "`wan.modules.model._META['end']` was 3, 6"
    )
    assert in_words([f"len({held}) != 7"]) == "len(wan.modules.model._META['end']) != 7"


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)

    def forward(self, x, twice=False):
        return self.linear(x) * (2 if twice else 1)


def compared(**more):
    model = Attending().eval()
    with torch.no_grad():
        for preset in ("off", "exact", "sparse", "cache", "all"):
            options = {"preset": preset, "inner": "eager"}
            fast = torch.compile(model, backend="light_interaction", options=options, **more)
            for x, twice in ((X, False), (X, True)):
                torch.testing.assert_close(fast(x, twice), model(x, twice))


def test_presets_compared_in_one_process_are_named_where_they_reach_the_limit():
    with pytest.warns(LipassWarning, match="which Python runs from now on"):
        compared()
    (found,) = lipass.report().left_eager
    assert "compiled 4 times over, for preset" in found.reason
    assert "torch._dynamo.reset()" in found.remedy


@pytest.mark.skipif(
    not can_isolate(), reason="this torch counts all calls of torch.compile as one"
)
def test_remedy_for_presets_compared_in_one_process_holds():
    compared(isolate_recompiles=True)
    assert lipass.report().left_eager == []
