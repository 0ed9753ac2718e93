from lipass.config import Config
from lipass.policy.blocks import dense_chunk


def test_short_history_is_dense_with_a_reason():
    reference = Config.resolve("reference").sparse
    assert dense_chunk(reference, 2) == "history of 2 chunks < sparse.dense_chunks 3"
    assert dense_chunk(reference, 3) is None


def test_section_off_has_no_reason():
    assert dense_chunk(None, 0) is None


def test_context_that_nobody_chose_has_no_length_to_judge():
    adaptive = Config.resolve("all").sparse
    assert dense_chunk(adaptive, 4) is None
    assert dense_chunk(adaptive, 4, adaptive.dense_latents + 1) is None
    assert dense_chunk(adaptive, 4, adaptive.dense_latents) is not None
