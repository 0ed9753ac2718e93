"""open-oasis: frames one by one behind a window, attention along one axis at a time."""

import sys
from pathlib import Path

import pytest
import torch

import lipass
from lipass.adapters.checkouts.examine import counted, options_of
from lipass.adapters.checkouts.open_oasis import build
from lipass.adapters.checkouts.subject import Ran
from lipass.receipt import current_report

CONTRACT = Path(__file__).parent / "contracts" / "open_oasis"
_OF_CHECKOUT = ("attention", "dit", "rotary_embedding_torch")


@pytest.fixture
def subject(monkeypatch, fresh_dynamo):
    """Yield a model with the call structure of the release, as a checkout of it would give."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    hidden = {name: sys.modules.pop(name) for name in _OF_CHECKOUT if name in sys.modules}
    # its one class from there is not what is tried here
    monkeypatch.setattr("lipass.adapters.checkouts.open_oasis.NEEDED", ("einops",))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # calls this small take longer to share than to compute
    yield build(CONTRACT, layers=1)
    torch.set_num_threads(threads)
    for name in _OF_CHECKOUT:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


def compiled(subject, preset):
    options = {**options_of(subject, preset), "inner": "eager"}
    return torch.compile(subject.model, backend="light_interaction", options=options)


def rolled(subject, model, chunks, session=None):
    with torch.no_grad():
        return list(subject.rollout(model, session, chunks))


def test_exact_is_the_model_in_two_graphs_however_long_its_window_is(subject):
    expected = rolled(subject, subject.model, 4)
    with lipass.adopt(subject.model) as adoption:
        assert adoption.family == "open_oasis"
        (change,) = adoption.changes
        assert change.name == "cache_if_possible"
        found = rolled(subject, compiled(subject, "exact"), 4)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert (current_report().graphs, current_report().left_eager) == (2, [])
    assert subject.model.temporal_rotary_emb.cache_if_possible
    again = rolled(subject, subject.model, 4)
    assert all(torch.equal(*pair) for pair in zip(again, expected, strict=True))


def test_as_it_is_some_of_it_runs_in_python_and_a_warning_says_so(subject):
    with pytest.warns(lipass.LipassWarning, match="must run compiled"):
        rolled(subject, compiled(subject, "exact"), 1)


def test_frames_are_left_out_and_counted_and_its_attention_stays_with_the_reason(subject):
    options = options_of(subject, "context")
    with lipass.adopt(subject.model):
        fast = compiled(subject, "context")
        rolled(subject, fast, 2)  # compiling runs operators too
        with lipass.Session(**options) as session:
            ran = counted(subject, lambda: rolled(subject, fast, 4, session))
    records = list(current_report().chunks)[-4:]
    said = [subject.expected(record) for record in records]
    assert ran == Ran(sum(one.calls for one in said), sum(one.latents for one in said))
    assert [len(one.plan.context.indices) for one in records] == [1, 2, 2, 2]
    reasons = {name.rpartition(".")[2]: one.reason for name, one in lipass.report().sites.items()}
    assert "it is causal" in reasons["t_attn"]
