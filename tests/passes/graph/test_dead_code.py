import torch
from torch import nn

from lipass.passes.graph.dead_code import erase_dead
from lipass.passes.graph.transforms import drop_unread, transforms


def names(graph):
    return [node.name for node in graph.nodes if "nesting" in node.name]


def test_bodies_keep_what_they_are_called_for(trace):
    gm = trace(lambda x: torch.vmap(torch.sin)(x), (torch.randn(2, 3),))
    outer = torch.fx.Graph()
    body = outer.get_attr("body")
    outer.output(outer.call_function(len, (body,)))
    whole = torch.fx.GraphModule({"body": gm}, outer)
    before = names(gm.graph)
    erase_dead(whole.graph)
    assert names(whole.body.graph) == before != []


def test_unread_transform_is_erased_and_a_read_one_stays(trace):
    def model(x):
        torch.vmap(lambda one: one * 2)(x)
        return torch.vmap(torch.cos)(x)

    gm = trace(model, (torch.randn(2, 3),))
    assert len(list(transforms(gm.graph))) == 2
    erase_dead(gm.graph)
    assert drop_unread(gm.graph)
    assert len(list(transforms(gm.graph))) == 1
    assert not drop_unread(gm.graph)
    gm.recompile()


class Draws(nn.Module):
    def forward(self, x):
        torch.vmap(lambda one: one + torch.rand(3), randomness="different")(x)
        return x * 2


def test_transform_that_draws_stays(trace):
    gm = trace(Draws(), (torch.randn(2, 3),))
    erase_dead(gm.graph)
    drop_unread(gm.graph)
    assert len(list(transforms(gm.graph))) == 1
