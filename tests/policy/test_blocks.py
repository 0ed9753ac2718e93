import pytest

from lipass.config import Config
from lipass.policy.blocks import block_budget, dense_chunk

REFERENCE = Config.resolve("reference").sparse


@pytest.mark.parametrize(("role", "share"), [("prefill", 0.3), ("decode", 0.175)])
def test_role_has_its_budget(role, share):
    budget = block_budget(REFERENCE, role=role, layer=5, history_chunks=4)
    assert (budget.share, budget.dense_reason) == (share, None)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"role": "cross"}, "role cross has no latents to choose from"),
        ({"role": "text"}, "role text has no latents to choose from"),
        ({"layer": 0}, "layer 0 is in sparse.dense_layers"),
        ({"history_chunks": 2}, "history of 2 chunks < sparse.dense_chunks 3"),
    ],
)
def test_kept_dense_by_rule_with_a_reason(changed, reason):
    call = {"role": "decode", "layer": 5, "history_chunks": 4, **changed}
    budget = block_budget(REFERENCE, **call)
    assert (budget.share, budget.dense_reason) == (1.0, reason)


def test_section_off_is_dense():
    budget = block_budget(None, role="decode", layer=0, history_chunks=0)
    assert (budget.share, budget.dense_reason) == (1.0, "sparse attention is off")
    assert dense_chunk(None, 0) is None


def test_context_that_nobody_chose_has_no_length_to_judge():
    adaptive = Config.resolve("all").sparse
    assert dense_chunk(adaptive, 4) is None
    assert dense_chunk(adaptive, 4, adaptive.dense_latents + 1) is None
    assert dense_chunk(adaptive, 4, adaptive.dense_latents) is not None
