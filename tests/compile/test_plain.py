"""A graph compiled with `off` inside a session that asks for more is told of, once."""

import pytest
import torch
from torch import nn

import lipass

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attends(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x)


def called(model, session, chunks=2):
    options = {"preset": "off", "inner": "eager"}
    fast = torch.compile(model, backend="light_interaction", options=options)
    x, w2c = torch.randn(1, 2, 16, 8), torch.eye(4).repeat(4, 1, 1)
    with session:
        for _ in range(chunks):
            with session.chunk(poses=None, query=w2c):
                fast(x)


@pytest.mark.parametrize("preset", ["sparse", "all"])
def test_session_is_told_once_that_off_does_nothing_of_it(preset):
    with pytest.warns(
        lipass.LipassWarning, match="sparse: on in the session, not in the graph"
    ) as told:
        called(Attends(), lipass.Session(preset=preset))
    assert len(told) == 1


def test_strict_session_refuses_a_graph_compiled_with_off():
    with pytest.raises(lipass.LipassError, match="got preset 'off' in the graph"):
        called(Attends(), lipass.Session(preset="sparse", strict=True))


@pytest.mark.parametrize("preset", ["off", "exact", "context"])
def test_nothing_is_told_where_the_graph_has_nothing_to_do(preset):
    called(Attends(), lipass.Session(preset=preset))


def test_nothing_is_told_of_a_model_without_attention():
    called(nn.Linear(8, 8), lipass.Session(preset="all"))
