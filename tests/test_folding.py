import pytest

from lipass.folding import folded, same_reason


@pytest.mark.parametrize(
    ("names", "together"),
    [
        (["blocks.3.attn"], "blocks.3.attn"),
        ([f"blocks.{i}.attn1" for i in range(54)], "blocks.0-53.attn1"),
        ([f"blocks.{i}.attn1" for i in (1, 2, 3, 5, 6, 7)], "blocks.*.attn1"),
        (["blocks.0.attn", "blocks.2.attn"], "blocks.0,2.attn"),
        (["blocks.0.attn@1", "blocks.1.attn@1"], "blocks.0-1.attn@1"),
        (["a.0.x", "b.0.x"], "*0.x"),
        (["head", "blocks.1.attn"], "head .. blocks.1.attn"),
        (["layer.1", "layer.1"], "layer.1"),
    ],
)
def test_equal_layers_have_one_name(names, together):
    assert folded(names) == together


def test_what_tells_equal_layers_apart_is_no_other_reason():
    assert same_reason("not shared: %cos_1 shares memory") == same_reason(
        "not shared: %cos_12 shares memory"
    )
    assert same_reason("predicted 0.31 ms sparse") == same_reason("predicted 0.4 ms sparse")
    assert same_reason("2 of 8 calls dense") != same_reason("3 of 8 calls dense")
