"""What exchanges tensors with other processes stays where it is, once, and is never skipped."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from lipass.passes import PIPELINES
from lipass.passes.attention.site import sites
from lipass.passes.attention.token_grid import EXCHANGED
from lipass.passes.graph.collectives import is_collective
from lipass.passes.graph.dead_code import erase_dead

fc = pytest.importorskip("torch.distributed._functional_collectives")
fakes = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture(autouse=True)
def two_ranks():
    """This process is the first of two; what it gets from the other is made up."""
    dist.init_process_group("fake", store=fakes.FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def all_reduce(x):
    x = x.clone()
    dist.all_reduce(x)
    return x


def all_gather(x):
    return fc.all_gather_tensor(x, 1, dist.group.WORLD)


def all_to_all(x):
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x.contiguous())
    return out


def gather_list(x):
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    return torch.cat(parts, 1)


def into_tensor(x):
    out = x.new_empty(2 * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(out, x)
    return out


EXCHANGES = [all_reduce, all_gather, all_to_all, gather_list, into_tensor]
every = pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda one: one.__name__)
X = torch.randn(2, 4)


def collectives(graph):
    """Name the collectives of a graph, in order; those of its bodies are none here."""
    return [str(node.target) for node in graph.nodes if is_collective(node)]


@every
def test_collectives_are_known_as_dynamo_writes_them(trace, exchange):
    found = collectives(trace(lambda x: exchange(x.sin()).cos(), (X,)).graph)
    assert len(found) == 2  # it, and the wait for it
    assert all("_c10d_functional" in one for one in found)


def test_calls_within_one_process_are_none(trace):
    def fn(x):
        return F.linear(x, torch.eye(4)).sin().clone().add_(torch.rand(2, 4)).chunk(2)

    assert collectives(trace(fn, (X,)).graph) == []


def test_an_operator_of_a_library_that_is_told_a_group_is_one(trace):
    library = torch.library.Library("tests_of_collectives", "FRAGMENT")
    library.define("exchange(Tensor x, str group_name) -> Tensor")
    library.impl("exchange", lambda x, group_name: x.clone(), "CompositeExplicitAutograd")
    library.impl("exchange", lambda x, group_name: torch.empty_like(x), "Meta")
    gm = trace(lambda x: torch.ops.tests_of_collectives.exchange(x, "tp").sin(), (X,))
    assert len(collectives(gm.graph)) == 1


@every
def test_an_unread_collective_stays(trace, exchange):
    gm = trace(lambda x: (exchange(x), x.sin())[1], (X,))
    before = collectives(gm.graph)
    erase_dead(gm.graph)
    assert before
    assert collectives(gm.graph) == before


class Step(nn.Module):
    """A step that adds what all processes know of a condition, or of the latents."""

    def __init__(self, exchange, of="latents"):
        super().__init__()
        self.lin, self.exchange, self.of = nn.Linear(4, 4), exchange, of

    def forward(self, x, sigma, camera):
        shared = self.exchange(x if self.of == "latents" else camera)
        return self.lin(x + shared.flatten()[:4]) * sigma


SIGMAS = (1.0, 0.6, 0.3, 0.0)


def euler(net):
    def fn(x, sigmas, camera):
        for i, j in itertools.pairwise(range(len(SIGMAS))):
            x = x + (sigmas[j] - sigmas[i]) * net(x, sigmas[i], camera)
        return x

    return fn


LOOP = (X, torch.tensor(SIGMAS), torch.randn(2, 4))
IMPURE = "exchanges tensors with other processes"


@pytest.mark.parametrize("of", ["latents", "camera"])
@pytest.mark.parametrize("does", ["hoist-steps", "guard-steps"])
@every
def test_steps_that_exchange_are_neither_hoisted_nor_guarded(trace, apply, does, of, exchange):
    gm = trace(euler(Step(exchange, of)), LOOP)
    before = collectives(gm.graph)
    records, _ = apply(gm, f"canonicalize,find-attention,find-steps,{does}")
    assert len(before) == 2 * (len(SIGMAS) - 1)
    assert collectives(gm.graph) == before
    assert any(IMPURE in note.reason for note in records[-1].notes)


class Prompted(nn.Module):
    """Tokens that attend to a prompt, of which each process encodes a part."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x, text):
        q = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k = all_gather(self.key(text)).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


def test_a_gathered_prompt_is_gathered_in_every_call(trace, apply):
    gm = trace(Prompted(), (torch.randn(1, 6, 8), torch.randn(1, 5, 4)))
    before = collectives(gm.graph)
    facts = "canonicalize,find-attention,find-poses,find-steps"
    apply(gm, f"{facts},hoist-calls{{work_min=0 counted_writes=true}}")
    assert collectives(gm.graph) == before


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + all_reduce(self.down(torch.tanh(self.up(x))))


def test_layers_that_exchange_are_not_outlined(trace, apply):
    gm = trace(nn.Sequential(*(Layer() for _ in range(3))), (X,))
    before = collectives(gm.graph)
    records, _ = apply(gm, "canonicalize,find-attention,share-blocks{nodes_min=2}")
    assert collectives(gm.graph) == before
    assert any(IMPURE in note.reason for note in records[-1].notes)


class Split(nn.Module):
    """Tokens of a grid that are split over processes, and heads in attention."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, latents):
        x = latents.flatten(2).transpose(1, 2).chunk(2, 1)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 1, 3, 4)
        q, k, v = (self.whole(part).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)

    def whole(self, part):
        heads = part.unflatten(2, (2, 1)).permute(2, 1, 0, 3, 4)
        return all_to_all(heads).flatten(0, 1).transpose(0, 1)


def test_a_grid_is_not_proven_across_an_exchange(trace, apply):
    gm = trace(Split(), (torch.randn(1, 8, 4, 2, 2),))
    apply(gm, "canonicalize,find-attention")
    ((_, site),) = sites(gm.graph)
    assert (site.role, site.q_grid, site.reason) == ("other", None, EXCHANGED)
    apply(gm, "canonicalize,find-attention{token_grid=2x2}")
    ((_, site),) = sites(gm.graph)
    assert (site.role, site.q_grid) == ("self", (4, 2, 2))


def test_no_pipeline_moves_a_collective(trace, apply):
    gm = trace(Split(), (torch.randn(1, 8, 4, 2, 2),))
    before = collectives(gm.graph)
    for text in PIPELINES.values():
        apply(gm, text)
        assert collectives(gm.graph) == before
