import pytest
import torch
from kernel_cases import NO_NATIVE
from torch.nn import functional as F

from lipass.kernels import calibration, dense, pieces, registry
from lipass.kernels.calibration import Form, Rates

SLOW, FAST = Form(1.0, 1e3, 1e3), Form(0.0, 1e9, 1e9)
FAST_APART, FAST_JOINED = Rates(SLOW, FAST, FAST), Rates(FAST, SLOW, SLOW)


def call(tokens, queries=70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(length):
        return torch.randn(2, 3, length, 16, generator=generator).to(dtype)

    return draw(queries), [draw(n) for n in tokens], [draw(n) for n in tokens]


@pytest.fixture(params=["native", "sdpa"])
def provider(request, monkeypatch):
    if request.param == "native" and NO_NATIVE:
        pytest.skip(NO_NATIVE)
    rates = FAST_APART if request.param == "native" else FAST_JOINED
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: rates)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [(5, 300), (1, 127), (32, 128, 129), (7, 1, 1)])
def test_equals_attention_over_joined_keys(provider, tokens, dtype):
    q, k, v = call(tokens, dtype=dtype)
    out, ran = pieces.attend_to_all(q, k, v, 0.25)
    expected = F.scaled_dot_product_attention(
        q.double(), torch.cat(k, 2).double(), torch.cat(v, 2).double(), scale=0.25
    )
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert ran == provider
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_double_precision_is_joined_and_never_timed():
    q, k, v = call((5, 300), dtype=torch.float64)
    out, ran = pieces.attend_to_all(q, k, v, 0.25)
    expected = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    assert ran == "sdpa"
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("tokens", [(300,), (0, 300), (5, 0, 300), (0, 0, 7)])
def test_one_piece_and_empty_ones_are_read_where_they_lie(provider, tokens):
    q, k, v = call(tokens)
    out, ran = pieces.attend_to_all(q, k, v, 0.25)
    expected = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    assert ran == provider
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("needs", [0, 1, 2], ids=["q", "k", "v"])
def test_what_needs_a_gradient_is_joined(needs, monkeypatch):
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: FAST_APART)
    q, k, v = call((5, 300))
    needed = (q, k[1], v[0])[needs].requires_grad_()
    for attend in (pieces.attend_to_all, lambda *c: attend_without_bias(*c, lse=True)):
        needed.grad = None
        out, *_, ran = attend(q, k, v, 0.25)
        out.square().sum().backward()
        assert needed.grad.abs().sum() > 0
        assert ran in ("sdpa", "plain")


def attend_without_bias(q, k, v, scale, *, lse):
    return dense.attend_biased(q, k, v, scale, None, lse=lse)


def test_one_piece_is_left_to_the_inner_compiler(monkeypatch):
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: FAST_APART)
    sizes = (1, 3, 256, 64), torch.float32, torch.device("cpu"), (1280,)
    assert pieces.why_joined(*sizes) == "its keys are one piece"


def test_many_pieces_are_joined(monkeypatch):
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: FAST_APART)
    q, k, v = call((4, 4, 4, 4))
    out, ran = pieces.attend_to_all(q, k, v, 0.25)
    expected = F.scaled_dot_product_attention(q, torch.cat(k, 2), torch.cat(v, 2), scale=0.25)
    assert ran == "sdpa"
    torch.testing.assert_close(out, expected)


def test_operator_counts_every_key_as_visited(provider):
    registry.reset_telemetry()
    q, k, v = call((5, 300))
    torch.ops.lipass.attend_pieces(q, k, v, 0.25, "blocks.0")
    counts = registry.telemetry()["blocks.0"]
    assert (counts.provider, counts.density, counts.dense_calls) == (provider, 1.0, 1)


@pytest.mark.parametrize("at", [1, 2], ids=["keys", "values"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part[:, :1], "expand grouped or shared heads first"),
        (lambda part: part[:1], "expand grouped or shared heads first"),
        (lambda part: part[..., :8], "expand grouped or shared heads first"),
        (lambda part: part[:, :, :7], "pass the values of these keys"),
    ],
    ids=["one head", "another batch", "another head dim", "fewer tokens"],
)
def test_pieces_that_do_not_fit_are_refused(provider, at, change, message):
    arguments = call((5, 300))
    arguments[at][1] = change(arguments[at][1])
    with pytest.raises(ValueError, match=message):
        torch.ops.lipass.attend_pieces(*arguments, 0.25, "site")


def test_operator_passes_opcheck():
    q, k, v = call((5, 30))
    torch.library.opcheck(torch.ops.lipass.attend_pieces.default, (q, k, v, 0.25, "x"))


@pytest.mark.skipif(bool(NO_NATIVE), reason=str(NO_NATIVE))
def test_joining_is_predicted_from_the_rates_of_the_machine(monkeypatch):
    sizes = (1, 3, 256, 64), torch.float32, torch.device("cpu"), (32, 1280, 256)
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: FAST_APART)
    assert pieces.why_joined(*sizes) is None
    monkeypatch.setattr(calibration, "cpu_rates", lambda dtype, dim, threads: FAST_JOINED)
    assert "joined" in pieces.why_joined(*sizes)
