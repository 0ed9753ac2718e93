"""Graph breaks have their line and a remedy, in `lipass inspect` and in the receipt."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lipass
from lipass.cli import main
from lipass.compile.graph_breaks import GraphBreak, break_of, distinct

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Quiet(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x):
        return self.lin(x) * 2


class Prints(Quiet):
    def forward(self, x):
        y = self.lin(x)
        print("the shape is", y.shape)  # breaks
        return y * 2


class Reads(Quiet):
    def forward(self, x):
        y = self.lin(x)
        return y * y[0, 0].item()  # breaks


class Branches(Quiet):
    def forward(self, x):
        y = self.lin(x)
        if y.sum() > 0:  # breaks
            y = y * 2
        return y


def doubled_if_positive(y):
    return y * 2 if y.sum() > 0 else y  # breaks


class Nested(Quiet):
    def forward(self, x):
        y = self.lin(x)
        return doubled_if_positive(y)


class Selects(Quiet):
    def forward(self, x):
        y = self.lin(x)
        return y[y > 0] * 2  # breaks


@torch.compiler.disable
def helper(x):
    return x + 1


class Disabled(Quiet):
    def forward(self, x):
        y = self.lin(x)
        y = helper(y)  # breaks
        return y * 2


BREAKING = {
    Prints: ("builtin operator `print`", "Avoid calling builtin `print`"),
    Reads: ("Tensor.item()", "capture_scalar_outputs = True"),
    Branches: ("Data-dependent branching", "choose with `torch.where`"),
    Nested: ("Data-dependent branching", "making the code branchless"),
    Selects: ("output shape depends on input Tensor data", "capture_dynamic_output_shape_ops"),
    Disabled: ("`torch.compiler.disable()`d function", "Remove the `torch.compiler.disable` call"),
}
each = pytest.mark.parametrize("kind", BREAKING, ids=lambda kind: kind.__name__)


def quiet():
    return Quiet(), (torch.ones(2, 4),)


def target(kind):
    return lambda: (kind(), (torch.ones(2, 4),))


# What `lipass inspect` calls is looked up by name.
globals().update({f"target_{kind.__name__}": target(kind) for kind in BREAKING})


def line_of(kind):
    """Return where a class breaks the graph, as it is shown."""
    lines, start = inspect.getsourcelines(doubled_if_positive if kind is Nested else kind)
    (at,) = [i for i, line in enumerate(lines) if "# breaks" in line]
    return f"{Path(__file__).name}:{start + at}"


def compiled(model, preset="exact"):
    options = {"preset": preset, "inner": "eager"}
    return torch.compile(model, backend="light_interaction", options=options)


def check(kind, found):
    reason, remedy = BREAKING[kind]
    assert found["source"] == line_of(kind)
    assert reason in found["reason"]
    assert remedy in found["remedy"]


@each
def test_inspect_names_line_reason_and_remedy_once(kind, capsys):
    assert main(["inspect", f"{__file__}:target_{kind.__name__}", "--json", "--real"]) == 0
    shown = json.loads(capsys.readouterr().out)
    (found,) = shown["graph_breaks"]
    check(kind, found)


@each
def test_receipt_names_line_reason_and_remedy_once(kind):
    model, x = kind().eval(), torch.ones(2, 4)
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))
    report = lipass.report()
    (found,) = report.to_dict()["graph_breaks"]
    check(kind, found)
    assert f"graph break at {line_of(kind)}\n" in report.table()
    assert max(map(len, report.table().splitlines())) <= 80


def test_model_in_one_graph_has_none(capsys):
    compiled(Quiet())(torch.ones(2, 4))
    assert lipass.report().to_dict()["graph_breaks"] == []
    assert "graph break" not in lipass.report().table()
    assert main(["inspect", f"{__file__}:quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graph_breaks"] == []


def test_breaks_of_other_backends_are_not_in_the_receipt():
    with torch.no_grad():
        torch.compile(Prints(), backend="eager")(torch.ones(2, 4))
    compiled(Quiet())(torch.ones(2, 4))
    assert lipass.report().to_dict()["graph_breaks"] == []


def test_compiling_again_for_other_sizes_counts_a_place_once():
    fn = compiled(Prints())
    with torch.no_grad():
        fn(torch.ones(2, 4))
        fn(torch.ones(3, 4))
    assert len(lipass.report().graph_breaks) == 1


def test_reason_without_hints_has_a_remedy():
    frames = [SimpleNamespace(filename="/home/user/model.py", lineno=7)]
    found = break_of(SimpleNamespace(user_stack=frames, reason="strange"))
    assert (found.source, found.reason) == ("model.py:7", "strange")
    assert found.remedy.startswith("move what breaks the graph out of forward")
    assert break_of(SimpleNamespace(user_stack=[], reason="")).reason == "unknown"


def test_a_graph_that_is_left_before_the_line_that_stopped_it_is_told_in_words():
    frames = [SimpleNamespace(filename="/home/user/model.py", lineno=7)]
    found = break_of(SimpleNamespace(user_stack=frames, reason="step_unsupported"))
    assert "stopped behind this line" in found.reason
    assert "TORCH_LOGS=graph_breaks" in found.remedy


def test_kinds_of_one_line_are_kept_apart():
    a, b = GraphBreak("model.py:7", "a: x", "do"), GraphBreak("model.py:7", "b: x", "do")
    again = GraphBreak("model.py:7", "a: y", "do not")
    assert distinct([a, b, again, a]) == [a, b]
