"""Every block of code in README and the docs runs, or asks for nothing that there is not."""

import argparse
import functools
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from page_blocks import PAGES, ROOT, block_of, code_of, commands_of, links_of, unresolved

import lipass
from lipass import cli
from lipass.examples import own_model

READERS_OWN = ("file.py", "model.py", "serve.py")


def ids(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.fixture
def small(monkeypatch, compiles):
    """Let the model of the docs be small."""
    monkeypatch.setattr(own_model, "ROWS", 4)
    monkeypatch.setattr(own_model, "COLUMNS", 4)
    return compiles


@block_of("README.md", 1)
def test_readme_shows_the_loop_of_the_example_word_for_word(code):
    assert code in Path(own_model.__file__).read_text()


@block_of("README.md", 0)
def test_call_in_readme_drops_latents_and_reuses_steps(small, code, capsys):
    names = {**vars(own_model), "model": own_model.World().eval()}
    names["w2c"] = own_model.parse_trajectory("left-7, right-8")
    exec(code, names)
    chunks = [chunk for chunk in lipass.report().chunks if chunk.plan.history_latents]
    assert any(chunk.steps_skipped for chunk in chunks)
    assert any(len(chunk.plan.context.indices) < chunk.plan.history_latents for chunk in chunks)
    assert "rewritten" in capsys.readouterr().out


@block_of("docs/first-hour.md", 0)
def test_wiring_of_the_first_hour_runs(small, code, capsys):
    model = own_model.World().eval()
    w2c = own_model.parse_trajectory("left-7, right-8")
    latents = torch.randn(12, own_model.CHANNELS, 4, 4)

    def prefill(model, history, keep):
        with torch.no_grad():
            return model(history[keep].transpose(0, 1)[None], torch.zeros(1), w2c[None, keep])[1]

    class Denoiser(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.world = model

        def forward(self, x, sigma, cache):
            if x.shape[2] != 4 or not isinstance(cache, list):
                return self.world(x, sigma, cache)
            return self.world(x, sigma, w2c[None, 8:12], cache)[0]

    names = {
        "model": Denoiser(),
        "prefill": lambda _, history, keep: prefill(model, history, keep),
        "chunks": [(w2c[:8], w2c[8:12], latents[:8])],
        "sigmas": own_model.SIGMAS,
        "x": torch.randn(1, own_model.CHANNELS, 4, 4, 4),
    }
    exec(code, names)
    assert small == [{"preset": "all"}]
    assert names["x"].isfinite().all()
    assert "rewritten" in capsys.readouterr().out


def a_cache_of(latents, per_latent=2):
    """Keys and values that say which latent they are of."""
    of = torch.tensor(latents, dtype=torch.float32).repeat_interleave(per_latent)
    return [of.view(1, 1, -1, 1).expand(1, 1, -1, 3) for _ in "kv"]


@block_of("docs/first-hour.md", 1)
def test_rows_of_a_cache_that_grows_are_those_of_the_chosen_latents(code):
    w2c = own_model.parse_trajectory("left-15, right-16")
    held = list(range(24))
    with lipass.Session(preset="context") as session:
        names = {"torch": torch, "session": session, "w2c": w2c, "start": 24, "held": held}
        names |= {"per_latent": 2, "cache": a_cache_of(held)}
        exec(code, names)
    assert names["chunk"].context != held
    (expected, _) = a_cache_of(names["chunk"].context)
    assert torch.equal(names["k"], expected)
    assert torch.equal(names["v"], expected)


@block_of("docs/first-hour.md", 2)
def test_a_full_cache_keeps_rows_of_what_is_held(code):
    (grown,) = [one for one in code_of(ROOT / "docs/first-hour.md") if "def rows" in one]
    names = {"torch": torch, "room_for": 16, "per_latent": 2, "held": list(range(28))}
    exec(grown.partition("\n\n")[0], names)
    with lipass.Session(preset="context", **{"context.window_chunks_max": 1}) as session:
        names |= {"session": session, "w2c": own_model.parse_trajectory("left-15, right-16")}
        names["cache"] = a_cache_of(names["held"])
        exec(code, names)
    assert len(names["held"]) == 16
    assert set(names["held"]) >= {0, 24, 25, 26, 27}
    assert torch.equal(names["cache"][0], a_cache_of(names["held"])[0])


@block_of("docs/grow.md", 0)
def test_loop_of_grow_takes_its_first_step_on_half_of_the_grid(code):
    code = code.replace("with session", "session = lipass.Session(**options)\nwith session")
    sizes = []

    def model(x, sigma, cameras, cache):
        sizes.append(tuple(x.shape[-2:]))
        return x * 0.5

    names = {"lipass": lipass, "model": model, "cameras": None, "cache": None, "past": None,
             "query": own_model.parse_trajectory("left-3"), "x": torch.randn(1, 4, 4, 8, 8),
             "SIGMAS": own_model.SIGMAS}  # fmt: skip
    exec(code, names)
    assert sizes[0] == (4, 4)
    assert set(sizes[1:]) == {(8, 8)}


@block_of("docs/grow.md", 1)
def test_spectrum_of_grow_is_an_option(code):
    names = {"latents": torch.randn(2, 4, 60, 104)}
    exec(code, names)
    lipass.Config.resolve(None, {"preset": "all", **names["options"]})


@block_of("docs/first-hour.md", 4)
def test_scheduler_of_the_first_hour_takes_its_own_steps(code):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    w2c = own_model.parse_trajectory("left-7")
    with lipass.Session(preset="all") as session:
        names = {"session": session, "poses": w2c[:4], "query": w2c[4:], "scheduler": scheduler}
        names |= {"x": torch.ones(1, 8, 4, 4, 4), "model": lambda x, t: x}
        exec(code, names)
    assert not torch.equal(names["x"], torch.ones(1, 8, 4, 4, 4))


@block_of("docs/first-hour.md", 5)
def test_attention_by_hand_of_the_first_hour_is_attention(code):
    heads, dim, n = 1, 8, 1
    draw = functools.partial(torch.randn, 1, heads)
    names = {"lipass": lipass, "n": n, "q": draw(4 * 1560, dim)}
    for i, tokens in (("0", 5), ("1", n * 1560), ("", 4 * 1560)):
        names |= {f"k{i}": draw(tokens, dim), f"v{i}": draw(tokens, dim)}
    exec(code, names)
    assert names["out"].shape == names["q"].shape


@block_of("docs/steering.md", 0)
def test_a_change_of_the_prompt_runs(code):
    texts = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    told = []

    def denoise(x, sigma, text, cache):
        told.append((float(text.mean()), [float(one) for one in cache]))
        return x

    names = {"day": texts[0], "night": texts[1], "denoise": denoise, "SIGMAS": (1.0, 0.5, 0.0)}
    names |= {"encode": lambda latents, text: text.mean(), "x": torch.ones(1, 8, 4, 4, 4)}
    names["w2c"] = own_model.parse_trajectory("left-27")
    with lipass.Session(preset="off") as session:
        exec(code, {**names, "session": session})
    assert [text for text, _ in told[::2]] == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert [cache for _, cache in told[::2]][-1] == [0, 1]


@block_of("docs/steering.md", 1)
def test_all_of_a_change_can_be_told(code):
    night, fog = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    with lipass.Session(preset="off") as session:
        session.steer(fog)
        exec(code, {"lipass": lipass, "session": session, "night": night, "fog": fog})


@block_of("docs/writing-a-pass.md", 1)
def test_tests_of_a_pass_of_ones_own_run(monkeypatch, code):
    monkeypatch.syspath_prepend(str(ROOT / "examples/own_pass"))
    exec(code, {})
    sys.modules.pop("own_pass")


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_code_asks_for_nothing_that_there_is_not(page):
    for code in code_of(page):
        compile(code, str(page), "exec")
        assert unresolved(code) == []


def test_a_name_that_there_is_not_is_seen():
    assert unresolved("lipass.Sesion()") == ["lipass.Sesion: no Sesion"]
    assert unresolved("session.chunk(cameras=w2c)") == ["session.chunk: no cameras"]


@functools.cache
def options_of(command):
    parser = argparse.ArgumentParser()
    importlib.import_module(f"lipass.cli.{command}").add_arguments(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_commands_exist_with_their_options(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_of(page):
        told = " ".join(words)
        if words[0] == "lipass":
            command = words[1].strip(",")
            assert command.startswith("-") or command in cli.COMMANDS, told
            given = {word for word in words[2:] if word.startswith("-") and len(word) > 1}
            assert given <= options_of(command), told
        elif words[0] == "make":
            assert words[1] in targets or "=" in words[1], told
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]), told
        elif words[0] in ("python", "bash") and words[1] not in READERS_OWN:
            assert (ROOT / words[1]).is_file(), told


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    for target in links_of(page):
        assert (page.parent / target).exists(), target
