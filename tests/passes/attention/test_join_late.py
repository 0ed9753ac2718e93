import pytest
import torch
from spellings import SPARSE, args, heads, swap
from torch.nn import functional as F

from lipass.passes.attention.site import sites

TEXT = "canonicalize,find-attention{segments=text+history+current},sparse-attention"


def attend(x, text, history, between, before=None):
    """Attend to pieces `[B, L, H, D]` that `between` turns into `[B, H, L, D]`."""
    q = heads(x)
    pieces = [swap(text), swap(history), swap(q * 2)]
    keys = torch.cat(pieces, 1)
    if before is not None:
        before(keys, pieces)
    keys = between(keys)
    return F.scaled_dot_product_attention(q, keys, keys)


@pytest.fixture
def roles(trace, apply):
    def run(fn):
        gm = trace(fn, args())
        apply(gm, TEXT)
        calls = gm.graph.find_nodes(op="call_function", target=SPARSE)
        return [site.role for _, site in sites(gm.graph)], len(calls)

    return run


@pytest.mark.parametrize(
    "between",
    [
        swap,
        lambda k: k.permute(0, 2, 1, 3).contiguous().clone(),
        lambda k: k.flatten(2).unflatten(2, (2, 8)).transpose(1, 2),
        lambda k: k.reshape(1, -1, 16).view(1, -1, 2, 8).transpose(2, 1),
    ],
    ids=["transposed", "copied", "split into heads", "reshaped twice"],
)
def test_keys_are_joined_behind_what_lies_between(roles, between):
    assert roles(lambda *a: attend(*a, between)) == (["decode"], 1)


@pytest.mark.parametrize(
    "between",
    [
        lambda k: swap(k) * 2,
        lambda k: swap(k.flip(1)),
        lambda k: swap(k.roll(3, 1)),
        lambda k: k.reshape(1, 2, -1, 8),
        lambda k: swap(k)[:, :, torch.arange(102)],
    ],
    ids=["scaled", "flipped", "rolled", "tokens mixed with heads", "gathered"],
)
def test_keys_that_are_computed_in_between_stay_one_piece(roles, between):
    assert roles(lambda *a: attend(*a, between)) == (["other"], 0)


@pytest.mark.parametrize(
    "before",
    [
        lambda keys, pieces: keys.mul_(2),
        lambda keys, pieces: pieces[2].mul_(2),
        lambda keys, pieces: keys[:, :3].zero_(),
    ],
    ids=["joined keys", "a piece", "a view"],
)
def test_keys_that_are_written_stay_one_piece(roles, before):
    assert roles(lambda *a: attend(*a, swap, before)) == (["other"], 0)


def test_keys_with_another_reader_stay_one_piece(roles):
    def fn(x, text, history):
        seen = []
        out = attend(x, text, history, lambda k: seen.append(swap(k)) or seen[0])
        return out, seen[0] + 1

    assert roles(fn) == (["other"], 0)
