import pytest
import torch
from torch.fx import Interpreter
from torch.nn import functional as F

from lipass.passes.attention.cache_pieces import cut_cache
from lipass.passes.attention.site import SDPA, pieces_of
from lipass.passes.core import PassContext

NEW, CACHE = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 16, 8)


@pytest.fixture
def cut(trace):
    """Return the attention call of a function, whose caches are cut."""

    def run(fn, *args):
        graph = trace(fn, tuple(x.clone() for x in args)).graph
        (call,) = graph.find_nodes(op="call_function", target=SDPA)
        cut_cache(call, PassContext.of(graph))
        return call

    return run


def fill(cache, new):
    cache[:, :, 6:10] = new


def attend(write=fill, read=lambda cache, new: cache[:, :, :10]):
    """Attend to what is read from two caches that were written to."""

    def run(new, *caches):
        made = [(cache, new * 2) for cache in caches]
        for one in made:
            write(*one)
        return F.scaled_dot_product_attention(new, *(read(*one) for one in made))

    return run


@pytest.mark.parametrize("start", [None, 0, 2])
@pytest.mark.parametrize(
    "write",
    [fill, lambda cache, new: cache[:, :, 6:10].copy_(new)],
    ids=["setitem", "copy_"],
)
def test_pieces_are_what_was_there_and_what_was_written(cut, write, start):
    args = NEW, CACHE, CACHE + 1
    call = cut(attend(write, lambda cache, _: cache[:, :, start:10]), *args)
    interpreter = Interpreter(call.graph.owning_module, garbage_collect_values=False)
    interpreter.run(*(x.clone() for x in args))
    values = {node.name: value for node, value in interpreter.env.items()}
    for keys, (before, new) in zip(call.args[1:], pieces_of(call), strict=True):
        assert torch.equal(torch.cat([values[before], values[new]], 2), values[keys.name])
        assert torch.equal(values[new], NEW * 2)


def test_nobody_reads_what_was_there(cut):
    call = cut(attend(), NEW, CACHE, CACHE)
    before = {pieces[0] for pieces in pieces_of(call)}
    assert [list(node.users) for node in call.graph.nodes if node.name in before] == [[], []]


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda cache, new: None, id="nothing"),
        pytest.param(lambda cache, new: fill(cache, 0.0), id="a constant"),
        pytest.param(lambda cache, new: fill(cache, new[:, :, :1]), id="one token"),
        pytest.param(lambda cache, new: (fill(cache, new), cache.mul_(2)), id="all again"),
        pytest.param(lambda cache, new: (fill(cache, new), cache[:, :1].zero_()), id="a head"),
        pytest.param(lambda cache, new: (fill(cache, new), new.mul_(2)), id="what was written"),
        pytest.param(lambda cache, new: cache[:, :, :10][:, :, 6:].copy_(new), id="two slices"),
        pytest.param(lambda cache, new: cache[:, :, -10:-6].copy_(new), id="from the end"),
        pytest.param(lambda cache, new: cache[:, :1, 6:10].copy_(new[:, :1]), id="one head"),
        pytest.param(lambda cache, new: cache[..., 6:10, :].copy_(new), id="ellipsis"),
        pytest.param(lambda cache, new: cache.narrow(2, 6, 4).copy_(new), id="narrow"),
        pytest.param(
            lambda cache, new: (fill(cache, new), torch.mul(cache, 2, out=cache)), id="out"
        ),
        pytest.param(
            lambda cache, new: (fill(cache, new), torch._foreach_mul_([cache], 2.0)), id="a list"
        ),
    ],
)
def test_write_that_leaves_the_keys_in_one_piece(cut, write):
    assert pieces_of(cut(attend(write), NEW, CACHE, CACHE)) is None


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda cache, _: cache, id="whole"),
        pytest.param(lambda cache, _: cache[:, :, :9], id="ends earlier"),
        pytest.param(lambda cache, _: cache[:, :, :12], id="ends later"),
        pytest.param(lambda cache, _: cache[:, :, 2:], id="ends with the cache"),
        pytest.param(lambda cache, _: cache[:, :, :-6], id="from the end"),
        pytest.param(lambda cache, _: cache[:, :, :10:2], id="every other token"),
        pytest.param(lambda cache, _: cache[:, :1, :10], id="one head"),
        pytest.param(lambda cache, _: cache[:, :, :10] * 2, id="scaled"),
        pytest.param(lambda cache, _: cache[:, :, :10].flip(2), id="in another order"),
    ],
)
def test_read_that_leaves_the_keys_in_one_piece(cut, read):
    assert pieces_of(cut(attend(read=read), NEW, CACHE, CACHE)) is None


@pytest.mark.parametrize(
    ("start", "middle"), [(None, None), (0, 0), (None, 0), (6, 6), (8, 6)], ids=str
)
def test_read_that_begins_where_the_write_does_or_behind(cut, start, middle):
    def write(cache, new):
        cache[:, :, middle : 4 + (middle or 0)] = new

    stop = 4 + (middle or 0)
    call = cut(attend(write, lambda cache, _: cache[:, :, start:stop]), NEW, CACHE, CACHE)
    assert pieces_of(call) is None


def test_keys_are_not_cut_without_the_values(cut):
    def fn(new, cache, values):
        fill(cache, new)
        return F.scaled_dot_product_attention(new, cache[:, :, :10], values[:, :, :10])

    assert pieces_of(cut(fn, NEW, CACHE, CACHE)) is None
