"""Loops of other samplers than Euler: found, computed as without lipass, and with reused steps."""

import pytest
import torch
from torch import nn

import lipass
import lipass.compile.unit
from lipass.passes.graph.marks import step_of

TEXT = "canonicalize,find-attention,find-steps,hoist-steps,guard-steps"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.text, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x, sigma, prompt):
        row = torch.tanh(self.text(prompt)).mean(-2)
        return torch.tanh(self.down(torch.tanh(self.up(x) + row))) * sigma


X, NOISE = torch.randn(2, 8), torch.randn(2, 8)
SIGMAS = torch.tensor([1.0, 0.8, 0.6, 0.3, 0.1])
PROMPT, EMPTY = torch.randn(6, 8), torch.randn(2, 8)
ARGS = (X, SIGMAS, PROMPT, EMPTY)


def euler(net, x, s, prompt, empty):
    for i in range(4):
        x = x + (s[i + 1] - s[i]) * net(x, s[i], prompt)
    return x


def scaled_input(net, x, s, prompt, empty):
    for i in range(4):
        x = x + (s[i + 1] - s[i]) * net(x / (1 + s[i] ** 2).sqrt(), s[i], prompt)
    return x


def heun(net, x, s, prompt, empty):
    for i in range(4):
        v = net(x, s[i], prompt)
        ahead = x + (s[i + 1] - s[i]) * v
        x = x + (s[i + 1] - s[i]) * (v + net(ahead, s[i + 1], prompt)) / 2
    return x


def heun_with_a_last_step_of_euler(net, x, s, prompt, empty):
    x = heun(net, x, s, prompt, empty)
    return x - s[4] * net(x, s[4], prompt)


def adams_bashforth(net, x, s, prompt, empty):
    old = None
    for i in range(4):
        v = net(x, s[i], prompt)
        x = x + (s[i + 1] - s[i]) * (v if old is None else 1.5 * v - 0.5 * old)
        old = v
    return x


def dpm_solver_2m(net, x, s, prompt, empty):
    old = None
    for i in range(4):
        clean = x - s[i] * net(x, s[i], prompt)
        r = s[i - 1] / s[i]
        d = clean if old is None else (1 + 0.5 / r) * clean - (0.5 / r) * old
        x = s[i + 1] / s[i] * x + (1 - s[i + 1] / s[i]) * d
        old = clean
    return x


def unipc(net, x, s, prompt, empty):
    history, last = [], None
    for i in range(4):
        clean = x - s[i] * net(x, s[i], prompt)
        if last is not None:
            share = s[i] / s[i - 1]
            x = share * last + (1 - share) * 0.5 * (clean + history[-1])
        history, last = [*history[-1:], clean], x
        d = clean if len(history) < 2 else clean + 0.5 * (clean - history[0])
        x = s[i + 1] / s[i] * x + (1 - s[i + 1] / s[i]) * d
    return x


def noised_again(net, x, s, prompt, empty):
    for i in range(4):
        x = x - s[i] * net(x, s[i], prompt) + s[i + 1] * torch.randn_like(x)
    return x


def consistency(net, x, s, prompt, empty):
    for i in range(4):
        x = (1 - s[i + 1]) * net(x, s[i], prompt) + s[i + 1] * torch.randn(2, 8)
    return x


def consistency_with_given_noise(net, x, s, prompt, empty):
    noise = x
    for i in range(4):
        x = (1 - s[i + 1]) * net(x, s[i], prompt) + s[i + 1] * noise
    return x


def guidance(net, x, s, prompt, empty):
    for i in range(4):
        shown, plain = net(x, s[i], prompt), net(x, s[i], empty)
        x = x + (s[i + 1] - s[i]) * (plain + 3 * (shown - plain))
    return x


def guidance_in_one_batch(net, x, s, prompt, empty):
    prompts = torch.stack([prompt[:2], empty]).repeat_interleave(2, 0)
    for i in range(4):
        shown, plain = net(torch.cat([x, x]), s[i], prompts).chunk(2)
        x = x + (s[i + 1] - s[i]) * (plain + 3 * (shown - plain))
    return x


def guidance_of_heun(net, x, s, prompt, empty):
    def guided(x, sigma):
        shown, plain = net(x, sigma, prompt), net(x, sigma, empty)
        return plain + 3 * (shown - plain)

    for i in range(4):
        v = guided(x, s[i])
        ahead = x + (s[i + 1] - s[i]) * v
        x = x + (s[i + 1] - s[i]) * (v + guided(ahead, s[i + 1])) / 2
    return x


def guidance_behind_two_prefills(net, x, s, prompt, empty):
    start = net(NOISE[:1], s[0], prompt) + net(NOISE[:1], s[0], empty)
    return guidance(net, x + start, s, prompt, empty)


def guidance_of_a_consistency_model(net, x, s, prompt, empty):
    for i in range(4):
        shown, plain = net(x, s[i], prompt), net(x, s[i], empty)
        x = (1 - s[i + 1]) * (plain + 3 * (shown - plain)) + s[i + 1] * torch.randn(2, 8)
    return x


SAMPLERS = {
    euler: "calls @0 to @3 of 4",
    scaled_input: "calls @0 to @3 of 4",
    heun: "calls @0 to @7 of 8, 2 a step",
    heun_with_a_last_step_of_euler: "calls @0 to @7 of 9, 2 a step",
    adams_bashforth: "calls @0 to @3 of 4",
    dpm_solver_2m: "calls @0 to @3 of 4",
    unipc: "calls @0 to @3 of 4",
    noised_again: "calls @0 to @3 of 4",
    consistency: "calls @0 to @3 of 4",
    consistency_with_given_noise: "calls @0 to @3 of 4",
    guidance: "calls @0 to @7 of 8, 2 a step",
    guidance_in_one_batch: "calls @0 to @3 of 4",
    guidance_of_heun: "calls @0 to @15 of 16, 4 a step",
    guidance_behind_two_prefills: "calls @2 to @9 of 10, 2 a step",
    guidance_of_a_consistency_model: "calls @0 to @7 of 8, 2 a step",
}
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.__name__)


@pytest.fixture
def loop():
    """Return a sampler's loop over one model, the model being its first argument."""
    net = Net().eval().requires_grad_(False)

    def make(sampler, model=net):
        return lambda *args: sampler(model, *args)

    make.net = net
    return make


def compiled(fn, preset):
    torch._dynamo.reset()
    options = {"preset": preset, "inner": "eager"}
    return torch.compile(fn, backend="light_interaction", options=options, fullgraph=True)


def seeded(fn):
    torch.manual_seed(1)
    return fn(*ARGS)


class Reusing:
    """Answer the calls of reused steps, by hand, with what they gave in the last computed one."""

    def __init__(self, net, first, calls, reused):
        self.net, self.first, self.calls, self.reused = net, first, calls, reused
        self.count, self.last = 0, {}

    def __call__(self, *args):
        step, call = divmod(self.count - self.first, self.calls)
        self.count += 1
        if step not in self.reused:
            self.last[call] = self.net(*args)
        return self.last[call]


@each_sampler
def test_steps_are_found_and_guarded(sampler, trace, apply, loop):
    gm = trace(loop(sampler), ARGS)
    records, _ = apply(gm, TEXT)
    notes = [
        (note.action, note.reason) for r in records for note in r.notes if note.site == "steps"
    ]
    assert notes[0] == ("found", f"4 steps: {SAMPLERS[sampler]}")
    assert notes[-1] == ("rewritten", "4 steps call one module behind a guard")


@each_sampler
@pytest.mark.parametrize("preset", ["off", "exact", "cache"])
def test_without_a_session_every_step_computes(sampler, preset, loop):
    expected = seeded(loop(sampler))
    torch.testing.assert_close(
        seeded(compiled(loop(sampler), preset)), expected, rtol=0, atol=1e-6
    )


@each_sampler
def test_reused_steps_return_what_the_last_computed_one_gave(sampler, loop):
    fn = compiled(loop(sampler), "cache")
    w2c = torch.eye(4).repeat(12, 1, 1)
    options = {"steps.overlap_min": 0.0, "steps.departure_min": 0.0, "inner": "eager"}
    with (
        lipass.Session(preset="cache", **options) as session,
        session.chunk(poses=w2c[:8], query=w2c[8:]) as chunk,
    ):
        actual = seeded(fn)
        assert chunk.lookups == 2
        assert chunk.plan.steps.reused == (1, 2)
    told = SAMPLERS[sampler]
    first = int(told[len("calls @")])
    calls = int(told[-len("2 a step")]) if "a step" in told else 1
    by_hand = seeded(loop(sampler, Reusing(loop.net, first, calls, (1, 2))))
    torch.testing.assert_close(actual, by_hand, rtol=0, atol=1e-6)
    assert not torch.allclose(actual, seeded(loop(sampler)), atol=1e-6)


@each_sampler
def test_prompts_are_projected_in_front_of_the_loop(sampler, trace, apply, loop):
    gm = trace(loop(sampler), ARGS)
    records, _ = apply(gm, TEXT)
    hoisted = next(r for r in records if r.name == "hoist-steps")
    assert hoisted.changed


def found(trace, apply, fn):
    gm = trace(fn, ARGS)
    records, _ = apply(gm, "canonicalize,find-steps")
    assert not any(step_of(node) for node in gm.graph.nodes)
    (note,) = records[-1].notes
    return note.reason


def test_outputs_handed_on_are_no_steps(trace, apply, loop):
    def chain(net, x, s, prompt, empty):
        for i in range(4):
            x = net(x, s[i], prompt)
        return x

    assert found(trace, apply, loop(chain)) == "call @1 does not continue from @0"


def test_outputs_that_are_scaled_are_no_steps(trace, apply, loop):
    def chain(net, x, s, prompt, empty):
        for i in range(4):
            x = net(x * s[i] + prompt[0], s[i], prompt)
        return x

    assert found(trace, apply, loop(chain)) == "call @1 does not continue from @0"


def test_what_is_appended_to_is_no_step(trace, apply, loop):
    def frames(net, x, s, prompt, empty):
        for i in range(4):
            x = torch.cat([x[1:], net(x, s[i], prompt)[:1]])
        return x

    assert found(trace, apply, loop(frames)) == "call @1 does not continue from @0"


def test_update_in_place_is_no_step_and_says_so(trace, apply, loop):
    def in_place(net, x, s, prompt, empty):
        x = x.clone()
        for i in range(4):
            x.add_((s[i + 1] - s[i]) * net(x, s[i], prompt))
        return x

    reason = found(trace, apply, loop(in_place))
    assert reason.startswith("call @1 does not continue from @0: %add_")
    assert reason.endswith("writes to its input in place; write `x = x + ..`")


def test_noise_without_a_level_is_no_step(trace, apply, loop):
    def same_level(net, x, s, prompt, empty):
        for _ in range(4):
            x = net(x, s[0], prompt) + NOISE
        return x

    assert found(trace, apply, loop(same_level)).endswith(
        "have no noise level in which they differ"
    )


def test_samples_of_their_own_are_no_steps(trace, apply, loop):
    def best_of(net, x, s, prompt, empty):
        return sum(net(x * (i + 1), s[i], prompt) for i in range(4))

    assert found(trace, apply, loop(best_of)).startswith("call @1 does not continue from @0: they")


def test_branch_that_is_used_before_the_other_is_called_stays(notes, loop):
    def early(net, x, s, prompt, empty):
        for i in range(4):
            shown = 3 * net(x, s[i], prompt)
            x = x + (s[i + 1] - s[i]) * (shown - 2 * net(x, s[i], empty))
        return x

    ((site, action, reason),) = notes(loop(early), ARGS, TEXT)
    assert (site, action) == ("steps", "kept")
    assert reason.startswith("step 0 cannot be outlined: it is used by %")
    assert reason.endswith("before it is complete")


def test_random_numbers_inside_of_the_model_stay(notes, loop):
    class Noisy(Net):
        def forward(self, x, sigma, prompt):
            return super().forward(x, sigma, prompt) + torch.randn_like(x)

    ((site, action, reason),) = notes(loop(consistency, Noisy()), ARGS, TEXT)
    assert (site, action) == ("steps", "kept")
    assert reason.endswith("draws random numbers")


def test_levels_that_are_numbers_are_constants(trace, apply, loop):
    def numbers(net, x, s, prompt, empty):
        for sigma in (1.0, 0.8, 0.6, 0.3):
            x = x - 0.2 * net(x, sigma, prompt)
        return x

    assert found(trace, apply, loop(numbers)).endswith("differ")
