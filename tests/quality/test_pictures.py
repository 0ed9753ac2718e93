"""PSNR and SSIM are those of everybody else; what cannot be compared is refused."""

import pytest
import torch

from lipass.quality import affected, latent_error, psnr_db, psnr_each_db, ssim, ssim_each


def as_scikit_image_has_it(name, x, y, **options):
    metrics = pytest.importorskip("skimage.metrics")
    return getattr(metrics, name)(x.numpy(), y.numpy(), data_range=1.0, **options)


@pytest.mark.parametrize("size", [(11, 11), (48, 48), (37, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ssim_agrees_with_scikit_image(size, dtype):
    x = torch.rand(2, 3, *size, dtype=dtype)
    y = (x + 0.2 * torch.randn_like(x)).clamp(0, 1)
    found = ssim_each(x, y)
    for one, a, b in zip(found.tolist(), x.double(), y.double(), strict=True):
        expected = as_scikit_image_has_it(
            "structural_similarity", a, b, channel_axis=0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert abs(one - expected) < 1e-6


def test_psnr_agrees_with_scikit_image():
    x, y = torch.rand(2, 4, 3, 20, 30)
    expected = as_scikit_image_has_it("peak_signal_noise_ratio", x.double(), y.double())
    assert abs(psnr_db(x, y) - expected) < 1e-6
    each = [
        as_scikit_image_has_it("peak_signal_noise_ratio", a, b)
        for a, b in zip(x.double(), y.double(), strict=True)
    ]
    assert psnr_each_db(x, y).tolist() == pytest.approx(each, abs=1e-6)


def test_equal_pictures_are_100_db_and_1(pictures):
    x = pictures(2)
    assert psnr_db(x, x) == 100
    assert ssim(x, x) == pytest.approx(1, abs=1e-9)


def test_a_constant_offset_costs_its_square_and_little_structure(pictures):
    x = pictures() * 0.5 + 0.2
    assert psnr_db(x + 0.1, x) == pytest.approx(20, abs=1e-4)
    assert ssim(x + 0.1, x) > 0.9


def test_a_shift_by_a_pixel_costs_structure(pictures):
    x = pictures()
    assert ssim(x.roll(1, -1), x) < ssim(x + 0.05, x)


def test_many_pictures_are_the_mean_of_each(pictures):
    x, y = pictures(40), pictures(40, seed=1)
    assert ssim(x, y) == pytest.approx(float(ssim_each(x, y).mean()), abs=1e-12)


def test_affected_are_chunks_that_differ_at_all():
    x = torch.zeros(10, 3, 2, 2)
    y = x.clone()
    y[5, 0, 0, 0] = 1e-7
    assert affected(x, y, 4).tolist() == [False] * 4 + [True] * 4 + [False] * 2


def test_error_of_latents_is_relative():
    y = torch.randn(2, 16, 3)
    assert latent_error(1.5 * y, y) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="latents must have one shape, got"):
        latent_error(y, y[:1])
    with pytest.raises(ValueError, match="not all zero"):
        latent_error(y, torch.zeros_like(y))


@pytest.mark.parametrize("figure", [psnr_db, ssim, psnr_each_db, ssim_each])
@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (lambda x: x[:1], ValueError, "must have one shape"),
        (lambda x: x[0], ValueError, r"must be pictures \[F, C, H, W\]"),
        (lambda x: x[:0], ValueError, "at least one"),
        (lambda x: x * float("nan"), ValueError, "must be finite"),
        (lambda x: x * 255, ValueError, "must lie in 0..1"),
        (lambda x: (x * 255).byte(), TypeError, "divide bytes by 255"),
        (lambda x: x.tolist(), TypeError, "got list"),
    ],
    ids=["frames", "rank", "none", "nan", "range", "bytes", "list"],
)
def test_what_cannot_be_compared_is_refused(figure, spoil, error, said, pictures):
    x = pictures(2)
    with pytest.raises(error, match=said):
        figure(x, spoil(x))


def test_pictures_smaller_than_a_window_have_no_ssim():
    x = torch.rand(1, 3, 10, 40)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(x, x)
