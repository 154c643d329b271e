"""Residuals against independent implementations, and the promises every one of them makes."""

import cv2
import numpy as np
import piq
import pytest
import torch
from piq.functional import similarity_map
from scipy import ndimage
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
from torchmetrics.functional.image import structural_similarity_index_measure as torchmetrics_ssim

from blemish.errors import ConfigError
from blemish.residuals import L1, L2, PSNR, SSIM, GradientMagnitude, MultiScaleSSIM, WeightedSum

PUBLISHED_WEIGHTS = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], dtype=torch.float64)
# A float32 mean of squares is off by about 1e-7, which SSIM divides by its constant of 9e-4.
SSIM_ROUNDING = 1e-4
EVERY = {
    "l1": L1,
    "l2": L2,
    "psnr": PSNR,
    "ssim": SSIM,
    "ms_ssim": lambda: MultiScaleSSIM(3),
    "gradient": GradientMagnitude,
    "sum": lambda: WeightedSum([L1(), SSIM(), GradientMagnitude(2)], [0.5, 1.0, 2.0]),
}
every_residual = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())


def textures(shape, seed=0, noise=0.1):
    """A smooth random picture and a noisy copy, both in [0, 1]."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random(shape), (0, 0, 2, 2), mode="wrap")
    smooth = (smooth - smooth.min()) / (smooth.max() - smooth.min())
    noisy = np.clip(smooth + noise * rng.standard_normal(shape), 0, 1)
    return torch.from_numpy(smooth).float(), torch.from_numpy(noisy).float()


@every_residual
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_one_map_per_image_at_its_size(make, channels, size):
    x, y = textures((2, channels, *size))
    assert make()(x, y).shape == (2, 1, *size)


@every_residual
@pytest.mark.parametrize("channels", [1, 3])
def test_exactly_zero_where_equal(make, channels):
    x, _ = textures((2, channels, 32, 48))
    assert (make()(x, x.clone()) == 0).all()


@every_residual
@pytest.mark.parametrize("channels", [1, 3])
def test_zero_up_to_rounding_where_equal_at_odd_sizes(make, channels):
    x, _ = textures((2, channels, 33, 47))
    assert make()(x, x.clone()).abs().max() <= 1e-6


@every_residual
def test_never_negative_even_outside_the_unit_range(make):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(4, 3, 32, 32, generator=generator) * 2 - 0.5 for _ in range(2))
    assert make()(x, y).min() >= 0


@every_residual
def test_sees_a_difference_where_it_is(make):
    x = torch.full((1, 1, 96, 96), 0.5)
    y = x.clone()
    y[..., 40:56, 40:56] += 0.3 * ((torch.arange(16)[:, None] + torch.arange(16)) % 2)
    difference = make()(x, y)
    assert difference[..., 40:56, 40:56].mean() > 0.01
    assert difference[..., :8, :8].abs().max() == 0


@every_residual
def test_autocast_changes_nothing(make):
    x, y = textures((2, 3, 32, 32))
    residual = make()
    plain = residual(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = residual(x, y)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


@every_residual
def test_reduced_precision_inputs_give_float32(make):
    x, y = (image.bfloat16() for image in textures((1, 1, 32, 32)))
    residual = make()
    result = residual(x, y)
    assert result.dtype == torch.float32
    assert torch.equal(result, residual(x.float(), y.float()))


@every_residual
@pytest.mark.parametrize(("observed", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7), (0.0, 1.0)])
def test_gradient_finite_on_flat_images(make, observed, expected):
    y = torch.full((1, 3, 32, 32), expected, requires_grad=True)
    make()(torch.full((1, 3, 32, 32), observed), y).mean().backward()
    assert torch.isfinite(y.grad).all()


@every_residual
def test_gradient_finite_where_equal(make):
    x, _ = textures((1, 1, 32, 32))
    y = x.clone().requires_grad_()
    make()(x, y).mean().backward()
    assert torch.isfinite(y.grad).all()


@pytest.mark.parametrize(
    "residual",
    [L1(), L2(), PSNR(), SSIM(), MultiScaleSSIM(2), GradientMagnitude(2)],
    ids=["l1", "l2", "psnr", "ssim", "ms_ssim", "gradient"],
)
def test_gradient_is_the_slope(residual):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 2, 12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(residual.distance, (x, y.requires_grad_()), fast_mode=True)


@every_residual
def test_no_state_to_save_and_none_to_train(make):
    residual = make()
    assert not residual.state_dict()
    assert not list(residual.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_l1_and_l2_against_numpy(channels):
    x, y = textures((2, channels, 9, 7))
    difference = x.double().numpy() - y.double().numpy()
    np.testing.assert_allclose(L1()(x, y)[:, 0], np.abs(difference).mean(axis=1), atol=1e-7)
    np.testing.assert_allclose(L2()(x, y)[:, 0], (difference**2).mean(axis=1), atol=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("error", [0.002, 0.05, 0.5, 1.0])
def test_psnr_against_skimage_where_the_error_is_constant(channels, error):
    x = torch.zeros(1, channels, 16, 20)
    decibels = peak_signal_noise_ratio(x.double().numpy(), x.double().numpy() + error, data_range=1)
    assert PSNR()(x, x + error).numpy() == pytest.approx(1 - decibels / 60, abs=1e-5)
    assert PSNR(cap=80)(x, x + error).numpy() == pytest.approx(1 - decibels / 80, abs=1e-5)


def test_psnr_against_scipy_up_to_the_border():
    x, y = textures((1, 1, 31, 44))
    error = ndimage.gaussian_filter((x - y)[0, 0].double().numpy() ** 2, 1.5, truncate=3.5, mode="mirror")
    np.testing.assert_allclose(PSNR()(x, y)[0, 0], 1 + 10 * np.log10(error) / 60, atol=1e-5)


def test_psnr_is_zero_up_to_its_cap():
    x = torch.zeros(1, 1, 16, 16)
    assert (PSNR(cap=40)(x, x + 0.0099) == 0).all()
    assert (PSNR(cap=40)(x, x + 0.0101) > 0).all()


@pytest.mark.parametrize("cap", [0, -60.0, float("nan")])
def test_psnr_refuses_a_cap_that_is_none(cap):
    with pytest.raises(ConfigError, match=r"residual\.cap > 0, in decibels, found"):
        PSNR(cap)


@pytest.mark.parametrize("size", [(64, 64), (40, 57)])
def test_ssim_against_skimage_in_the_interior(size):
    x, y = textures((1, 1, *size))
    _, full = structural_similarity(
        x[0, 0].double().numpy(),
        y[0, 0].double().numpy(),
        full=True,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
    )
    inside = np.s_[5:-5, 5:-5]
    np.testing.assert_allclose(1 - 2 * SSIM()(x, y)[0, 0].numpy()[inside], full[inside], atol=SSIM_ROUNDING)


def test_ssim_against_skimage_with_colour():
    x, y = textures((1, 3, 48, 48))
    _, full = structural_similarity(
        x[0].double().numpy(),
        y[0].double().numpy(),
        full=True,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=1,
        channel_axis=0,
    )
    inside = np.s_[5:-5, 5:-5]
    np.testing.assert_allclose(
        1 - 2 * SSIM()(x, y)[0, 0].numpy()[inside], full.mean(axis=0)[inside], atol=SSIM_ROUNDING
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_map_against_torchmetrics_up_to_the_border(channels):
    x, y = textures((3, channels, 48, 56))
    _, full = torchmetrics_ssim(x.double(), y.double(), data_range=1.0, reduction="none", return_full_image=True)
    theirs = (1 - full.mean(dim=1, keepdim=True)) / 2
    torch.testing.assert_close(SSIM()(x, y).double(), theirs, atol=SSIM_ROUNDING, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_interior_mean_of_ssim_against_piq(channels):
    x, y = textures((3, channels, 48, 56))
    own = 1 - 2 * SSIM()(x, y)[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))
    torch.testing.assert_close(own, piq.ssim(x, y, downsample=False, reduction="none"), atol=1e-5, rtol=0)


def moments_of(x, y):
    """Luminance and structure terms of a (H, W) pair in float64, borders mirrored."""

    def blur(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5, mode="mirror")

    mean_x, mean_y = blur(x), blur(y)
    luminance = (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
    covariance = blur(x * y) - mean_x * mean_y
    variances = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
    return luminance, (2 * covariance + 0.03**2) / (variances + 0.03**2)


def test_ssim_against_scipy_up_to_the_border():
    x, y = textures((1, 1, 31, 44))
    luminance, structure = moments_of(x[0, 0].double().numpy(), y[0, 0].double().numpy())
    np.testing.assert_allclose(SSIM()(x, y)[0, 0], (1 - luminance * structure) / 2, atol=SSIM_ROUNDING)


def means_of_parts(x, y, inside):
    """Mean structure of the first four scales and mean SSIM of the fifth, (B, C, 5), over `inside` of each map."""
    means = []
    for scale in range(5):
        luminance, structure = SSIM().parts(x, y)
        term = luminance * structure if scale == 4 else structure
        means.append(term[inside[scale]].mean(dim=(2, 3)))
        x, y = torch.nn.functional.avg_pool2d(x, 2), torch.nn.functional.avg_pool2d(y, 2)
    return torch.stack(means, dim=-1)


WHOLE, FITTING = np.s_[:], np.s_[..., 5:-5, 5:-5]  # where the window fits into the image


@pytest.mark.parametrize("channels", [1, 3])
def test_ms_ssim_parts_against_torchmetrics(channels):
    # torchmetrics takes structure where the window fits, SSIM everywhere, and joins channels before scales.
    x, y = textures((2, channels, 192, 176))
    means = means_of_parts(x, y, [FITTING] * 4 + [WHOLE]).mean(dim=1)
    theirs = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(means.pow(PUBLISHED_WEIGHTS.float()).prod(dim=-1), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_ms_ssim_parts_against_piq(channels):
    # piq takes all parts where the window fits, and joins scales before channels.
    x, y = textures((2, channels, 192, 176))
    own = means_of_parts(x, y, [FITTING] * 5).pow(PUBLISHED_WEIGHTS.float()).prod(dim=-1).mean(dim=1)
    torch.testing.assert_close(own, piq.multi_scale_ssim(x, y, reduction="none"), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_ms_ssim_against_float64_reference(scales):
    x, y = textures((1, 1, 96, 112), noise=0.2)
    a, b = (image[0, 0].double().numpy() for image in (x, y))
    weights = PUBLISHED_WEIGHTS.numpy()[:scales] / PUBLISHED_WEIGHTS.numpy()[:scales].sum()
    similarity = np.ones((96, 112))
    for scale, weight in enumerate(weights):
        luminance, structure = moments_of(a, b)
        term = luminance * structure if scale == scales - 1 else structure
        similarity *= cv2.resize(np.maximum(term, 1e-6) ** weight, (112, 96), interpolation=cv2.INTER_LINEAR)
        if scale < scales - 1:
            a, b = (image.reshape(len(image) // 2, 2, -1, 2).mean(axis=(1, 3)) for image in (a, b))
    # Powers below 1 are steep near the floor, so errors of float32 grow there.
    np.testing.assert_allclose(MultiScaleSSIM(scales)(x, y)[0, 0], 1 - similarity, atol=2e-4)


@pytest.mark.parametrize("scales", [1, 2, 3, 4, 5])
def test_ms_ssim_weights_are_the_published_proportions(scales):
    weights = torch.tensor(MultiScaleSSIM(scales).weights, dtype=torch.float64)
    assert weights.sum().item() == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], PUBLISHED_WEIGHTS[:scales] / PUBLISHED_WEIGHTS[0])


def test_gradient_similarity_deviation_against_piq():
    # A black frame makes piq's zero padding agree with replicated borders.
    x, y = (torch.nn.functional.pad(image, (8, 8, 8, 8)) for image in textures((1, 1, 48, 56)))
    a, b = (torch.nn.functional.avg_pool2d(image, 2) for image in (x, y))
    own = GradientMagnitude().similarity(a, b)
    assert own.std(unbiased=False).item() == pytest.approx(piq.gmsd(x, y).item(), abs=1e-6)


def test_gradient_similarity_map_against_scipy():
    x, y = textures((1, 1, 33, 40))

    def magnitude(image):
        image = image[0, 0].double().numpy()
        return np.hypot(*(ndimage.prewitt(image, axis, mode="nearest") / 3 for axis in (0, 1)))

    expected = similarity_map(torch.from_numpy(magnitude(x)), torch.from_numpy(magnitude(y)), 170 / 255**2)
    torch.testing.assert_close(GradientMagnitude().similarity(x, y)[0, 0].double(), expected, atol=2e-5, rtol=0)


def test_gradient_of_one_scale_is_the_similarity_map():
    x, y = textures((2, 3, 24, 24))
    residual = GradientMagnitude(scales=1)
    maps = [1 - residual.similarity(x[:, [channel]], y[:, [channel]]) for channel in range(3)]
    torch.testing.assert_close(residual(x, y), sum(maps) / 3, atol=1e-6, rtol=0)


def test_gradient_sees_a_hue_of_the_same_brightness():
    x, _ = textures((1, 3, 32, 32))
    y = x.clone()
    y[..., 8:24, 8:24] += torch.tensor([0.3, -0.3, 0.0])[:, None, None]
    torch.testing.assert_close(x.mean(dim=1), y.mean(dim=1))
    assert GradientMagnitude()(x, y)[..., 7:25, 7:25].mean() > 0.02


def test_gradient_averages_its_scales():
    x, y = textures((1, 1, 32, 32))
    residual = GradientMagnitude(scales=2)
    half = residual.similarity(*(torch.nn.functional.avg_pool2d(image, 2) for image in (x, y)))
    coarse = cv2.resize((1 - half)[0, 0].numpy(), (32, 32), interpolation=cv2.INTER_LINEAR)
    expected = ((1 - residual.similarity(x, y))[0, 0].numpy() + coarse) / 2
    np.testing.assert_allclose(residual(x, y)[0, 0], expected, atol=1e-6)


def test_gradient_ignores_a_shift_of_brightness():
    x, _ = textures((1, 1, 32, 32))
    assert GradientMagnitude()(x * 0.5, x * 0.5 + 0.25).max() < 1e-4


def test_weighted_sum_is_the_sum_of_its_weighted_terms():
    x, y = textures((2, 3, 32, 32))
    terms = [L1(), SSIM(), GradientMagnitude()]
    expected = 0.5 * terms[0](x, y) + 2 * terms[1](x, y) + 0.25 * terms[2](x, y)
    torch.testing.assert_close(WeightedSum(terms, [0.5, 2.0, 0.25])(x, y), expected)
    torch.testing.assert_close(WeightedSum(terms)(x, y), sum(term(x, y) for term in terms))


@pytest.mark.parametrize(
    ("terms", "weights"),
    [([], None), ([], []), ([L1()], [1.0, 1.0]), ([L1(), L2()], [1.0]), ([L1(), L2()], [1.0, -0.1])],
)
def test_weighted_sum_refuses_weights_that_do_not_fit(terms, weights):
    with pytest.raises(ConfigError, match="one weight >= 0 per residual"):
        WeightedSum(terms, weights)


@pytest.mark.parametrize(
    ("residual", "smallest"),
    [
        (PSNR(), 6),
        (SSIM(), 6),
        (MultiScaleSSIM(1), 6),
        (MultiScaleSSIM(4), 48),
        (GradientMagnitude(1), 2),
        (GradientMagnitude(3), 8),
    ],
)
def test_smallest_tile_fits_and_a_smaller_one_is_refused(residual, smallest):
    fits = torch.zeros(1, 1, smallest, smallest)
    assert residual(fits, fits).shape == fits.shape
    for height, width in ((smallest - 1, 64), (64, smallest - 1)):
        tile = torch.zeros(1, 1, height, width)
        with pytest.raises(ConfigError, match="use larger tiles or fewer scales"):
            residual(tile, tile)


@pytest.mark.parametrize("scales", [0, 6, -1])
def test_ms_ssim_refuses_scales_without_a_weight(scales):
    with pytest.raises(ConfigError, match=f"found {scales}"):
        MultiScaleSSIM(scales)


@pytest.mark.parametrize("scales", [0, -2])
def test_gradient_refuses_no_scale(scales):
    with pytest.raises(ConfigError, match=f"found {scales}"):
        GradientMagnitude(scales)
