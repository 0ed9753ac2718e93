import pytest

from lipass.config import Config
from lipass.policy.blocks import dense_chunk, early_step, short_context


def test_short_history_is_dense_with_a_reason():
    reference = Config.resolve("reference").sparse
    assert dense_chunk(reference, 2) == "history of 2 chunks < sparse.dense_chunks 3"
    assert dense_chunk(reference, 3) is None


def test_section_off_has_no_reason():
    assert dense_chunk(None, 0) is None


@pytest.mark.parametrize(
    ("latents", "latent_tokens", "is_short"),
    [(10, 64, True), (11, 64, False), (1, 1560, False), (1, 640, True), (0, 64, True)],
)
def test_context_is_short_by_its_tokens(latents, latent_tokens, is_short):
    adaptive = Config.resolve("all").sparse
    assert (short_context(adaptive, latents, latent_tokens) is not None) == is_short


def test_short_context_is_said_in_latents_and_tokens():
    said = short_context(Config.resolve("all").sparse, 8, 64)
    assert said == "context of 8 latents, 512 tokens <= sparse.dense_tokens 640"
    assert short_context(None, 8, 64) is None


def test_first_steps_are_dense_with_a_reason():
    options = Config.resolve("all", {"sparse.dense_steps": 1}).sparse
    assert early_step(options, 0) == "denoising step 0 < sparse.dense_steps 1"
    assert early_step(options, 1) is None
    assert early_step(Config.resolve("all").sparse, 0) is None
    assert early_step(None, 0) is None
