from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from lipass.passes.core import Numerics, Pass, PassContext, PassError, PassPipeline
from lipass.passes.exact.share_blocks import ShareBlocks
from lipass.passes.printer import print_graph
from lipass.passes.runner import run_pipeline


@dataclass(frozen=True)
class Behind(Pass):
    name: ClassVar[str] = "behind"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    requires: ClassVar[tuple[str, ...]] = ("toy",)

    def run(self, graph, ctx):
        raise AssertionError("it must not run")


@dataclass(frozen=True)
class Last(Behind):
    name: ClassVar[str] = "last"
    requires: ClassVar[tuple[str, ...]] = ("behind",)


@dataclass(frozen=True)
class Toy(Pass):
    name: ClassVar[str] = "toy"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    does: str = "nothing"

    def run(self, graph, ctx):
        relu = next(node for node in graph.nodes if node.target == torch.relu)
        if self.does == "raise":
            for _ in ctx.visit([relu]):
                raise KeyError("lost")
        if self.does == "break":
            relu.target = torch.sum
        if self.does == "half":
            relu.meta["lipass_fact"] = "half a fact"
            relu.args[0].meta["example_value"] = None
            ctx.note("somewhere", "rewritten", "half of it")
            graph.owning_module.add_module("outlined", torch.nn.ReLU())
            with graph.inserting_before(relu):
                relu.replace_all_uses_with(graph.call_module("outlined", (relu.args[0],)))
            graph.erase_node(relu)
            raise KeyError("lost")
        if self.does == "drop":
            relu.replace_all_uses_with(relu.args[0])
        ctx.note("somewhere", "kept", "because")
        return self.does != "nothing"


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x):
        return torch.relu(self.inner(x)) + 1


@pytest.fixture
def run(trace):
    def go(does):
        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Net()

            def forward(self, x):
                return self.net(x)

        gm = trace(Outer(), (torch.randn(3, 2),))
        ctx = PassContext.of(gm.graph)
        return gm, run_pipeline(PassPipeline((Toy(does),)), gm, ctx, diff=True)

    return go


def test_record_says_what_happened(run):
    _, (record,) = run("nothing")
    assert (record.name, record.numerics, record.changed, record.diff) == (
        "toy",
        "exact",
        False,
        "",
    )
    assert [(n.pass_name, n.site, n.action, n.reason) for n in record.notes] == [
        ("toy", "somewhere", "kept", "because")
    ]
    assert record.seconds > 0


def test_dead_code_goes_without_the_pass_doing_anything(run):
    gm, (record,) = run("drop")
    assert "relu" not in gm.code
    assert record.diff.splitlines()[0].startswith("-%relu")


def test_failure_names_pass_node_and_module(run):
    with pytest.raises(PassError, match=r"pass 'toy' failed on %relu \(net\): 'lost'") as failure:
        run("raise")
    assert isinstance(failure.value.__cause__, KeyError)


def test_invalid_graph_names_the_pass(run):
    with pytest.raises(PassError, match=r"pass 'toy' failed: relu is torch\.float32") as failure:
        run("break")
    assert isinstance(failure.value.__cause__, PassError)


def test_pass_that_fails_is_undone(trace):
    x = torch.randn(3, 2)
    gm = trace(Net(), (x,))
    before, facts = print_graph(gm.graph), [(n.name, {**n.meta}) for n in gm.graph.nodes]
    ctx = PassContext.of(gm.graph)
    pipeline = PassPipeline((Toy("half"), Behind(), Last()))
    toy, behind, last = run_pipeline(pipeline, gm, ctx, keep_going=True)
    assert print_graph(gm.graph) == before
    assert [(n.name, n.meta) for n in gm.graph.nodes] == facts
    assert not hasattr(gm, "outlined")
    assert toy.failure == "pass 'toy' failed: 'lost'"
    assert behind.failure == "left out, because it requires toy"
    assert last.failure == "left out, because it requires behind"
    assert [(n.pass_name, n.action) for n in ctx.notes] == [
        ("toy", "kept"), ("behind", "kept"), ("last", "kept"),
    ]  # fmt: skip
    gm.graph.lint()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_inductor_compiles_a_graph_in_which_a_pass_was_undone(monkeypatch):
    def fail(self, graph, ctx):
        graph.call_function(torch.add, (1, 1))
        raise KeyError("lost")

    monkeypatch.setattr(ShareBlocks, "run", fail)
    model, x = Net().eval(), torch.randn(3, 2)
    torch._dynamo.reset()
    with torch.no_grad():
        options = {"preset": "exact", "inner": "inductor"}
        fast = torch.compile(model, backend="light_interaction", options=options)
        torch.testing.assert_close(fast(x), model(x))


def test_pass_that_leaves_an_invalid_graph_is_undone(trace):
    gm = trace(Net(), (torch.randn(3, 2),))
    before = print_graph(gm.graph)
    (run,) = run_pipeline(
        PassPipeline((Toy("break"),)), gm, PassContext.of(gm.graph), keep_going=True
    )
    assert print_graph(gm.graph) == before
    assert run.failure.startswith("pass 'toy' failed: relu is torch.float32")


def test_dead_writes_stay(trace, apply):
    def fn(x):
        x.add_(1)
        y = torch.cat([x, x], dim=-1)
        return y * 2

    gm = trace(fn, (torch.randn(2),))
    records, _ = apply(gm, "canonicalize")
    assert records[0].changed
    assert "add_" in gm.code


def test_dumps_are_numbered(trace, apply, tmp_path, monkeypatch):
    monkeypatch.setenv("LIPASS_DUMP", str(tmp_path))
    apply(trace(lambda x: x.view(4) * 2, (torch.randn(2, 2),)), "canonicalize,find-attention")
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "00_dynamo.txt",
        "01_canonicalize.diff",
        "01_canonicalize.txt",
        "02_find_attention.diff",
        "02_find_attention.txt",
    ]
    assert "reshape(4)" in (folder / "01_canonicalize.diff").read_text()
    assert (folder / "02_find_attention.diff").read_text() == ""


def test_model_compiles_where_no_graph_can_be_dumped(trace, apply, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIPASS_DUMP", str(tmp_path / "file"))
    gm = trace(lambda x: x.view(4) * 2, (torch.randn(2, 2),))
    records, _ = apply(gm, "canonicalize")
    assert records[0].changed
    assert "LIPASS_DUMP must name a folder that can be written" in caplog.text


def test_nothing_is_dumped_by_default(trace, apply, tmp_path, monkeypatch):
    monkeypatch.delenv("LIPASS_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    apply(trace(lambda x: x.view(4) * 2, (torch.randn(2, 2),)), "canonicalize")
    assert list(tmp_path.iterdir()) == []


def test_structured_trace_shows_the_graph(trace, apply, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lipass.passes.runner.trace_artifact", lambda name, text: seen.append(name)
    )
    apply(trace(lambda x: x.view(4) * 2, (torch.randn(2, 2),)), "canonicalize,find-attention")
    assert seen == ["lipass_canonicalize"]
