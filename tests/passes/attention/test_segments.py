import pytest
import torch
from torch.fx import Graph
from torch.nn import functional as F

from lipass.passes.attention import evidence, segments
from lipass.passes.attention.cameras import camera_of
from lipass.passes.attention.match import Refusal
from lipass.passes.attention.site import SDPA, AttentionSite, KeySegment, set_site

GRID = (4, 4, 4)  # 16 tokens a latent
X = torch.randn(1, 2, 64, 4)
ELSEWHERE = "the cameras belong to another piece"


def attend(x, k):
    return F.scaled_dot_product_attention(x, k, k)


def decide(tokens, current=False, owner_grid=None, **known):
    """Decide on keys of an earlier call whose queries have `owner_grid`."""
    key = Graph().placeholder("key")
    key.meta["example_value"] = torch.empty(1, 2, tokens, 4)
    owner = key.graph.call_function(SDPA, (key, key, key))
    set_site(owner, AttentionSite("layer:prefill", "", "prefill", owner_grid, (), 1.0))
    return segments.segment(key, current, GRID, {key: owner}, evidence.Evidence(**known))


@pytest.fixture
def call(trace):
    """Return one attention call of a function."""

    def run(fn, *args, index=0):
        return trace(fn, args).graph.find_nodes(op="call_function", target=SDPA)[index]

    return run


@pytest.mark.parametrize(
    ("tokens", "given", "role", "grid", "why"),
    [
        (64, {"current": True}, "current", GRID, "made from the tokens of q"),
        (32, {"named": "text"}, "text", (1, 1, 32), "named in segments"),
        (32, {"named": "history"}, "history", (2, 4, 4), "named in segments"),
        (32, {"camera": "w2c"}, "history", (2, 4, 4), "w2c"),
        (32, {"owner_grid": (1, 8, 4)}, "history", (1, 8, 4), "keys of layer:prefill"),
        (32, {"cache": "it is in it"}, "history", (2, 4, 4), "it is in it"),
        (6, {"camera": "w2c"}, "text", (1, 1, 6), "no whole number of latents of 16"),
        (
            32,
            {"camera_elsewhere": True},
            "text",
            (1, 1, 32),
            "the cameras belong to another piece",
        ),
    ],
)
def test_role_of_a_piece(tokens, given, role, grid, why):
    assert decide(tokens, **given) == KeySegment(role, tokens, grid, why)


@pytest.mark.parametrize(
    ("tokens", "given", "why"),
    [
        (32, {}, f"it could be text or 2 latents; {segments.NAME_THEM}"),
        (6, {"named": "history"}, "history must be whole latents of 16 tokens"),
        (6, {"cache": "it is in it"}, "history must be whole latents of 16 tokens"),
        (64, {"named": "current"}, "but it is not made from the tokens of q"),
        (64, {"current": True, "named": "text"}, "but segments calls it text"),
    ],
)
def test_piece_that_is_not_guessed(tokens, given, why):
    found = decide(tokens, **given)
    assert isinstance(found, Refusal)
    assert found.reason.endswith(why)


@pytest.mark.parametrize(
    ("pair", "current"),
    [
        (lambda x, y: (z := x + 1, z * 2), True),
        (lambda x, y: (x, x), False),
        (lambda x, y: (x + 1, y + 1), False),
        (lambda x, y: (z := x + 1, z[:, :, 1:]), False),
        (lambda x, y: (z := x + 1, attend(y, z)), False),
    ],
    ids=["one computed", "one input", "two inputs", "fewer tokens", "behind an attention"],
)
def test_current_keys_are_computed_from_what_q_is(call, pair, current):
    q, key, _ = call(lambda x, y: attend(*pair(x, y)), X, X + 1, index=-1).args
    assert segments.is_current_piece(q, key, 64) is current


@pytest.mark.parametrize(
    ("tokens", "cameras", "found"),
    [
        (32, (1, 6, 4, 4), "l_w2c_ has a camera for each of its latents"),
        (32, (1, 5, 4, 4), ""),
        (32, (1, 2, 4, 4), ""),
        (33, (1, 6, 4, 4), ""),
    ],
    ids=["for all", "one too few", "none for q", "no whole latents"],
)
def test_cameras_are_of_the_piece_and_of_q(call, tokens, cameras, found):
    one = call(lambda x, w2c: attend(x, x) * w2c.sum(), X[:, :, :tokens], torch.ones(cameras))
    assert camera_of(one.args[1], GRID) == found


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x, k: (attend(x, k), k.mT), "its keys are returned"),
        (
            lambda x, k: attend(attend(x, k), torch.cat([k, x], 2)),
            "its keys are history to later calls",
        ),
        (attend, ""),
        (lambda x, k: (attend(x, k), k + 1), ""),
    ],
    ids=["returned", "joined later", "read once", "changed"],
)
def test_keys_that_are_used_beyond_the_call(call, fn, why):
    one = call(lambda x: fn(x, x * 2), X)
    assert evidence.returned(one.args[1], one) == why


def test_origin_is_above_copies_and_moved_axes_and_below_a_cast(call):
    one = call(lambda x: attend(x, (x * 2).double().float().mT.clone().transpose(2, 3)), X)
    assert evidence.origin(one.args[1]).target == "float"
