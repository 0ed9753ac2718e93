"""What a reused step may be answered with, and what it may not."""

import collections
import contextlib

import numpy as np
import pytest
import torch
from mini_decode import SIGMAS, Mini, chunk, compiled, inputs, level, reusing
from torch import nn

import lipass
from lipass.policy.trajectory import parse_trajectory
from lipass.runtime import inputs as inputs_module

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture
def model():
    return Mini().eval()


def play(fast, *, between=lambda step: None, sigmas=SIGMAS, given=None, **options):
    """Call a compiled model once a step; return the outputs and the chunk."""
    x, w2c, text, history = given or inputs()
    out = []
    with reusing(**options) as session, chunk(session, w2c) as now:
        for step in now.steps(sigmas):
            between(step)
            out.append(fast(x, level(step.sigma), w2c, text, history))
    return out, now


def test_reused_steps_are_answered(model):
    out, now = play(compiled(model))
    assert (now.lookups, now.misses) == (2, 0)
    assert torch.equal(out[1], out[0])
    assert torch.equal(out[2], out[0])


@pytest.mark.parametrize("write", ["mul_", "zero_"])
def test_sampler_writes_in_place_to_what_a_step_returned(model, write):
    def loop(model, x, sigmas, w2c, text, history):
        for i in range(4):
            v = model(x, sigmas[i], w2c, text, history)
            v = v.mul_(2.0) if write == "mul_" else v.zero_()
            x = x + (sigmas[i + 1] - sigmas[i]) * v
        return x

    x, w2c, text, history = inputs()
    sigmas, want = [level(s) for s in SIGMAS], x
    for i in range(4):
        if i in (0, 3):
            kept = model(want, sigmas[i], w2c, text, history)
        want = want + (sigmas[i + 1] - sigmas[i]) * kept * (2.0 if write == "mul_" else 0.0)
    fast = compiled(loop)
    with lipass.Session(preset="cache", **{"steps.overlap_min": 0.0}) as s, chunk(s, w2c) as now:
        got = fast(model, x, sigmas, w2c, text, history)
    assert now.lookups == 2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_writing_to_an_answer_does_not_change_the_next(model):
    fast = compiled(model)
    x, w2c, text, history = inputs()
    with reusing() as session, chunk(session, w2c) as now:
        seen = []
        for step in now.steps(SIGMAS):
            out = fast(x, level(step.sigma), w2c, text, history)
            seen.append(out.clone())
            out.zero_()
    assert torch.equal(seen[1], seen[0])
    assert torch.equal(seen[2], seen[0])


def guided(fast, x, w2c, text, history, *, order, reuse=(1, 3), sigmas=6):
    """Call two branches in the order that each step asks for; return outputs and the chunk."""
    prompts, seen = {"cond": text, "neg": -text}, {}
    with reusing(**{"steps.reuse": reuse}) as session, chunk(session, w2c) as now:
        for step in now.steps(torch.linspace(1, 0, sigmas).tolist()):
            for name in order(step.index):
                seen[step.index, name] = fast(x, level(step.sigma), w2c, prompts[name], history)
    return seen, now


def test_branches_called_in_another_order_keep_to_their_own(model):
    seen, now = guided(
        compiled(model),
        *inputs(),
        order=lambda i: ("neg", "cond") if i == 1 else ("cond", "neg"),
    )
    for name in ("cond", "neg"):
        assert torch.equal(seen[1, name], seen[0, name])
        assert torch.equal(seen[3, name], seen[2, name])
    assert (now.lookups, now.misses) == (4, 0)


def test_branch_called_in_some_steps_only_computes_where_the_step_before_did_not(model):
    seen, now = guided(
        compiled(model), *inputs(), order=lambda i: ("cond",) if i == 2 else ("cond", "neg")
    )
    assert not torch.equal(seen[3, "neg"], seen[0, "neg"])
    assert (now.lookups, now.misses) == (3, 1)


def test_prompt_that_changes_in_mid_chunk_computes(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            if step.index == 2:
                text = text * 2
            got = fast(x, level(step.sigma), w2c, text, history)
            if step.index >= 2:
                torch.testing.assert_close(got, model(x, level(step.sigma), w2c, text, history))
    assert now.lookups == 1
    (reason,) = now.why_missed
    assert reason == "its input 'text' is another than in the step that computed"


def test_prompt_written_in_place_computes(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    out, _now = play(
        fast,
        between=lambda step: text.mul_(2) if step.index == 2 else None,
        given=(x, w2c, text, history),
    )
    torch.testing.assert_close(out[2], model(x, level(0.5), w2c, text, history))


def test_prompt_written_in_place_in_inference_mode_computes(model):
    with torch.inference_mode():
        fast, (x, w2c, text, history) = compiled(model), inputs()
        out, now = play(
            fast,
            between=lambda step: text.mul_(2) if step.index == 2 else None,
            given=(x, w2c, text, history),
        )
        torch.testing.assert_close(out[2], model(x, level(0.5), w2c, text, history))
    assert now.lookups == 1


def test_prompt_made_anew_with_equal_values_is_the_same(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            fast(x, level(step.sigma), w2c.clone(), text * 1, history)
    assert (now.lookups, now.misses) == (2, 0)


def test_two_experts_of_one_class_never_answer_for_each_other():
    high, low = Mini().eval(), Mini().eval()
    fast, (x, w2c, text, history) = [compiled(high), compiled(low)], inputs()
    with reusing() as session, chunk(session, w2c):
        for step in (now := session.open_chunks["main"]).steps(SIGMAS):
            expert = step.index >= 2
            got = fast[expert](x, level(step.sigma), w2c, text, history)
            if step.index == 2:
                torch.testing.assert_close(got, low(x, level(step.sigma), w2c, text, history))
    assert (now.lookups, now.misses) == (1, 1)


@pytest.mark.parametrize("merge", ["counted", "replaced", "other memory", "swapped"])
def test_weights_that_change_between_steps_compute(model, merge):
    def change(step):
        if step.index == 1:
            if merge == "counted":
                model.head.weight.mul_(2)
            elif merge == "replaced":
                model.head.weight = nn.Parameter(model.head.weight * 2)
            elif merge == "other memory":
                model.head.weight.data = model.head.weight * 2
            else:
                for mine, other in zip(model.parameters(), Mini().parameters(), strict=True):
                    mine.data, other.data = other.data, mine.data

    x, w2c, text, history = inputs()
    out, _now = play(compiled(model), between=change, given=(x, w2c, text, history))
    torch.testing.assert_close(out[1], model(x, level(0.75), w2c, text, history))


def test_call_of_another_batch_size_computes(model):
    fast = compiled(model)
    with reusing() as session:
        w2c = inputs()[1]
        with chunk(session, w2c) as now:
            for step in now.steps(SIGMAS):
                x, cams, text, history = inputs(batch=(4, 2, 2, 2)[step.index])
                got = fast(x, level(step.sigma), cams, text, history)
                assert got.shape[0] == x.shape[0]


def test_calls_of_a_step_that_differ_in_latents_only_need_a_name(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            for noisy in (x, x * 2):
                got = fast(noisy + step.sigma, level(step.sigma), w2c, text, history)
                want = model(noisy + step.sigma, level(step.sigma), w2c, text, history)
                torch.testing.assert_close(got, want)
    assert now.lookups == 0
    (reason,) = now.why_missed
    assert "2 calls of the step that computed differ in latents" in reason
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            for n, noisy in enumerate((x, x * 2)):
                with session.stream(f"sample {n}"):
                    fast(noisy + step.sigma, level(step.sigma), w2c, text, history)
    assert (now.lookups, now.misses) == (4, 0)


def test_refresh_of_a_cache_inside_of_a_reused_step_computes(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            if step.reused:
                got = fast(x, level(0.0), w2c, text, history)
                torch.testing.assert_close(got, model(x, level(0.0), w2c, text, history))
            fast(x, level(step.sigma), w2c, text, history)
    assert now.lookups == 2
    assert now.why_missed == {"its noise level 'sigma' is not that of the step": 2}


class PerFrame(Mini):
    def forward(self, x, sigma, *rest):
        return super().forward(x + sigma[:, None, :, None, None], sigma.mean().view(1), *rest)


class Counted(Mini):
    def forward(self, x, timestep, *rest):
        return super().forward(x, timestep.float() / 1000, *rest)


LEVELS = {
    "sigma": (Mini, level),
    "timestep": (Counted, lambda s: torch.tensor([round(1000 * float(s))])),
    "how clean": (Mini, lambda s: level(1 - s)),
    "rounded to bf16": (Mini, lambda s: level(s).bfloat16().float()),
    "a frame each, the first clean": (PerFrame, lambda s: torch.tensor([[0.0, s, s, s]])),
}


@pytest.mark.parametrize("form", LEVELS)
@pytest.mark.parametrize("kind", [list, np.float32, torch.tensor])
def test_preview_in_front_of_a_reused_call_computes_for_each_form_of_levels(form, kind):
    of_model, given = LEVELS[form]
    model = of_model().eval()
    fast, (x, w2c, text, history) = compiled(model), inputs()
    sigmas = kind([1.0, 0.77, 0.53, 0.29, 0.0])
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(sigmas):
            if step.reused:
                args = x * 0.5, given(0.0), w2c, text, history
                torch.testing.assert_close(fast(*args), model(*args))
            fast(x, given(float(step.sigma)), w2c, text, history)
    assert (now.lookups, now.misses) == (2, 2)


@pytest.mark.parametrize("kind", ["strength", "action", "control"])
def test_condition_that_looks_like_a_level_or_latents_computes_where_it_changes(kind):
    class Conditioned(Mini):
        def forward(self, x, sigma, w2c, text, history, given):
            return super().forward(x + given.float(), sigma, w2c, text, history)

    model = Conditioned().eval()
    fast, (x, w2c, text, history) = compiled(model), inputs()
    first = {
        "strength": torch.tensor([3.0]),
        "action": torch.tensor([2]),
        "control": torch.zeros_like(x),
    }[kind]
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            given = first + 1 if step.index == 1 else first
            args = x, level(step.sigma), w2c, text, history, given
            got = fast(*args)
            if step.index == 1:
                torch.testing.assert_close(got, model(*args))
            x = x + (step.sigma_next - step.sigma) * got
    assert (now.lookups, now.misses) == (1, 1)


def test_graph_break_computes_the_whole_call(model):
    class Broken(Mini):
        def forward(self, x, sigma, w2c, text, history):
            v = super().forward(x, sigma, w2c, text, history)
            torch._dynamo.graph_break()
            return v * sigma.view(-1, 1, 1, 1, 1)

    model, (x, w2c, text, history) = Broken().eval(), inputs()
    out, now = play(compiled(model), given=(x, w2c, text, history))
    for got, sigma in zip(out, SIGMAS, strict=False):
        torch.testing.assert_close(got, model(x, level(sigma), w2c, text, history))
    assert now.lookups == 0
    notes = [note for run in lipass.report().passes for note in run.notes if "call:" in note]
    assert any("a graph break cuts it" in note for note in notes)


def test_layers_compiled_one_by_one_compute(model):
    """Each layer has a level, so each graph could be a step; together they are one call."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mini = Mini()

        def forward(self, x, sigma, w2c, text, history):
            return x + self.mini(x, sigma, w2c, text, history)

    layers = [Layer().eval() for _ in range(3)]
    fast = [compiled(layer) for layer in layers]
    x, w2c, text, history = inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            h = want = x
            for mine, layer in zip(fast, layers, strict=True):
                h = mine(h, level(step.sigma), w2c, text, history)
                want = layer(want, level(step.sigma), w2c, text, history)
            torch.testing.assert_close(h, want)
    assert now.lookups == 0
    assert any("one model call in several graphs" in reason for reason in now.why_missed)


class Attribute(Mini):
    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(1)

    def forward(self, *args):
        self.calls = self.calls + 1
        return super().forward(*args)


class Appended(Mini):
    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, *args):
        self.calls.append(x.mean())
        return super().forward(x, *args)


class Buffer(Mini):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, *args):
        self.calls += 1
        return super().forward(*args)


class Replaced(Buffer):
    def forward(self, *args):
        self.calls = self.calls + 1
        return Mini.forward(self, *args)


@pytest.mark.parametrize("kind", [Attribute, Appended, Buffer, Replaced])
def test_state_outside_of_the_graph_is_kept_up_and_named(kind):
    model = kind().eval()
    _, now = play(compiled(model))
    count = len(model.calls) if kind is Appended else int(model.calls.item())
    assert count == 4
    assert now.lookups == 0
    notes = [note for run in lipass.report().passes for note in run.notes if "call:" in note]
    assert any("not pure" in note and "calls" in note for note in notes)


class Noted(Mini):
    """Writes what follows from its sizes, as models tell their kernels of the grid."""

    def __init__(self):
        super().__init__()
        self.notes = {"grid": None, "layer": ""}
        self.latest = ""

    def forward(self, x, *args):
        self.notes["grid"] = list(x.shape[2:])
        self.notes["layer"] = self.latest = "block_1"
        return super().forward(x, *args)


def test_notes_of_sizes_and_constants_do_not_keep_a_step_from_being_reused():
    model = Noted().eval()
    _, now = play(compiled(model))
    assert now.lookups == 2
    assert (model.notes["layer"], model.latest) == ("block_1", "block_1")
    assert model.notes["grid"] == list(inputs()[0].shape[2:])


def test_a_count_of_calls_given_as_a_number_keeps_them_computed():
    model = Noted().eval()
    model.calls = 0
    plain = type(model).forward

    class Counted(Noted):
        def forward(self, *args):
            self.calls = self.calls + 1
            return plain(self, *args)

    model.__class__ = Counted
    play(compiled(model))
    assert model.calls == 4


def test_state_in_a_variable_of_an_enclosing_function_is_kept_up_and_named():
    calls = 0

    class Closure(Mini):
        def forward(self, *args):
            nonlocal calls
            calls += 1
            return super().forward(*args)

    _, now = play(compiled(Closure().eval()))
    assert (calls, now.lookups) == (4, 0)
    notes = [note for run in lipass.report().passes for note in run.notes if "call:" in note]
    assert any(note.endswith("would not change calls") for note in notes)


class Sample(collections.OrderedDict):
    """What libraries return: a dict that is written to while it is made."""

    def __init__(self, sample):
        super().__init__()
        self["sample"] = sample


def test_output_that_is_an_object_made_by_the_model_is_answered(model):
    class Wrapped(Mini):
        def forward(self, *args):
            return Sample(super().forward(*args))

    out, now = play(compiled(Wrapped().eval()))
    assert torch.equal(out[1]["sample"], out[0]["sample"])
    assert (now.lookups, now.misses) == (2, 0)


def test_outputs_that_share_memory_are_not_handed_out_as_copies(model):
    class Twofold(Mini):
        def forward(self, *args):
            out = super().forward(*args)
            return out, out.flatten(2)

    fast, (x, w2c, text, history) = compiled(Twofold().eval()), inputs()
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            out, flat = fast(x, level(step.sigma), w2c, text, history)
            out.zero_()
            assert not flat.any()
    assert now.lookups == 0
    notes = [note for run in lipass.report().passes for note in run.notes if "call:" in note]
    assert any("shares memory" in note for note in notes)


def test_compiler_reset_in_mid_chunk_computes(model):
    x, w2c, text, history = inputs()

    def reset(step):
        if step.index == 1:
            torch._dynamo.reset()

    out, _ = play(compiled(model), between=reset, given=(x, w2c, text, history))
    torch.testing.assert_close(out[1], model(x, level(0.75), w2c, text, history))


def test_level_that_is_a_number_is_answered(model):
    class Numbered(Mini):
        def forward(self, x, sigma, *rest):
            return super().forward(x, torch.full((1,), sigma), *rest)

    fast, (x, w2c, text, history) = compiled(Numbered().eval()), inputs()
    for sigma in (0.9, 0.8, 0.7):
        fast(x, sigma, w2c, text, history)
    with reusing() as session, chunk(session, w2c) as now:
        for step in now.steps(SIGMAS):
            fast(x, step.sigma, w2c, text, history)
    assert now.lookups == 2


def heun(model, x, s, s_next, w2c, text, history):
    a = model(x, s, w2c, text, history)
    b = model(x + (s_next - s) * a, s_next, w2c, text, history)
    return x + (s_next - s) * 0.5 * (a + b)


@pytest.mark.parametrize("form", ["merge", "lookup"])
def test_slopes_of_heuns_rule_in_the_graph_are_no_steps_of_the_loop_in_python(model, form):
    fast, (x, w2c, text, history) = compiled(heun), inputs()
    levels, want, taken = [level(s) for s in SIGMAS], x, []
    with reusing(**{"steps.form": form}) as session, chunk(session, w2c) as now:
        for step in now.steps(levels):
            taken.append(step.index)
            x = fast(model, x, step.sigma, step.sigma_next, w2c, text, history)
            if not step.reused:
                want = heun(model, want, step.sigma, step.sigma_next, w2c, text, history)
                kept = want
            want = kept
            torch.testing.assert_close(x, want)
    assert taken == ([0, 3] if form == "merge" else [0, 1, 2, 3])
    assert now.plan.steps.total == 4


def test_weights_shared_over_depth_are_no_steps():
    class Refiner(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(4, 32)
            self.block = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

        def forward(self, x):
            h = self.embed(x)
            for _ in range(4):
                h = h + self.block(h)
            return h

    model, x = Refiner().eval(), torch.randn(1, 64, 4)
    fast = compiled(model, "all")
    options = {"preset": "all", "steps.overlap_min": 0.0}
    with lipass.Session(**options) as session, chunk(session, inputs()[1]):
        torch.testing.assert_close(fast(x), model(x))


def test_revisit_by_poses_is_answered_as_before(model):
    poses = parse_trajectory("right-10, left-10")
    fast, (x, _, text, _) = compiled(model), inputs()
    w2c, history = poses[None, :20], torch.randn(1, 2, 256, 16)
    with (
        lipass.Session(preset="cache", **{"steps.form": "lookup"}) as session,
        session.chunk(poses=poses[:16], query=poses[16:20]) as now,
    ):
        for step in now.steps(SIGMAS):
            fast(x, level(step.sigma), w2c, text, history)
    assert now.lookups == len(now.plan.steps.reused) > 0


def test_large_prompt_of_inference_mode_computes_as_nothing_tells_of_a_write(model, monkeypatch):
    monkeypatch.setattr(inputs_module, "_HOST_ELEMENTS_MAX", 100)
    with torch.inference_mode():
        fast, (x, w2c, text, history) = compiled(model), inputs()
        out, now = play(
            fast,
            between=lambda step: text.mul_(2) if step.index == 2 else None,
            given=(x, w2c, text, history),
        )
        torch.testing.assert_close(out[2], model(x, level(0.5), w2c, text, history))
    assert now.lookups == 0
    assert any("use torch.no_grad()" in why for why in now.why_missed)


def test_a_chunk_that_is_tried_again_counts_from_nothing(model):
    fast, (x, w2c, text, history) = compiled(model), inputs()
    with reusing() as session:
        now = chunk(session, w2c)
        with contextlib.suppress(MemoryError), now:
            for step in now.steps(SIGMAS):
                if step.index == 1:
                    fast(x, level(step.sigma), w2c, text * 2, history)  # computes: another prompt
                    raise MemoryError
                fast(x, level(step.sigma), w2c, text, history)
        assert now.misses == 1
        with now:
            for step in now.steps(SIGMAS):
                fast(x, level(step.sigma), w2c, text, history)
    assert (now.lookups, now.misses, now.steps_skipped()) == (2, 0, 2)
