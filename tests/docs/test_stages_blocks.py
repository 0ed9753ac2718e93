"""The page of stages and ranks runs, word for word, on stages that are quick."""

import sys

import pytest
import torch
import torch.distributed as dist
from page_blocks import block_of
from torch.nn import functional as F

import lipass
from lipass import Stage, Stages

PAGE = "docs/stages.md"
APP = """
import torch


def load(weights):
    assert weights == "model.safetensors"
    return 3.0


def generate(model, session, history, controls, stream):
    w2c = torch.eye(4).repeat(4 * len(history) + 4, 1, 1)
    w2c[:, 2, 3] = torch.arange(len(w2c)) * -0.1
    past = w2c[:-4] if history else None
    with session.chunk(poses=past, query=w2c[-4:], stream=stream) as chunk:
        return model * len(history) + controls + 0 * chunk.index


def decode(latents):
    return latents.byte()


"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Let the first block of the page be a module."""

    def write(code):
        (tmp_path / "my_app.py").write_text(APP + code)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield write
    sys.modules.pop("my_app", None)


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """Join a group of one where the page joins one of many."""
    begin = dist.init_process_group
    store = dist.FileStore(str(tmp_path / "store"), 1)
    monkeypatch.setattr(
        dist, "init_process_group", lambda: begin("gloo", store=store, rank=0, world_size=1)
    )
    yield dist.init_process_group
    if dist.is_initialized():
        dist.destroy_process_group()


@block_of(PAGE, 0)
def test_stages_of_the_page_are_made(app, code):
    app(code)
    import my_app

    denoiser = my_app.Denoiser("model.safetensors")
    first = denoiser({"controls": torch.ones(2), "asked_at": 0.5})
    assert my_app.Decoder()(first)["frames"].tolist() == [1, 1]
    denoiser.forget(1)
    assert denoiser.history == []
    assert not denoiser.session.turns.state()["done"]
    denoiser.close()


@block_of(PAGE, 1)
def test_line_of_the_page_runs_in_processes(app, code):
    (stages,) = block_of(PAGE, 0).args[1]
    app(stages)
    shown = []
    controls = [{"controls": torch.full((2,), n), "asked_at": 0.0} for n in range(3)]
    exec(code, {"__name__": "__main__", "controls": controls, "show": shown.append})
    assert [one.tolist() for one in shown] == [[0, 0], [4, 4], [8, 8]]


@block_of(PAGE, 2)
def test_steering_of_the_page_goes_on_from_what_was_shown(app, code):
    (stages,) = block_of(PAGE, 0).args[1]
    app(stages)
    shown = []
    line = [
        Stage("denoise", "my_app:Denoiser", {"weights": "model.safetensors"}),
        Stage("decode", "my_app:Decoder"),
    ]
    with Stages(line) as stages:
        names = {"stages": stages, "show": shown.append}
        exec(code, names | {"ahead": torch.tensor([1.0]), "left": torch.tensor([2.0])})
    assert [one.tolist() for one in shown] == [[1], [5]]


@block_of(PAGE, 3)
def test_a_session_of_ranks_of_the_page_plans(one_rank, code):
    names = {"lipass": lipass}
    exec(code, names)
    with names["session"] as session, session.chunk(query=torch.eye(4).expand(4, 4, 4)) as chunk:
        assert chunk.context == []


@block_of(PAGE, 4)
def test_attention_over_heads_of_the_page_is_attention(one_rank, code):
    one_rank()
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in "qkv")
    names = {"q": q, "k": k, "v": v}
    exec(code, names)
    assert torch.equal(names["out"], F.scaled_dot_product_attention(q, k, v))


@block_of(PAGE, 5)
def test_attention_over_keys_of_the_page_is_attention(one_rank, code):
    one_rank()
    q = torch.randn(1, 1, 4 * 30 * 52, 4)
    k, v = torch.randn(2, 1, 1, 2 * 30 * 52, 4)
    names = {"lipass": lipass, "q": q, "k": k, "v": v}
    exec(code, names)
    assert (names["out"] - F.scaled_dot_product_attention(q, k, v)).abs().max() < 1e-5
