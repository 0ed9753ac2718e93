"""What torch keeps is never stale: its keys hold the graph, and the code of the operators."""

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from lipass.passes import identity

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]

SPARSE = {"preset": "sparse", "sparse.token_grid": (4, 4), "sparse.dense_tokens": 0}


@pytest.fixture(autouse=True)
def _caches(fresh_dynamo):
    with fresh_cache():
        yield


@pytest.fixture
def compiled(mini_world, mini_world_inputs):
    """Compile as a new process does, and return the output, the cache hits and the misses."""
    model, inputs = mini_world, mini_world_inputs(8)

    def run(**options):
        torch._dynamo.reset()
        counters.clear()
        fn = torch.compile(model, backend="light_interaction", options={**SPARSE, **options})
        with torch.no_grad():
            out = fn(*inputs)
        found = counters["aot_autograd"], counters["inductor"]
        hits = found[0]["autograd_cache_hit"] + found[1]["fxgraph_cache_hit"]
        return out, hits, found[0]["autograd_cache_miss"] + found[1]["fxgraph_cache_miss"]

    run.model, run.inputs = model, inputs
    return run


def test_the_same_again_is_found(compiled):
    first, hits, misses = compiled()
    assert (hits, misses > 0) == (0, True)
    again, hits, misses = compiled()
    assert (hits > 0, misses) == (True, 0)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    "option",
    [
        {"sparse.budget_decode": 1.0},
        {"sparse.sink_latents": 3},
    ],
    ids=lambda option: ",".join(option),
)
def test_option_that_changes_the_graph_is_not_found(option, compiled):
    compiled()
    # What is found are pieces that the option does not concern, such as the dense twin.
    _, _, misses = compiled(**option)
    assert misses > 0


def test_option_that_changes_no_graph_is_found(compiled):
    first, _, _ = compiled()
    again, hits, misses = compiled(verify="off")
    assert (hits > 0, misses) == (True, 0)
    assert torch.equal(first, again)


def test_flipping_there_and_back_gives_what_each_option_computes(compiled):
    dense = {"sparse.budget_decode": 1.0, "sparse.budget_prefill": 1.0}
    first, _, _ = compiled()
    exact, _, _ = compiled(**dense)
    with torch.no_grad():
        torch.testing.assert_close(exact, compiled.model(*compiled.inputs))
    assert torch.equal(compiled()[0], first)
    assert torch.equal(compiled(**dense)[0], exact)


def test_changed_operator_is_not_found(compiled, monkeypatch):
    compiled()
    monkeypatch.setattr(identity, "kernels_hash", lambda: "changed")
    _, hits, misses = compiled()
    assert (hits, misses > 0) == (0, True)


def test_tag_of_the_user_stays_part_of_the_key(compiled):
    compiled()
    with torch.compiler.config.patch(cache_key_tag="mine"):
        _, hits, misses = compiled()
        assert (hits, misses > 0) == (0, True)
        assert torch.compiler.config.cache_key_tag == "mine"
    assert torch.compiler.config.cache_key_tag == ""
