"""The example model: what lipass may rely on, and that the shipped weights are what they claim."""

import itertools

import pytest
import torch

from lipass.examples.tinyworld.camera import relative_to
from lipass.examples.tinyworld.metrics import affected_psnr_db, psnr_db
from lipass.examples.tinyworld.model import CHUNK_LATENTS, ModelConfig, TinyWorld, tokenize
from lipass.examples.tinyworld.rollout import SIGMAS, generate_chunk, retrieve, roll_out
from lipass.examples.tinyworld.scenario import REGIMES, make_scenario
from lipass.examples.tinyworld.weights import load
from lipass.policy.trajectory import parse_trajectory

TINY = ModelConfig(width=48, heads=1, blocks=2, rows=4, columns=4)


def tiny() -> TinyWorld:
    torch.manual_seed(0)
    model = TinyWorld(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def inputs(model: TinyWorld, n: int = 5):
    w2c = relative_to(path := parse_trajectory("w-3,left-9", step_deg=6.0)[: n + 4], path[n])[None]
    text = model.text(tokenize("a room at dusk")[None])
    return torch.randn(1, 16, n, 4, 4), w2c, text


@pytest.mark.parametrize("told", [False, True])
def test_whole_chunk_equals_prefill_and_steps(told):
    model = tiny()
    context, w2c, text = inputs(model)
    noise, sigmas = torch.randn(1, 16, 4, 4, 4), torch.tensor(SIGMAS)
    walls = torch.randn(1, 16, 9, 4, 4) if told else None
    seen, query = walls.split((5, 4), 2) if told else (None, None)
    whole = generate_chunk(model, noise, sigmas, context, w2c, text, walls)
    history = model(context, torch.zeros(1, 5), w2c, text, walls=seen)
    x = noise
    for sigma, after in itertools.pairwise(SIGMAS):
        velocity = model(x, torch.full((1, CHUNK_LATENTS), sigma), w2c, text, history, query)
        x = x + (after - sigma) * velocity
    assert torch.allclose(whole, x, atol=1e-6)


def test_prefill_keys_depend_only_on_the_context():
    model = tiny()
    context, w2c, text = inputs(model)
    other = w2c.clone()
    other[:, 5:, :3, 3] += 1.0
    a = model(context, torch.zeros(1, 5), w2c, text)
    b = model(context, torch.zeros(1, 5), other, text)
    assert all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


def test_order_of_context_latents_does_not_matter():
    model = tiny()
    context, w2c, text = inputs(model)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = torch.cat([w2c[:, order], w2c[:, 5:]], 1)
    noise, sigmas = torch.randn(1, 16, 4, 4, 4), torch.tensor(SIGMAS)
    a = generate_chunk(model, noise, sigmas, context, w2c, text)
    b = generate_chunk(model, noise, sigmas, context[:, :, order], shuffled, text)
    assert torch.allclose(a, b, atol=1e-5)


def test_walls_that_no_weight_reads_change_nothing_and_others_do():
    model = tiny()
    context, w2c, text = inputs(model)
    noise, sigmas = torch.randn(1, 16, 4, 4, 4), torch.tensor(SIGMAS)
    walls = torch.randn(1, 16, 9, 4, 4)
    told = generate_chunk(model, noise, sigmas, context, w2c, text, walls)
    unread = generate_chunk(model, noise, sigmas, context, w2c, text)
    assert not torch.allclose(told, unread, atol=1e-3)
    torch.nn.init.zeros_(model.embed_walls.weight)
    told = generate_chunk(model, noise, sigmas, context, w2c, text, walls)
    assert torch.equal(told, unread)


def test_padding_words_are_equal_keys():
    model = tiny()
    key, value = model.text(tokenize("a room")[None])[0]
    assert torch.equal(key[:, :, 2:3].expand_as(key[:, :, 2:]), key[:, :, 2:])
    assert torch.equal(value[:, :, 2:3].expand_as(value[:, :, 2:]), value[:, :, 2:])


def test_unknown_word_is_named():
    with pytest.raises(ValueError, match="got 'castle'"):
        tokenize("a castle at night")


def test_retrieval_keeps_everything_while_it_fits():
    poses = parse_trajectory("left-31, right-32", step_deg=6.0)
    assert retrieve(poses[:20], poses[20:24]) == list(range(20))


def test_retrieval_finds_the_mirrored_clip_on_the_way_back():
    poses = parse_trajectory("left-31, right-32", step_deg=6.0)
    kept = retrieve(poses[:52], poses[52:56])
    assert len(kept) == 20
    assert set(range(8, 12)) <= set(kept)


def test_psnr_is_of_the_mean_error_and_affected_ignores_equal_chunks():
    x = torch.zeros(8, 3, 2, 2)
    y = x.clone()
    y[4:] += 0.1
    assert psnr_db(x, y) == pytest.approx(10 * torch.log10(torch.tensor(200.0)).item(), abs=1e-3)
    assert affected_psnr_db(x, y, 4) == pytest.approx(20.0, abs=1e-3)
    assert psnr_db(x, x) == 100.0


def test_the_free_regime_alone_is_told_the_walls():
    _, codec = load()
    free, explored = (make_scenario("left/right", regime, 9001, codec) for regime in REGIMES[::-1])
    assert len(free.walls) == len(free.w2c)
    assert free.walls.abs().amax((1, 2, 3)).min() > 0.5
    assert not explored.walls.any()


def test_free_rollout_keeps_the_corners_that_the_walls_tell_of():
    model, codec = load()
    scenario = make_scenario("left/right", "free", 9001, codec)
    frames = 8 * CHUNK_LATENTS
    text = model.text(tokenize("a room at day in clear air in plain light")[None])
    shown = []
    for walls in (scenario.walls, None):
        made = roll_out(model, text, scenario.given, scenario.w2c[:frames], walls, seed=9001)
        shown.append(codec.decode(made.latents)[CHUNK_LATENTS:])
    told, untold = (psnr_db(x, scenario.truth[CHUNK_LATENTS:frames]) for x in shown)
    assert told > 21.0
    assert told > untold + 2.0


def test_codec_reconstructs_a_held_out_room():
    _, codec = load()
    scenario = make_scenario("left/right", "explored", 9001, codec)
    shown = codec.decode(scenario.given)
    assert psnr_db(shown, scenario.truth[: len(shown)]) > 30.0


def test_shipped_model_remembers_a_room():
    model, codec = load()
    scenario = make_scenario("left/right", "explored", 9001, codec)
    frames = len(scenario.given) + 2 * CHUNK_LATENTS
    text = model.text(tokenize("a room at day in clear air in plain light")[None])
    made = roll_out(model, text, scenario.given, scenario.w2c[:frames], scenario.walls, seed=0)
    new = slice(len(scenario.given), frames)
    shown, truth = codec.decode(made.latents)[new], scenario.truth[new]
    still = scenario.truth[new.start - 1 : new.start].expand_as(truth)
    assert psnr_db(shown, truth) > psnr_db(still, truth) + 4.0


def test_missing_size_says_what_is_there():
    with pytest.raises(ValueError, match="have small"):
        load("base")
