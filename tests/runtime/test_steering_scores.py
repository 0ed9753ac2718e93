import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.errors import LipassError
from lipass.kernels import registry
from lipass.receipt import current_report, reset_report

POLICY = "two-prompt"
EYE = torch.eye(4).expand(16, 4, 4)


class World(nn.Module):
    """Latents attend to a prompt that the graph projects, then to a history and themselves."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 32), nn.Linear(16, 32), nn.Linear(16, 32)
        self.back = nn.Linear(32, 8)

    def forward(self, latents, sigma, prompt, history):
        x = latents.permute(0, 2, 3, 4, 1).flatten(1, 3)
        q, k, v = (
            project(tokens).unflatten(-1, (2, 16)).transpose(1, 2)
            for project, tokens in ((self.query, x), (self.key, prompt), (self.value, prompt))
        )
        told = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q = (x + self.back(told))[:, None]
        keys = torch.cat([history, q], 2)
        out = F.scaled_dot_product_attention(q, keys, keys)[:, 0]
        out = out.unflatten(1, latents.shape[2:]).permute(0, 4, 1, 2, 3)
        return out * sigma[:, None, :, None, None]


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LATENTS, HISTORY, LEVEL = (
    drawn(0, 1, 8, 4, 4, 4),
    drawn(1, 1, 1, 4 * 16, 8),
    torch.full((1, 4), 0.9),
)
DAY, NIGHT = drawn(2, 1, 6, 16), drawn(3, 1, 6, 16)


@pytest.fixture
def world():
    reset_report()
    torch.manual_seed(0)
    torch._dynamo.reset()
    return World().eval()


def compiled(model, preset="exact", **options):
    options = {"preset": preset, "inner": "eager", "steering": True, **options}
    options["find-attention.segments"] = ("history", "current")
    return torch.compile(model, backend="light_interaction", options=options)


@torch.no_grad()
def rolled(model, session, said, chunks, history=HISTORY):
    """Call the model once a chunk, on the same latents and history."""
    outputs = []
    for index in range(chunks):
        for change in said.get(index, ()):
            session.steer(*change)
        with session.chunk(poses=EYE[:4], query=EYE[4:8]) as chunk:
            outputs.append(model(LATENTS, LEVEL, chunk.text, history))
    return outputs


def two_prompts(model, weights):
    """Attend to both prompts as the definition says: mix the exponentials of their scores.

    `weights` are those of the new prompt for each of the 4 latents.
    """
    weight = torch.tensor(weights).repeat_interleave(16)[:, None]
    x = LATENTS.permute(0, 2, 3, 4, 1).flatten(1, 3)
    q = model.query(x).unflatten(-1, (2, 16)).transpose(1, 2)
    top = bottom = 0
    for prompt, share in ((DAY, 1 - weight), (NIGHT, weight)):
        k, v = (
            project(prompt).unflatten(-1, (2, 16)).transpose(1, 2)
            for project in (model.key, model.value)
        )
        scores = share * (q @ k.mT / 4).exp()
        top, bottom = top + scores @ v, bottom + scores.sum(-1, keepdim=True)
    told = (top / bottom).transpose(1, 2).flatten(2)
    q = (x + model.back(told))[:, None]
    keys = torch.cat([HISTORY, q], 2)
    out = F.scaled_dot_product_attention(q, keys, keys)[:, 0]
    return out.unflatten(1, (4, 4, 4)).permute(0, 4, 1, 2, 3) * LEVEL[:, None, :, None, None]


SPARSE = {
    "sparse.tile": (1, 4, 4), "sparse.budget": 0.5, "sparse.dense_tokens": 0,
    "sparse.sink_latents": 0,
}  # fmt: skip


def test_two_prompts_are_a_mixture_and_each_limit_is_a_prompt_alone(world):
    said = {0: [(DAY, 4, POLICY)], 1: [(NIGHT, 4, POLICY)]}
    outputs = rolled(compiled(world), lipass.Session(preset="off"), said, 6)
    with torch.no_grad():
        plain = [world(LATENTS, LEVEL, prompt, HISTORY) for prompt in (DAY, NIGHT)]
        latents = [(place + 0.5) / 12 for place in range(12)]
        expected = [two_prompts(world, latents[i : i + 4]) for i in (0, 4, 8)]
    for one, other in zip(outputs, [plain[0], *expected, plain[1], plain[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_two_prompts_of_a_sparse_graph_are_the_same_mixture(world):
    said = {0: [(DAY, 4, POLICY)], 1: [(NIGHT, 4, POLICY)]}
    session = lipass.Session(preset="sparse", **SPARSE)
    outputs = rolled(compiled(world, "sparse", **SPARSE), session, said, 4)
    latents = [(place + 0.5) / 12 for place in range(12)]
    expected = [two_prompts(world, latents[i : i + 4]) for i in (0, 4, 8)]
    for one, other in zip(outputs[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_where_queries_have_no_grid_a_chunk_has_the_weight_of_its_middle(world, monkeypatch):
    monkeypatch.setattr("lipass.passes.approx.steer_prompt._latents", lambda node, site: 1)
    said = {0: [(DAY, 4, POLICY)], 1: [(NIGHT, 4, POLICY)]}
    outputs = rolled(compiled(world), lipass.Session(preset="off"), said, 4)
    with torch.no_grad():
        expected = [two_prompts(world, [weight] * 4) for weight in (1 / 6, 3 / 6, 5 / 6)]
    for one, other in zip(outputs[1:], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_two_prompts_are_the_default_where_attention_can_weigh_them(world):
    said = {0: [(DAY,)], 1: [(NIGHT,)]}
    session = lipass.Session(preset="off", steering=True)
    outputs = rolled(compiled(world), session, said, 3)
    torch.testing.assert_close(
        outputs[2], two_prompts(world, [x / 24 for x in (9, 11, 13, 15)]), rtol=0, atol=1e-5
    )


def test_nothing_is_compiled_anew_while_weights_change(world):
    model, session = compiled(world), lipass.Session(preset="off")
    rolled(model, session, {0: [(DAY, 4, POLICY)]}, 1)
    graphs = current_report().graphs
    steering = lipass.Steering(policy=POLICY, over_chunks=6, alpha=0.5)
    rolled(model, session, {0: [(NIGHT, 4, steering)], 5: [(DAY, 3, POLICY)]}, 10)
    assert current_report().graphs == graphs


def test_a_chunk_of_a_change_costs_no_product_of_its_text(world):
    options = {"counted_writes": True, "hoist-calls.work_min": 0}
    model, session = compiled(world, **options), lipass.Session(preset="off")
    rolled(model, session, {0: [(DAY, 4, POLICY)]}, 1)
    rolled(model, session, {0: [(NIGHT, 4, POLICY)]}, 1)
    computed = current_report().invariants_computed
    assert computed
    first, *others = rolled(model, session, {}, 4)
    assert current_report().invariants_computed == computed
    assert current_report().invariants_kept
    assert not torch.equal(first, others[0])


def test_older_history_weighs_alpha(world):
    said = {0: [(DAY,)], 1: [(DAY, 1, lipass.Steering(policy="history-bias", over_chunks=1))]}
    _, made = rolled(compiled(world), lipass.Session(preset="off"), said, 2)
    with torch.no_grad():
        x = LATENTS.permute(0, 2, 3, 4, 1).flatten(1, 3)
        q, k, v = (
            project(tokens).unflatten(-1, (2, 16)).transpose(1, 2)
            for project, tokens in ((world.query, x), (world.key, DAY), (world.value, DAY))
        )
        told = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q = (x + world.back(told))[:, None]
        keys = torch.cat([HISTORY, q], 2)
        share = (q @ keys.mT / 8**0.5).exp()
        share[..., :64] *= 0.3
        expected = (share @ keys / share.sum(-1, keepdim=True))[:, 0]
    got = (made / LEVEL[:, None, :, None, None]).permute(0, 2, 3, 4, 1).flatten(1, 3)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", ["history-bias", POLICY])
def test_alpha_one_and_the_same_prompt_change_nothing(world, policy):
    steering = lipass.Steering(policy=policy, alpha=1.0)
    said = {0: [(DAY, 4, steering)], 1: [(DAY, 4, steering)]}
    outputs = rolled(compiled(world), lipass.Session(preset="off"), said, 5)
    with torch.no_grad():
        expected = world(LATENTS, LEVEL, DAY, HISTORY)
    for one in outputs:
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-5)


def test_sparse_calls_weigh_them_too(world):
    """At budget 1.0 the block-sparse call is dense attention, with what is added to scores."""
    steering = lipass.Steering(policy=POLICY, alpha=0.5)
    said = {0: [(DAY, 4, POLICY)], 1: [(NIGHT, 4, steering)]}
    sparse = {"sparse.budget": 1.0, "sparse.dense_tokens": 0, "sparse.tile": (1, 4, 4)}
    dense = rolled(compiled(world), lipass.Session(preset="off"), said, 4)
    torch._dynamo.reset()
    session = lipass.Session(preset="sparse", **sparse)
    outputs = rolled(compiled(world, "sparse", **sparse), session, said, 4)
    assert any(site.action == "rewritten" for site in current_report().sites.values())
    for one, other in zip(outputs, dense, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_reused_steps_answer_within_one_blend_only(world):
    """Each chunk of a change computes anew; within a chunk the kept output is of its blend."""
    options = {"steps.form": "lookup", "steps.overlap_min": 0.0}
    model, session = compiled(world, "cache", **options), lipass.Session(preset="cache", **options)
    shown = []
    for index in range(4):
        if index < 2:
            session.steer((DAY, NIGHT)[index], 2, POLICY)
        with torch.no_grad(), session.chunk(poses=EYE[:4], query=EYE[4:8]) as chunk:
            steps = [
                model(LATENTS, torch.full((1, 4), step.sigma), chunk.text, HISTORY)
                for step in chunk.steps([1.0, 0.9, 0.8, 0.5, 0.0])
            ]
        assert chunk.lookups == (0 if index == 1 else 2)
        shown.append(steps[0])
    assert all(not torch.equal(one, other) for one, other in itertools.pairwise(shown[:3]))
    assert torch.equal(shown[2], shown[3])


def test_a_model_that_nobody_compiled_with_steering_is_refused(world):
    session = lipass.Session(preset="off")
    with pytest.raises(LipassError, match=r"needs attention that weighs the prompts.*'steering'"):
        rolled(world, session, {0: [(DAY, 4, POLICY)]}, 1)
    session.steer(DAY, 1, "hard")
    rolled(world, session, {}, 1)


def test_a_model_that_pads_prompts_inside_is_refused(world):
    """Which of its tokens are whose is not known, so nothing is guessed."""

    def padding(latents, sigma, prompt, history):
        padded = torch.cat([prompt, prompt.new_zeros(1, 20 - prompt.shape[1], 16)], 1)
        return world(latents, sigma, padded, history)

    with pytest.raises(LipassError, match="weighs the prompts of a change, got a chunk in which"):
        rolled(compiled(padding), lipass.Session(preset="off"), {0: [(DAY, 4, POLICY)]}, 1)


def test_a_history_of_unknown_latents_is_refused(world):
    session = lipass.Session(preset="off")
    model = compiled(world)
    rolled(model, session, {0: [(DAY,)]}, 1)
    longer = torch.cat([HISTORY, HISTORY], 2)
    session.steer(NIGHT, 4, "history-bias")
    with pytest.raises(LipassError, match=r"got 128 tokens of 16 a latent, for 4 chosen"):
        rolled(model, session, {}, 1, longer)
    rolled(model, session, {}, 1)


def weighed(chunk, latents):
    """Ask as a call with so many history latents of 2 tokens does; says which are weighed."""
    with chunk.session.prompts.scores.answering(chunk):
        ask = registry.answer_of("steering_bias")
        rows = ask(torch.zeros(1, 1, 2, 8), (2 * latents,), ("history",), 2, 1)
    return (rows.view(latents, 2) < 0).all(1).tolist()


@pytest.mark.parametrize("held", [None, [*range(8)], [4, 5, 6, 7, 0, 1, 2, 3], [6, 1, 7, 0]])
def test_older_history_is_weighed_where_it_lies(held):
    """In a ring that has come round, older latents lie behind newer ones."""
    session = lipass.Session(preset="off")
    session.steer(DAY)
    with session.chunk(poses=EYE[:4], query=EYE[4:8]):
        pass
    session.steer(NIGHT, policy="history-bias")
    with session.chunk(poses=EYE[:4], query=EYE[4:8]) as chunk:
        assert weighed(chunk, 4) == [True] * 4
    lie = [*range(8)] if held is None else held
    with session.chunk(poses=EYE[:8], query=EYE[8:12], held=held) as chunk:
        assert weighed(chunk, len(lie)) == [latent < 4 for latent in lie]


def test_older_history_that_the_loop_has_picked_lies_as_in_the_context():
    session = lipass.Session(preset="off")
    session.steer(DAY)
    with session.chunk(poses=EYE[:4], query=EYE[4:8]):
        pass
    session.steer(NIGHT, policy="history-bias")
    with session.chunk(poses=EYE[:4], query=EYE[4:8]) as chunk:
        weighed(chunk, 4)
    held = [4, 5, 6, 7, 0, 1, 2, 3]
    with session.chunk(poses=EYE[:8], query=EYE[8:12], held=held, own_context=[5, 0]) as chunk:
        assert weighed(chunk, 2) == [True, False]


def test_nothing_is_weighed_where_lipass_is_off(world):
    model, session = compiled(world), lipass.Session(preset="off")
    rolled(model, session, {0: [(DAY, 4, POLICY)]}, 1)
    session.steer(NIGHT, 4, POLICY)
    with lipass.disabled():
        (made,) = rolled(model, session, {}, 1)
    with torch.no_grad():
        torch.testing.assert_close(made, world(LATENTS, LEVEL, NIGHT, HISTORY))


def test_inference_mode_and_no_grad_may_take_turns(world):
    said = {0: [(DAY, 4, POLICY)], 1: [(NIGHT, 4, POLICY)]}
    expected = rolled(compiled(world), lipass.Session(preset="off"), said, 4)
    model, session = compiled(world), lipass.Session(preset="off")
    session.steer(DAY, 4, POLICY)
    for index, want in enumerate(expected):
        if index == 1:
            session.steer(NIGHT, 4, POLICY)
        mode = torch.no_grad() if index % 2 else torch.inference_mode()
        with mode, session.chunk(poses=EYE[:4], query=EYE[4:8]) as chunk:
            out = model(LATENTS, LEVEL, chunk.text, HISTORY)
        torch.testing.assert_close(out.clone(), want, rtol=0, atol=1e-5)
