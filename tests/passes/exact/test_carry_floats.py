"""Python floats that differ between calls: levels of a sampler above all."""

import itertools

import pytest
import torch
from expecttest import assert_expected_inline
from torch.nn import functional as F

from lipass.receipt import current_report, reset_report
from lipass.testing import graph_diff, run_passes

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")

TEXT = "canonicalize,carry-floats"
LEVELS = (1.0, 0.75, 0.5, 0.25, 0.0)
X = torch.linspace(-2, 2, 32).view(4, 8)
MASK = X > 0.3


def written(x, s):
    y = x.clone()
    y[:, 1] = s
    y[MASK] = 2 * s
    return y


FORMS = {
    "full": lambda x, s: torch.full((x.shape[0], 1), s),
    "full_of_named_arguments": lambda x, s: torch.full(size=(4,), fill_value=s, dtype=x.dtype),
    "full_of_integers": lambda x, s: torch.full((4,), s * 1000, dtype=torch.int64),
    "full_of_booleans": lambda x, s: torch.full((4,), s, dtype=torch.bool),
    "full_of_halves": lambda x, s: torch.full((4,), s / 3, dtype=torch.bfloat16),
    "full_like": lambda x, s: torch.full_like(x, 1 - s),
    "new_full": lambda x, s: x.new_full((4, 1), s),
    "tensor": lambda x, s: torch.tensor(s),
    "list": lambda x, s: torch.tensor([s, 1.0, 2 * s]),
    "scalar_tensor": lambda x, s: torch.scalar_tensor(s, dtype=torch.float64),
    "fill_": lambda x, s: torch.empty_like(x).fill_(s),
    "setitem": written,
    "masked_fill": lambda x, s: x.masked_fill(MASK, s),
    "where": lambda x, s: torch.where(MASK, s, x),
    "where_method": lambda x, s: x.where(MASK, s),
    "clamp": lambda x, s: x.clamp(-s, s),
    "clamp_one_sided": lambda x, s: x.clamp(max=s),
    "clamp_between_float_and_number": lambda x, s: torch.clamp(x, -1, s),
    "add_with_alpha": lambda x, s: x.add(x * 2, alpha=s),
    "sub_with_alpha": lambda x, s: torch.sub(x, x * 2, alpha=s),
    "add_in_place_with_alpha": lambda x, s: (x * 2).add_(x, alpha=s),
}
OTHERS = {
    "exponent": lambda x, s: x.abs() ** s,
    "padding": lambda x, s: F.pad(x, (1, 1), value=s),
    "epsilon": lambda x, s: F.rms_norm(x, (8,), eps=s + 0.1),
    "bounds_of_integers": lambda x, s: (x * 10).long().clamp(-s, s),
    "added_product": lambda x, s: torch.addcmul(x, x, x, value=s),
}


def beside_a_product(form):
    """Use the level twice: for the product torch makes a tensor of it."""

    def fn(x, s):
        return x * (1 - s), form(x, s)

    return fn


def assert_right_at_every_level(fn, inner):
    """Compare calls at several levels with eager ones; return how many graphs were compiled."""
    torch._dynamo.reset()
    reset_report()
    options = {"preset": "exact", "inner": inner}
    fast = torch.compile(fn, backend="light_interaction", options=options)
    with torch.no_grad():
        for level in LEVELS:
            for got, want in zip(fast(X, level), fn(X, level), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()
    return current_report().graphs


def test_fill_is_ones_times_the_level():
    assert_expected_inline(
        graph_diff(FORMS["full"], (X, 1.0), TEXT, grown=(X, 0.75)),
        """\
-%full: f32[4, 1] = full((4, 1), %item)
-return (%full)
+%ones: f32[4, 1] = ones((4, 1), dtype=torch.float32, device=device(type='cpu'))
+%mul: f32[4, 1] = mul(%ones, %item)
+return (%mul)
""",
    )


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_eager(form):
    traced = run_passes(beside_a_product(FORMS[form]), (X, 1.0), TEXT, grown=(X, 0.3))
    assert traced.records[-1].changed
    assert {note.action for note in traced.notes} == {"rewritten"}
    for got, want in zip(traced.outputs, beside_a_product(FORMS[form])(X, 0.3), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_levels_compile_nothing_anew(form):
    """The first level is a constant, the second makes it a value; no other compiles."""
    assert assert_right_at_every_level(beside_a_product(FORMS[form]), "aot_eager") == 2


@pytest.mark.parametrize("form", ["full", "clamp", "tensor", "setitem"])
@pytest.mark.slow
def test_levels_compile_nothing_anew_with_inductor(form):
    """The stale level of pytorch#194976 was that of the second call."""
    assert assert_right_at_every_level(beside_a_product(FORMS[form]), "inductor") == 2


@pytest.mark.parametrize("form", ["exponent", "padding"])
@pytest.mark.slow
def test_other_calls_are_right_with_inductor(form):
    assert_right_at_every_level(beside_a_product(OTHERS[form]), "inductor")


@pytest.mark.parametrize("form", OTHERS)
def test_other_calls_are_right(form):
    assert_right_at_every_level(beside_a_product(OTHERS[form]), "aot_eager")


def test_float_that_two_calls_take_differently_is_a_constant():
    fn = beside_a_product(OTHERS["bounds_of_integers"])
    traced = run_passes(fn, (X, 1.0), TEXT, grown=(X, 0.75))
    assert [note.action for note in traced.notes] == ["kept"]
    assert "pass a tensor" in traced.notes[0].reason


@pytest.mark.slow
def test_float_that_two_calls_take_differently_is_right_with_inductor():
    fn = beside_a_product(OTHERS["bounds_of_integers"])
    assert assert_right_at_every_level(fn, "inductor") == len(LEVELS)
    told = [note for one in current_report().passes for note in one.notes]
    assert any("pass a tensor" in note for note in told)


def test_constant_levels_stay():
    assert not run_passes(lambda x: torch.full((4,), 0.5) * x[0, 0], (X,), TEXT).diff


def test_sampler_loop_over_a_list_of_levels():
    """The loop of the README: levels are floats, and no step compiles after the first two."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.out = torch.nn.Linear(1, 8), torch.nn.Linear(8, 8)

        def forward(self, x, sigma):
            level = torch.full((x.shape[0], 1), sigma * 1000)
            return self.out(x + self.time(level).sin()) * (1 - sigma)

    def sample(model):
        x = X
        for sigma, after in itertools.pairwise(LEVELS):
            x = x + (after - sigma) * model(x, sigma)
        return x

    torch._dynamo.reset()
    model = Model().eval()
    options = {"preset": "exact", "inner": "aot_eager"}
    fast = torch.compile(model, backend="light_interaction", options=options)
    with torch.no_grad():
        reset_report()
        for _ in range(2):
            torch.testing.assert_close(sample(fast), sample(model))
    assert (current_report().graphs, current_report().recompiles) == (2, 1)
