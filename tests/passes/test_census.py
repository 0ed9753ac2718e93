"""Count attention in every spelling that is found, and what looks like it and is left alone."""

import pytest
import torch
from spellings import FACTS, NAMED, NEAR_MISSES, SPARSE, SPELLINGS, args, heads, model
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from lipass.passes.attention.site import SDPA, sites
from lipass.passes.graph.calls import is_call

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def run_rewritten(gm, fn, inputs):
    """Call a graph as Dynamo would, after passes changed it in place."""
    gm.recompile()
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(fn, backend=lambda _, __: gm.forward, dynamic=False)(*inputs)


@pytest.fixture
def rewritten(trace, apply):
    """Return the sites, the value at budget 1.0 and how often the sparse call was inserted."""

    def run(fn, inputs, text=NAMED):
        gm = trace(fn, inputs)
        apply(gm, f"{text},sparse-attention")
        count = len(gm.graph.find_nodes(op="call_function", target=SPARSE))
        found = [site for _, site in sites(gm.graph)]
        return found, run_rewritten(gm, fn, inputs), count

    return run


def test_the_census_is_large():
    assert len({name.split("-")[0] for name in SPELLINGS}) >= 12
    assert len(NEAR_MISSES) >= 25


@pytest.mark.parametrize("name", SPELLINGS)
def test_spelling_is_found_and_equal_at_budget_one(rewritten, name):
    fn, dtype = model(SPELLINGS[name]), torch.float32
    if name.endswith("casts") and "sdpa" not in name:
        dtype = torch.bfloat16
    inputs = args(dtype)
    ((site,), actual, count) = rewritten(fn, inputs)
    assert (site.role, count) == ("decode", 1), site.reason
    assert [s.role for s in site.segments] == ["text", "history", "current"]
    assert site.q_grid == (4, 4, 4)
    # a product in bfloat16 is off by 2^-8 of its value
    tolerance = 1e-5 if dtype == torch.float32 and "casts" not in name else 3e-2
    torch.testing.assert_close(actual, fn(*inputs), atol=tolerance, rtol=tolerance)


def self_attention(attend):
    def run(x, y):
        return attend(heads(x), heads(x * 2), heads(x + 3)), y

    return run


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_left_alone(trace, apply, name):
    attend, reason = NEAR_MISSES[name]
    gm = trace(self_attention(attend), (args()[0], torch.zeros(1)))
    before = [n.target for n in gm.graph.nodes if is_call(n, SDPA)]
    apply(gm, f"{FACTS},sparse-attention")
    assert (reason, "other") in [(site.reason, site.role) for _, site in sites(gm.graph)]
    # a mask written by hand becomes that of SDPA, which is dense too
    if not reason.startswith("it has a mask"):
        assert [n.target for n in gm.graph.nodes if is_call(n, SDPA)] == before
    assert not gm.graph.find_nodes(op="call_function", target=SPARSE)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b, c: a @ b @ c,
        lambda a, b, c: torch.relu(a) @ b + c,
        lambda a, b, c: (a.softmax(-1)) @ b,
        lambda a, b, c: F.linear(F.linear(a, b).relu(), c),
    ],
    ids=["three matrices", "relu of an input", "weights that are given", "linear layers"],
)
def test_products_that_are_no_attention_are_no_sites(trace, apply, fn):
    gm = trace(fn, [torch.randn(8, 8) for _ in range(3)])
    apply(gm, FACTS)
    assert sites(gm.graph) == []


def test_lookup_in_learned_tables_is_no_site(trace, apply):
    table = torch.nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
    module = torch.nn.Module()
    module.table = table
    module.forward = lambda x: (x @ table[0].mT).softmax(-1) @ table[1]
    gm = trace(module, (torch.randn(8, 8),))
    apply(gm, FACTS)
    assert sites(gm.graph) == []


def test_keys_of_another_order_are_no_current_keys(rewritten):
    def fn(x, text, history):
        x = x + 1
        turned = heads(x.transpose(2, 3))
        key = torch.cat([text, history, turned], 2)
        return F.scaled_dot_product_attention(heads(x), key, key)

    ((site,), _, count) = rewritten(fn, args())
    reason = "q and k are tokens of different grids, (4, 4, 4) and (4, 4, 4)"
    assert (site.role, site.reason, count) == ("other", f"key piece 2 of 64: {reason}", 0)


def test_keys_of_another_grid_are_no_current_keys(rewritten):
    def fn(x, text, history):
        x = x + 1
        other = heads(x.reshape(1, 16, 2, 8, 4))
        key = torch.cat([text, history, other], 2)
        return F.scaled_dot_product_attention(heads(x), key, key)

    ((site,), _, count) = rewritten(fn, args())
    reason = "q and k are tokens of different grids, (4, 4, 4) and (2, 8, 4)"
    assert (site.role, site.reason, count) == ("other", f"key piece 2 of 64: {reason}", 0)


def causal(b, h, i, j):
    return i >= j


def test_flex_attention_with_a_mask_function_stays(rewritten):
    mask = create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=32)

    def fn(x):
        q = heads(x)
        return flex_attention(q, q, q, block_mask=mask)

    ((site,), _, count) = rewritten(fn, args()[:1], FACTS)
    assert (site.role, count) == ("other", 0)
    assert site.reason == "mask_mod %mask_fn_0 masks its scores"


def test_flex_attention_over_some_blocks_stays(rewritten):
    number, first = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2).int()
    mask = BlockMask.from_kv_blocks(number, first, BLOCK_SIZE=32)

    def fn(x):
        q = heads(x)
        return flex_attention(q, q, q, block_mask=mask)

    ((site,), _, count) = rewritten(fn, args()[:1], FACTS)
    assert (site.role, count) == ("other", 0)
    assert site.reason == "its block mask is an input, whose blocks are data"


@pytest.mark.parametrize("write", ["setitem", "copy_"])
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_slices_of_a_preallocated_cache(rewritten, write, layout):
    axis = 2 if layout == "BHLD" else 1

    def place(x):
        return x if layout == "BHLD" else x.transpose(1, 2)

    def fn(x, k_cache, v_cache):
        q = heads(x)
        for cache, new in ((k_cache, q * 2), (v_cache, q * 3)):
            if write == "setitem" and axis == 2:
                cache[:, :, 48:112] = new
            elif write == "setitem":
                cache[:, 48:112] = place(new)
            else:
                index = (slice(None),) * axis + (slice(48, 112),)
                cache[index].copy_(place(new))
        index = (slice(None),) * axis + (slice(None, 112),)
        return F.scaled_dot_product_attention(q, place(k_cache[index]), place(v_cache[index]))

    caches = [place(torch.randn(1, 2, 128, 8)).contiguous() for _ in range(2)]
    inputs = (args()[0], *caches)
    expected = fn(inputs[0], *(c.clone() for c in caches))
    found, actual, count = rewritten(fn, inputs, FACTS + "{segments=history+current}")
    ((site,), count) = found, count
    assert (site.role, count) == ("decode", 1), site.reason
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_cache_that_is_written_again_is_one_piece(rewritten):
    def fn(x, k_cache, v_cache):
        q = heads(x)
        for cache in (k_cache, v_cache):
            cache[:, :, 48:112] = q
            cache[:, :, :8] = 0
        keys, values = k_cache[:, :, :112], v_cache[:, :, :112]
        return F.scaled_dot_product_attention(q, keys, values)

    inputs = (args()[0], torch.randn(1, 2, 128, 8), torch.randn(1, 2, 128, 8))
    ((site,), _, count) = rewritten(fn, inputs, FACTS)
    assert (site.role, count) == ("other", 0)


def test_caches_in_dicts(rewritten):
    def fn(x, cache):
        q = heads(x)
        keys = torch.cat([cache["text"]["k"], cache["history"]["k"], q], 2)
        values = torch.cat([cache["text"]["v"], cache["history"]["v"], q], 2)
        return F.scaled_dot_product_attention(q, keys, values)

    x, text, history = args()
    cache = {"text": {"k": text, "v": text + 1}, "history": {"k": history, "v": history - 1}}
    ((site,), actual, count) = rewritten(fn, (x, cache))
    assert (site.role, count) == ("decode", 1)
    torch.testing.assert_close(actual, fn(x, cache), atol=1e-5, rtol=1e-5)


def test_site_says_what_proves_its_grid(rewritten):
    ((site,), _, _) = rewritten(model(SPELLINGS["sdpa-positional"]), args())
    assert site.proof == "%flatten merges T, Y, X"
