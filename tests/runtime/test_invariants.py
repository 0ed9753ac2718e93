import gc

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lipass
from lipass.receipt import reset_report
from lipass.runtime.results import Invariants

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FACTS = "canonicalize,find-attention,find-poses,find-steps"
PIPELINE = f"{FACTS},hoist-calls{{work_min=0 counted_writes=true}},share-blocks"
OPTIONS = {"preset": "exact", "inner": "eager", "pipeline": PIPELINE}


class Cross(nn.Module):
    """Tokens that attend to a projected prompt, as the cross-attention of video models."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x, text):
        q = self.query(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k = self.key(text).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Cross().eval()


@pytest.fixture
def fast(model):
    compiled = torch.compile(model, backend="light_interaction", options=OPTIONS)

    @torch.no_grad()
    def run(x, text):
        return compiled(x, text)

    return run


def tokens():
    return torch.randn(1, 6, 8)


def prompt():
    return torch.randn(1, 5, 4)


def counts(session):
    return session.invariants.computed, session.invariants.kept


def check(model, fast, x, text):
    with torch.no_grad():
        torch.testing.assert_close(fast(x, text), model(x, text), atol=1e-6, rtol=1e-6)


def test_prompt_is_projected_once_a_session(model, fast):
    text = prompt()
    with lipass.Session(preset="exact") as session:
        for _ in range(4):
            check(model, fast, tokens(), text)
    assert counts(session) == (1, 3)


def write(model, text):
    return text.mul_(2)


def write_through_a_view_of_a_view(model, text):
    text[:, :1].view(-1).zero_()
    return text


def write_weights(model, text):
    model.key.weight.mul_(2)
    return text


def copy(model, text):
    return text.clone()


def exchange_memory(model, text):
    text.data = prompt()
    return text


CHANGES = [write, write_through_a_view_of_a_view, write_weights, copy, exchange_memory]


@pytest.mark.parametrize("change", CHANGES)
def test_what_may_have_changed_is_projected_anew(model, fast, change):
    text = prompt()
    with lipass.Session(preset="exact") as session, torch.no_grad():
        check(model, fast, tokens(), text)
        check(model, fast, tokens(), change(model, text))
    assert counts(session) == (2, 0)


def add_through_data(model):
    model.key.weight.data += 1.0


def add_through_numpy(model):
    model.key.weight.detach().numpy()[:] += 1.0


def swap_memory(model):
    model.key.weight.data = model.key.weight.data + 1.0


def load(model):
    model.load_state_dict({name: value + 1.0 for name, value in model.state_dict().items()})


@pytest.mark.parametrize("merge", [add_through_data, add_through_numpy, swap_memory, load])
def test_merged_adapter_takes_effect_at_once(merge):
    model = Cross().eval()
    fast = torch.compile(
        model, backend="light_interaction", options={"preset": "exact", "inner": "eager"}
    )
    text = torch.randn(1, 4096, 4)
    with lipass.Session(preset="exact"), torch.no_grad():
        for i in range(3):
            if i == 2:
                merge(model)
            check(model, fast, tokens(), text)


def test_report_counts_both(model, fast):
    reset_report()
    text = prompt()
    with lipass.Session(preset="exact"):
        for _ in range(3):
            fast(tokens(), text)
    report = lipass.report()
    assert (report.invariants_computed, report.invariants_kept) == (1, 2)
    assert "invariants: 1 computed, 2 kept" in report.table()


def test_branches_of_guidance_keep_a_prompt_each(model, fast):
    wanted, unwanted = prompt(), prompt()
    with lipass.Session(preset="exact") as session:
        for _ in range(3):
            check(model, fast, tokens(), wanted)
            check(model, fast, tokens(), unwanted)
    assert counts(session) == (2, 4)


def test_sessions_keep_their_own(model, fast):
    text = prompt()
    with lipass.Session(preset="exact") as one:
        check(model, fast, tokens(), text)
        with lipass.Session(preset="exact") as other:
            check(model, fast, tokens(), text)
        check(model, fast, tokens(), text)
    assert (counts(one), counts(other)) == ((1, 1), (1, 0))


def test_nothing_is_kept_without_a_session(model, fast):
    text = prompt()
    with lipass.Session(preset="exact") as session:
        check(model, fast, tokens(), text)
    for _ in range(2):
        check(model, fast, tokens(), text)
    assert counts(session) == (1, 0)


def test_inference_tensors_compute_in_each_call(model):
    compiled = torch.compile(model, backend="light_interaction", options=OPTIONS)
    with torch.inference_mode(), lipass.Session(preset="exact") as session:
        text = prompt()
        for _ in range(3):
            x = tokens()
            torch.testing.assert_close(compiled(x, text), model(x, text), atol=1e-6, rtol=1e-6)
            text.mul_(2)
    assert counts(session) == (3, 0)
    assert lipass.report().invariants_untold == 3
    assert "torch.no_grad() lets a session keep them" in lipass.report().table()


def test_results_die_with_their_inputs_and_with_the_session(model, fast):
    with lipass.Session(preset="exact") as session:
        for _ in range(20):
            fast(tokens(), prompt())
        gc.collect()
        (entries,) = session.invariants._kept.values()
        assert len(entries) <= 2
    assert not session.invariants._kept


def test_a_few_results_of_one_body_are_kept():
    store, runs = Invariants(), []
    inputs = [prompt() for _ in range(6)]

    def body(text, size):
        runs.append(text)
        return (text * 2,)

    for text in inputs + inputs[-4:] + inputs[:1]:
        assert torch.equal(store.get(body, (text, 3))[0], text * 2)
    assert len(runs) == 7
    store.get(body, (inputs[0], 4))  # another size
    assert len(runs) == 8
