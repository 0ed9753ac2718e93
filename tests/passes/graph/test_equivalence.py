"""Break rewrites on purpose: what is compared must notice, keep the original and say why."""

import dataclasses

import pytest
import torch
from spellings import NAMED, SPARSE, args, heads, model
from torch.nn import functional as F

from lipass.passes.attention import check_site, match
from lipass.passes.attention.one_spelling import spell_as_sdpa
from lipass.passes.attention.site import SDPA, sites
from lipass.passes.core import PassError
from lipass.passes.facts import canonicalize

OFF = "canonicalize{verify=false},find-attention{segments=text+history+current verify=false}"


def by_hand(q, keys, values):
    return (q @ torch.cat(keys, 2).mT * 0.3).softmax(-1) @ torch.cat(values, 2)


def sdpa(q, keys, values):
    return F.scaled_dot_product_attention(q, torch.cat(keys, 2), torch.cat(values, 2), scale=0.3)


@pytest.fixture
def wrong_scale(monkeypatch):
    """Let every attention written by hand lose its scale."""

    def lose(spelled, ctx):
        spell_as_sdpa(dataclasses.replace(spelled, scale=1.0), ctx)

    monkeypatch.setattr("lipass.passes.attention.one_spelling.spell_as_sdpa", lose)
    monkeypatch.setattr(canonicalize, "spell_as_sdpa", lose)


@pytest.fixture
def values_in_another_order(monkeypatch):
    """Let every match of SDPA pair keys with the values of other pieces."""
    right = match.attention

    def turn(node, **how):
        found = right(node, **how)
        if not isinstance(found, match.Operands):
            return found
        return dataclasses.replace(found, values=(*found.values[1:], found.values[0]))

    monkeypatch.setattr(match, "attention", turn)


def test_spelling_that_loses_its_scale_is_kept(trace, apply, wrong_scale):
    gm = trace(model(by_hand), args())
    apply(gm, NAMED)
    ((_, site),) = sites(gm.graph)
    assert site.role == "other"
    assert site.reason.startswith("its SDPA call is not equal: its value changes by ")
    assert not gm.graph.find_nodes(op="call_function", target=SDPA)


def test_spelling_that_loses_its_scale_raises_under_strict(trace, apply, wrong_scale):
    with pytest.raises(PassError, match="strict: attention must equal its SDPA call, but"):
        apply(trace(model(by_hand), args()), "canonicalize{strict=true}")


def test_spelling_is_trusted_with_verify_off(trace, apply, wrong_scale):
    gm = trace(model(by_hand), args())
    apply(gm, OFF)
    assert [site.role for _, site in sites(gm.graph)] == ["decode"]


def test_site_of_mixed_up_pieces_is_kept(trace, apply, values_in_another_order):
    gm = trace(model(sdpa), args())
    apply(gm, f"{NAMED},sparse-attention")
    ((_, site),) = sites(gm.graph)
    assert site.role == "other"
    assert site.reason.startswith("its sparse call at budget 1.0 is not equal: ")
    assert not gm.graph.find_nodes(op="call_function", target=SPARSE)


def test_site_of_mixed_up_pieces_raises_under_strict(trace, apply, values_in_another_order):
    text = "canonicalize,find-attention{segments=text+history+current strict=true}"
    with pytest.raises(PassError, match=r"must equal its sparse call at budget 1.0"):
        apply(trace(model(sdpa), args()), text)


def test_sites_of_one_form_are_compared_once(trace, apply, monkeypatch):
    seen = []

    def count(*given):
        seen.append(given)

    def layers(x, text, history):
        for _ in range(3):
            x = x + model(sdpa)(x, text, history).transpose(1, 2).flatten(2).mT.reshape(x.shape)
        return heads(x)

    monkeypatch.setattr(check_site, "wrong", count)
    gm = trace(layers, args())
    apply(gm, NAMED)
    assert [site.role for _, site in sites(gm.graph)] == ["decode"] * 3
    assert len(seen) == 1


def test_comparison_draws_no_random_numbers_and_counts_no_calls(trace, apply):
    from lipass.kernels import registry

    registry.reset_telemetry()
    gm, before = trace(model(by_hand), args()), torch.random.get_rng_state()
    apply(gm, NAMED)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert registry.telemetry() == {}
