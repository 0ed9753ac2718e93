import pytest
import torch

from lipass.passes.attention.site import poses

TEXT = "canonicalize,find-attention,find-poses"


@pytest.fixture
def found(trace, apply):
    def run(fn, args, grown=None, text=TEXT):
        gm = trace(fn, args, grown)
        records, _ = apply(gm, text)
        facts = [
            (n.name, str(f.history_latents), str(f.current_latents)) for n, f in poses(gm.graph)
        ]
        return facts, [note.reason for note in records[-1].notes]

    return run


def test_decode(found, mini, inputs):
    facts, reasons = found(mini, inputs(4).decode)
    assert facts == [("l_w2c_", "4", "4")]
    assert reasons == ["l_w2c_: 8 = 4 history + 4 current"]


def test_decode_with_a_history_that_varies(found, mini, inputs):
    ((name, history, current),), _ = found(mini, inputs(4).decode, inputs(8).decode)
    assert (name, current) == ("l_w2c_", "4")
    assert "//16" in history


def test_prefill_counts_the_frames_to_come(found, mini, inputs):
    facts, reasons = found(mini, inputs(4).prefill, inputs(8).prefill)
    assert [(name, current) for name, _, current in facts] == [("l_w2c_", "4")]
    assert reasons[0].endswith("being encoded + 4 to come")


def test_unrolled_chunk(found, mini, inputs):
    facts, _ = found(mini.chunk, inputs(4).chunk)
    assert facts == [("l_w2c_", "4", "4")]


def test_pass_changes_nothing(trace, apply, mini, inputs):
    records, _ = apply(trace(mini, inputs(4).decode), TEXT)
    assert not records[-1].changed


def test_no_matrices(found):
    assert found(lambda x: x + 1, (torch.randn(3),)) == ([], ["no input is [B, F, 4, 4]"])


def test_no_attention(found):
    reason = "l_w2c_: no prefill or decode site says how many latents there are"
    assert found(lambda w2c: w2c + 1, (torch.randn(1, 8, 4, 4),)) == ([], [reason])


def with_extra(mini):
    """Decode with one more input, which the model adds to its output."""

    def fn(latents, sigma, w2c, text, history, extra):
        return mini(latents, sigma, w2c, text, history) + extra.sum()

    return fn


def test_another_number_of_cameras(found, mini, inputs):
    args = (*inputs(4).decode, torch.randn(1, 9, 4, 4))
    facts, _ = found(with_extra(mini), args)
    assert facts == [("l_w2c_", "4", "4")]


def test_two_inputs_that_fit_are_not_guessed(found, mini, inputs):
    args = (*inputs(4).decode, torch.randn(1, 8, 4, 4))
    assert found(with_extra(mini), args) == (
        [],
        ["l_w2c_, l_extra_ all fit; set find-poses{input=..}"],
    )


def test_option_names_the_input(found, mini, inputs):
    args = (*inputs(4).decode, torch.randn(1, 8, 4, 4))
    facts, _ = found(with_extra(mini), args, text=f"{TEXT}{{input=w2c}}")
    assert [name for name, *_ in facts] == ["l_w2c_"]


def test_integer_matrices_are_no_cameras(found, mini, inputs):
    args = (*inputs(4).decode, torch.ones(1, 8, 4, 4, dtype=torch.int64))
    facts, _ = found(with_extra(mini), args)
    assert [name for name, *_ in facts] == ["l_w2c_"]


def test_parameters_are_no_cameras(found, mini, inputs):
    mini.extra = torch.nn.Parameter(torch.randn(1, 8, 4, 4))

    def fn(*args):
        return mini(*args) + mini.extra.sum()

    facts, _ = found(fn, inputs(4).decode)
    assert len(facts) == 1


def test_prefill_without_frames_to_come(found):
    from torch.nn import functional as F

    def fn(x, w2c):
        q = x.flatten(2).mT.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q) * w2c.sum(), q

    args = (torch.randn(1, 16, 8, 4, 4), torch.randn(1, 8, 4, 4))
    assert found(fn, args) == ([], ["l_w2c_: 8 cameras for 8 latents; none for frames to come"])


def test_matrices_that_are_written_to(found, mini, inputs):
    def fn(latents, sigma, w2c, *args):
        w2c.mul_(2)
        return mini(latents, sigma, w2c, *args)

    assert found(fn, inputs(4).decode) == ([], ["l_w2c_: it is written to"])
