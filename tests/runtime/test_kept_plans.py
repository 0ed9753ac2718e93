"""What calls follow plans of earlier ones, and which never do."""

import pytest
import torch
from mini_decode import SIGMAS, cameras
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.kernels import registry
from lipass.runtime.kept_plans import KeptPlans

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SPARSE = {
    "preset": "sparse", "sparse.tile": (1, 2, 2), "sparse.budget_decode": 0.3,
    "sparse.dense_tokens": 0, "sparse.sink_latents": 0,
}  # fmt: skip
LATENTS = 8


class Layers(nn.Module):
    """Decode behind a history in so many layers; 4 latents of 4x4 tokens."""

    def __init__(self, layers=4):
        super().__init__()
        self.layers, self.heads = layers, 2
        self.qkv = nn.ModuleList(nn.Linear(32, 96) for _ in range(layers))

    def forward(self, x, sigma, history):
        _, _, t, y, z = x.shape
        h = x.flatten(2).mT * (1 + sigma)
        for layer, stored in zip(self.qkv, history, strict=True):
            q, k, v = layer(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(
                q, torch.cat([stored, k], 2), torch.cat([-stored, v], 2)
            )
            h = h + out.transpose(1, 2).flatten(2)
        return h.mT.unflatten(-1, (t, y, z)).contiguous()


def compiled(model, **options):
    named = {"find-attention.segments": ("history", "current")}
    options = {**SPARSE, **named, "inner": "eager", **options}
    return torch.compile(model, backend="light_interaction", options=options)


def stored(layers=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, 16 * LATENTS, 16, generator=draw) for _ in range(layers)]


def chunk_of(session, **given):
    w2c = cameras(LATENTS + 4)[0]
    return session.chunk(poses=w2c[:LATENTS], query=w2c[LATENTS:], **given)


def x(seed=0):
    return torch.randn(1, 32, 4, 4, 4, generator=torch.Generator().manual_seed(seed))


def walk(fast, session, history, *, branches=(None,), seed=0):
    """Generate one chunk; returns what its steps gave."""
    made = []
    with registry.force("sparse"), chunk_of(session) as chunk:
        for step in chunk.steps(SIGMAS):
            for branch in branches:
                given = x(seed + step.index), torch.tensor(step.sigma), history
                if branch is None:
                    made.append(fast(*given))
                    continue
                with session.stream(branch):
                    made.append(fast(*given))
    return made


def counts():
    found = registry.telemetry().values()
    return sum(one.sparse_calls for one in found), sum(one.kept_plans for one in found)


@pytest.fixture(autouse=True)
def _counted_anew():
    registry.reset_telemetry()


def test_every_call_chooses_by_default():
    assert KeptPlans.of(None) is None
    fast = compiled(Layers())
    with lipass.Session(**SPARSE) as session:
        walk(fast, session, stored())
    assert counts() == (16, 0)


def test_steps_follow_the_first_of_their_chunk():
    fast, history = compiled(Layers(), **{"sparse.plan_once": True}), stored()
    plain = compiled(Layers())
    plain.load_state_dict(fast.state_dict())
    with lipass.Session(**SPARSE) as session:
        once = walk(fast, session, history)
        assert counts() == (16, 12)
        walk(fast, session, history)  # the next chunk chooses again
        assert counts() == (32, 24)
    with lipass.Session(**SPARSE) as session:
        own = walk(plain, session, history)
    assert torch.equal(once[0], own[0])
    assert not torch.equal(once[1], own[1])


def test_a_layer_in_so_many_chooses():
    fast = compiled(Layers(5), **{"sparse.plan_every": 2})
    with registry.force("sparse"):
        fast(x(), torch.tensor(1.0), stored(5))
    assert counts() == (5, 2)


def test_layers_and_steps_together():
    fast = compiled(Layers(), **{"sparse.plan_every": 4, "sparse.plan_once": True})
    with lipass.Session(**SPARSE) as session:
        walk(fast, session, stored())
    assert counts() == (16, 15)


def test_a_layer_of_another_kind_chooses_for_itself():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Layers(2), Layers(2)

        def forward(self, x, sigma, history, longer):
            return self.other(self.one(x, sigma, history), sigma, longer)

    longer = [torch.cat([one, one], 2) for one in stored(2)]
    fast = compiled(Two(), **{"sparse.plan_every": 4})
    with registry.force("sparse"):
        fast(x(), torch.tensor(1.0), stored(2), longer)
    assert counts() == (4, 2)


def test_without_a_session_nobody_knows_a_chunk():
    fast = compiled(Layers(), **{"sparse.plan_once": True})
    with registry.force("sparse"):
        for sigma in SIGMAS[:-1]:
            fast(x(), torch.tensor(sigma), stored())
    assert counts() == (16, 0)


def test_calls_behind_all_steps_choose_for_themselves():
    fast, history = compiled(Layers(), **{"sparse.plan_once": True}), stored()
    with lipass.Session(**SPARSE) as s, registry.force("sparse"), chunk_of(s) as chunk:
        for step in chunk.steps(SIGMAS):
            fast(x(step.index), torch.tensor(step.sigma), history)
        fast(x(), torch.tensor(0.0), history)
    assert counts() == (20, 12)


def test_branches_do_not_share_a_choice():
    fast = compiled(Layers(1), **{"sparse.plan_once": True})
    with lipass.Session(**SPARSE) as session:
        walk(fast, session, stored(1), branches=("cond", "uncond"))
    assert counts() == (8, 6)


def test_two_calls_a_step_have_a_choice_each():
    fast, history = compiled(Layers(1), **{"sparse.plan_once": True}), (stored(1), stored(1, 5))
    with lipass.Session(**SPARSE) as s, registry.force("sparse"), chunk_of(s) as chunk:
        for step in chunk.steps(SIGMAS):
            for one in history:
                fast(x(step.index), torch.tensor(step.sigma), one)
    assert counts() == (8, 6)


def test_interleaved_sessions_are_as_alone():
    fast = compiled(Layers(), **{"sparse.plan_once": True})
    histories = stored(seed=1), stored(seed=2)

    def run(sessions):
        made = [[] for _ in sessions]
        with registry.force("sparse"):
            open_chunks = [(chunk_of(session), histories[n]) for n, session in sessions]
            for chunk, _ in open_chunks:
                chunk.__enter__()
            steps = [iter(chunk.steps(SIGMAS)) for chunk, _ in open_chunks]
            for together in zip(*steps, strict=True):
                for out, step, (_, history) in zip(made, together, open_chunks, strict=True):
                    with step:
                        out.append(fast(x(step.index), torch.tensor(step.sigma), history))
            for chunk, _ in reversed(open_chunks):
                chunk.__exit__(None, None, None)
        return made

    with lipass.Session(**SPARSE) as a, lipass.Session(**SPARSE) as b:
        both = run([(0, a), (1, b)])
    for n in (0, 1):
        with lipass.Session(**SPARSE) as alone:
            (one,) = run([(n, alone)])
        assert all(map(torch.equal, one, both[n]))


def test_masks_of_frames_are_never_kept():
    config, seen = lipass.Config.resolve(options=SPARSE | {"sparse.plan_every": 2}), []
    plans = KeptPlans(config.sparse)

    class Call:
        keep_frames, latent_mask = torch.ones(1, 2, dtype=torch.bool), None

    with plans.answering(None):
        for _ in range(2):
            answer = registry.answer_of("block_plan")(Call(), lambda call: seen.append(call))
            assert answer == (None, False)
    assert len(seen) == 2


def test_the_receipt_says_how_often_blocks_were_chosen():
    fast = compiled(Layers(), **{"sparse.plan_every": 4})
    with registry.force("sparse"):
        fast(x(), torch.tensor(1.0), stored())
    reasons = [site.reason for site in lipass.report().sites.values()]
    assert sum("blocks chosen in 0 of 1 calls" in one for one in reasons) == 3


@pytest.mark.parametrize("value", [0, -1], ids=str)
def test_no_layer_in_none_chooses(value):
    with pytest.raises(ValueError, match=r"sparse.plan_every must be >= 1, got .*; use 1"):
        lipass.Config.resolve(options=SPARSE | {"sparse.plan_every": value})
