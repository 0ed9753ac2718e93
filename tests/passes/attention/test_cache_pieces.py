import pytest
import torch
from torch.fx import Interpreter
from torch.nn import functional as F

from lipass.passes.attention import cache_pieces, match
from lipass.passes.attention.site import SDPA
from lipass.passes.core import PassContext

NEW, CACHE = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 16, 8)


@pytest.fixture
def cut(trace):
    """Return the attention call of a function, and the pieces of its keys and its values."""

    def run(fn, *args):
        graph = trace(fn, tuple(x.clone() for x in args)).graph
        (call,) = graph.find_nodes(op="call_function", target=SDPA)
        whole = match.attention(call)
        if isinstance(whole, match.Refusal):
            return call, None
        found = cache_pieces.cut(whole, call, PassContext.of(graph))
        assert cache_pieces.is_cut(whole, call) is (found != whole)
        return call, (found.keys, found.values)

    return run


def in_one_piece(found):
    call, pieces = found
    return pieces is None or pieces == ((call.args[1],), (call.args[2],))


def joined(call, pieces, args):
    """Run the graph; return the pieces joined, the keys and values, and the last pieces."""
    interpreter = Interpreter(call.graph.owning_module, garbage_collect_values=False)
    interpreter.run(*(x.clone() for x in args))
    env = interpreter.env
    parts = [[env[piece] for piece in part] for part in pieces]
    return [torch.cat(part, 2) for part in parts], [env[x] for x in call.args[1:3]], parts


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
    call, pieces = cut(attend(write, lambda cache, _: cache[:, :, start:10]), *args)
    together, keys, parts = joined(call, pieces, args)
    for whole, key, part in zip(together, keys, parts, strict=True):
        assert torch.equal(whole, key)
        assert len(part) == 2
        assert torch.equal(part[-1], NEW * 2)


def test_nobody_reads_what_was_there(cut):
    _, pieces = cut(attend(), NEW, CACHE, CACHE)
    assert [list(part[0].users) for part in pieces] == [[], []]


def by_positions(cache, new):
    cache[:, :, torch.arange(6, 10)] = new


def by_shifted_positions(cache, new):
    cache[:, :, torch.arange(4) + 6] = new


@pytest.mark.parametrize(
    "write",
    [
        by_positions,
        by_shifted_positions,
        lambda cache, new: cache.index_copy_(2, torch.arange(6, 10), new),
    ],
    ids=["setitem", "shifted", "index_copy_"],
)
def test_positions_that_are_a_range(cut, write):
    args = NEW, CACHE, CACHE + 1
    call, pieces = cut(attend(write), *args)
    together, keys, _ = joined(call, pieces, args)
    assert [len(part) for part in pieces] == [2, 2]
    assert all(map(torch.equal, together, keys))


@pytest.mark.parametrize(
    "scatter",
    [
        lambda cache, new: torch.slice_scatter(cache, new, 2, 6, 10),
        lambda cache, new: cache.slice_scatter(new, dim=2, start=6, end=10),
        lambda cache, new: cache.index_copy(2, torch.arange(6, 10), new),
    ],
    ids=["function", "method", "index_copy"],
)
def test_copy_of_a_cache_with_new_keys(cut, scatter):
    def fn(new, *caches):
        made = [scatter(cache, new * 2) for cache in caches]
        return F.scaled_dot_product_attention(new, *(one[:, :, :10] for one in made))

    args = NEW, CACHE, CACHE + 1
    call, pieces = cut(fn, *args)
    together, keys, _ = joined(call, pieces, args)
    assert [len(part) for part in pieces] == [2, 2]
    assert all(map(torch.equal, together, keys))


def test_cache_behind_text(cut):
    def fn(new, k_cache, v_cache, text):
        caches = k_cache, v_cache
        for cache in caches:
            fill(cache, new * 2)
        joint = [torch.cat([text, cache[:, :, :10]], 2) for cache in caches]
        return F.scaled_dot_product_attention(new, *joint)

    args = NEW, CACHE, CACHE + 1, NEW[:, :, :3]
    call, pieces = cut(fn, *args)
    together, keys, _ = joined(call, pieces, args)
    assert [len(part) for part in pieces] == [3, 3]
    assert all(map(torch.equal, together, keys))


def test_whole_cache_whose_end_was_written(cut):
    def write(cache, new):
        cache[:, :, :12] = cache[:, :, 4:].clone()
        cache[:, :, 12:] = new

    args = NEW, CACHE, CACHE + 1
    call, pieces = cut(attend(write, lambda cache, _: cache), *args)
    together, keys, _ = joined(call, pieces, args)
    assert [len(part) for part in pieces] == [2, 2]
    assert all(map(torch.equal, together, keys))


@pytest.mark.parametrize(
    ("read", "lengths"),
    [
        pytest.param(lambda cache, _: cache, [6, 4, 6], id="whole"),
        pytest.param(lambda cache, _: cache[:, :, :12], [6, 4, 2], id="ends later"),
        pytest.param(lambda cache, _: cache[:, :, 2:], [4, 4, 6], id="ends with the cache"),
        pytest.param(lambda cache, _: cache[:, :, 6:], [4, 6], id="begins with the write"),
    ],
)
@pytest.mark.parametrize(
    "write",
    [
        fill,
        by_positions,
        lambda cache, new: cache.index_copy_(2, torch.arange(6, 10), new),
    ],
    ids=["slices", "positions", "index_copy_"],
)
def test_ring_that_goes_on_behind_what_was_written(cut, write, read, lengths):
    args = NEW, CACHE, CACHE + 1
    call, pieces = cut(attend(write, read), *args)
    together, keys, parts = joined(call, pieces, args)
    assert all(map(torch.equal, together, keys))
    assert [[one.shape[2] for one in part] for part in parts] == [lengths, lengths]


def test_copy_of_a_ring_that_goes_on_behind_what_is_new(cut):
    def fn(new, *caches):
        made = [torch.slice_scatter(cache, new * 2, 2, 6, 10) for cache in caches]
        return F.scaled_dot_product_attention(new, *(one[:, :, :12] for one in made))

    args = NEW, CACHE, CACHE + 1
    call, pieces = cut(fn, *args)
    together, keys, parts = joined(call, pieces, args)
    assert all(map(torch.equal, together, keys))
    assert [len(part) for part in parts] == [3, 3]


def test_ring_of_keys_whose_values_end_elsewhere(cut):
    def fn(new, cache, values):
        for one in (cache, values):
            fill(one, new * 2)
        return F.scaled_dot_product_attention(new, cache[:, :, :12], values[:, :, 2:14])

    assert in_one_piece(cut(fn, NEW, CACHE, CACHE))


@pytest.mark.parametrize("start", [None, 0, 6])
def test_read_that_is_all_that_was_written(cut, start):
    def write(cache, new):
        cache[:, :, start : 4 + (start or 0)] = new

    stop, args = 4 + (start or 0), (NEW, CACHE, CACHE + 1)
    read = attend(write, lambda cache, _: cache[:, :, start:stop])
    call, pieces = cut(read, *args)
    together, keys, parts = joined(call, pieces, args)
    assert [len(part) for part in parts] == [1, 1]
    assert call.args[1] not in pieces[0]
    assert all(map(torch.equal, together, keys))


@pytest.mark.parametrize("index", [torch.tensor([6, 7, 8, 9]), torch.tensor([3, 1, 0, 9])])
def test_positions_that_are_data(cut, index):
    def fn(new, index, *caches):
        for cache in caches:
            cache[:, :, index] = new * 2
        return F.scaled_dot_product_attention(new, *(cache[:, :, :10] for cache in caches))

    assert in_one_piece(cut(fn, NEW, index, CACHE, CACHE + 1))


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
    assert in_one_piece(cut(attend(write), NEW, CACHE, CACHE))


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda cache, _: cache[:, :, :9], id="ends earlier"),
        pytest.param(lambda cache, _: cache[:, :, :-6], id="from the end"),
        pytest.param(lambda cache, _: cache[:, :, :10:2], id="every other token"),
        pytest.param(lambda cache, _: cache[:, :1, :10], id="one head"),
        pytest.param(lambda cache, _: cache[:, :, :10] * 2, id="scaled"),
        pytest.param(lambda cache, _: cache[:, :, :10].flip(2), id="in another order"),
    ],
)
def test_read_that_leaves_the_keys_in_one_piece(cut, read):
    assert in_one_piece(cut(attend(read=read), NEW, CACHE, CACHE))


def test_read_that_begins_behind_the_write(cut):
    assert in_one_piece(cut(attend(read=lambda cache, _: cache[:, :, 8:10]), NEW, CACHE, CACHE))


def test_keys_are_not_cut_without_the_values(cut):
    def fn(new, cache, values):
        fill(cache, new)
        return F.scaled_dot_product_attention(new, cache[:, :, :10], values[:, :, :10])

    assert in_one_piece(cut(fn, NEW, CACHE, CACHE))


def test_copies_of_what_was_written_to_are_no_pieces(trace):
    def joined(cache, new):
        whole = torch.cat([cache, new], 2)
        whole.mul_(2)
        return whole.clone()

    def fn(new, keys, values):
        return F.scaled_dot_product_attention(new, joined(keys, new), joined(values, new))

    graph = trace(fn, (NEW.clone(), CACHE.clone(), CACHE.clone())).graph
    (call,) = graph.find_nodes(op="call_function", target=SDPA)
    found = match.attention(call)
    assert found == match.Refusal("%mul_ writes to its keys or values in place")


def test_what_was_joined_late_is_no_piece_if_it_was_written_to(trace):
    def fn(new, keys, values):
        whole = torch.cat([values, new], 2)
        whole.mul_(2)
        return F.scaled_dot_product_attention(new, torch.cat([keys, new], 2).sin(), whole.clone())

    graph = trace(fn, (NEW.clone(), CACHE.clone(), CACHE.clone())).graph
    (call,) = graph.find_nodes(op="call_function", target=SDPA)
    found = match.attention(call)
    assert cache_pieces.even(found, call, PassContext.of(graph)) is found


def test_pieces_of_another_dtype_than_the_keys_are_no_pieces(cut):
    """Keys in single precision are written to a cache of half of it."""
    half = [x.to(torch.bfloat16) for x in (CACHE, CACHE + 1)]
    read = lambda cache, new: cache[:, :, :10]  # noqa: E731

    def fn(new, *caches):
        made = [(cache, new.float() * 2) for cache in caches]
        for one in made:
            fill(*one)
        return F.scaled_dot_product_attention(new, *(read(*one) for one in made))

    assert in_one_piece(cut(fn, NEW.to(torch.bfloat16), *half))
