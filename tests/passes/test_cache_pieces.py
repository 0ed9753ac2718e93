import pytest
import torch
from torch.fx import Interpreter
from torch.nn import functional as F

from lipass.passes.cache_pieces import cut_cache
from lipass.passes.core import PassContext
from lipass.passes.match import SDPA
from lipass.passes.site import pieces_of


@pytest.fixture
def cut(trace):
    """Cut the keys of the attention in a function; returns the call."""

    def run(fn, *args):
        graph = trace(fn, tuple(x.clone() for x in args)).graph
        (call,) = graph.find_nodes(op="call_function", target=SDPA)
        cut_cache(call, PassContext.of(graph))
        return call

    return run


NEW, CACHE = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 16, 8)


def attend(fill, read=lambda cache, new: cache[:, :, :10]):
    """Attend from new tokens to what is read from two caches that were filled with them."""

    def run(new, k_cache, v_cache):
        keys = []
        for cache, made in ((k_cache, new * 2), (v_cache, new * 3)):
            fill(cache, made)
            keys.append(read(cache, made))
        return F.scaled_dot_product_attention(new, *keys)

    return run


def fill(cache, new):
    cache[:, :, 6:10] = new


@pytest.mark.parametrize("start", [None, 0, 2])
@pytest.mark.parametrize("method", ["setitem", "copy_"])
def test_pieces_are_what_was_there_and_what_was_written(cut, start, method):
    def copy(cache, new):
        cache[:, :, 6:10].copy_(new)

    write = fill if method == "setitem" else copy
    args = NEW, CACHE, CACHE + 1
    call = cut(attend(write, lambda cache, _: cache[:, :, start:10]), *args)
    interpreter = Interpreter(call.graph.owning_module, garbage_collect_values=False)
    interpreter.run(*(x.clone() for x in args))
    env = {node.name: value for node, value in interpreter.env.items()}
    for keys, pieces in zip(call.args[1:], pieces_of(call), strict=True):
        assert torch.equal(torch.cat([env[name] for name in pieces], 2), env[keys.name])
        assert env[pieces[1]].shape[2] == 4


def test_call_is_left_as_it_is(cut):
    call = cut(attend(fill), NEW, CACHE, CACHE)
    assert [x.target.__name__ for x in call.args[1:]] == ["getitem", "getitem"]
    assert all(not node.users for node in call.graph.nodes if node.name in sum(pieces_of(call), ())[::2])
