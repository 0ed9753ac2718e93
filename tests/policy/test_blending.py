from typing import NamedTuple

import numpy as np
import pytest
import torch

from lipass.policy.blending import check_like, check_text, doubled, mixed, same

A, B = (torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


class Pair(NamedTuple):
    key: torch.Tensor
    value: torch.Tensor


@pytest.mark.parametrize("policy", ["lerp", "slerp"])
def test_limits_are_the_texts_themselves(policy):
    assert mixed(policy, A, B, 0.0) is A
    assert mixed(policy, A, B, 1.0) is B
    assert mixed(policy, A, A, 0.3) is A
    torch.testing.assert_close(mixed(policy, A, A.clone(), 0.3), A)


def test_slerp_keeps_norms_where_lerp_shortens_them():
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (A, B))
    turned, straight = mixed("slerp", a, b, 0.5), mixed("lerp", a, b, 0.5)
    torch.testing.assert_close(turned.norm(dim=-1), torch.ones(2, 5))
    assert (straight.norm(dim=-1) < 1).all()
    # half way means as far from one as from the other
    torch.testing.assert_close((turned * a).sum(-1), (turned * b).sum(-1))


def test_slerp_of_padding_and_of_opposites_goes_straight():
    zeros = torch.zeros_like(A)
    torch.testing.assert_close(mixed("slerp", zeros, B, 0.25), 0.25 * B)
    torch.testing.assert_close(mixed("slerp", A, -A, 0.25), 0.5 * A)


def test_nearly_equal_directions_give_no_nan():
    near = A * (1 + 1e-7)
    torch.testing.assert_close(mixed("slerp", A, near, 0.5), A)


def test_structure_and_dtype_stay():
    old = {"pairs": [Pair(A, B)], "mask": torch.ones(2, 5, dtype=torch.bool), "name": "day"}
    new = {"pairs": [Pair(B.half(), A)], "mask": torch.zeros(2, 5, dtype=torch.bool), "name": "x"}
    made = mixed("lerp", old, new, 0.5)
    assert isinstance(made["pairs"][0], Pair)
    assert made["pairs"][0].key.dtype == torch.float16
    assert made["mask"] is new["mask"]
    assert made["name"] == "x"


def test_two_texts_lie_one_behind_the_other():
    pair = doubled((A, torch.ones(2, 5, dtype=torch.int64)), (B, torch.zeros(2, 5).long()))
    torch.testing.assert_close(pair[0], torch.cat([A, B], 1))
    assert pair[1].tolist() == [[1] * 5 + [0] * 5] * 2


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (None, TypeError, "got None; pass embeddings"),
        ([], TypeError, r"got \[\]"),
        ([A, (A, A.log())], ValueError, r"NaN or infinite numbers in text\[1\]\[1\] \[2, 5, 8\]"),
    ],
)
def test_what_is_no_text_is_refused(text, error, said):
    with pytest.raises(error, match=said):
        check_text(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ([A, B], r"structure of the one before, got text in one of them only|got text\[0\]"),
        (A[:, :3], r"got \[2, 3, 8\] float32 on cpu for \[2, 5, 8\] float32.*pad prompts"),
        (A.double(), r"float64 on cpu for \[2, 5, 8\] float32"),
        ("night", "got str for"),
    ],
)
def test_what_cannot_take_the_place_of_a_text_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        check_like(text, A)


@pytest.mark.parametrize("policy", ["lerp", "slerp"])
def test_what_is_mixed_lies_as_the_texts_do(policy):
    """A model compiled for the strides of its prompt would be compiled anew for others."""
    day, night = (torch.randn(1, 6, 3, 8).transpose(1, 2) for _ in range(2))
    made = mixed(policy, [day], [night], 0.5)[0]
    assert made.stride() == night.stride() != made.contiguous().stride()
    wide = torch.randn(1, 6, 1).expand(1, 6, 8)
    assert mixed(policy, [wide], [wide.clone()], 0.5)[0].shape == wide.shape


def test_texts_are_one_where_their_tensors_are_equal():
    assert same([A, {"mask": B, "words": 3}], [A.clone(), {"mask": B.clone(), "words": 3}])
    assert not same([A, {"mask": B, "words": 3}], [A, {"mask": B, "words": 4}])
    assert not same([A], [A + 1])
    assert not same([A], (A[:, :3],))
    assert same("night", "night")


def test_texts_of_what_has_no_plain_equality_are_one_as_objects_only():
    words = np.zeros(3)
    assert same([words], [words])
    assert not same([words], [words.copy()])
