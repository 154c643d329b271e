"""Two arrays compared: channels, sizes, borders, tolerance, thresholds and cards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from blemish.alignment import Alignment
from blemish.calibration import Calibration, Promise
from blemish.difference.compare import STEPS, Comparison
from blemish.difference.filters import Filters
from blemish.difference.map_filters import MapFilters
from blemish.difference.thresholds import MapThreshold
from blemish.errors import ImageError
from blemish.mask_rules import MaskRule
from blemish.models.reference import ReferencePair
from blemish.noise import noise_level
from blemish.postprocess import Cleaning
from blemish.residuals import L1, L2
from blemish.scores.engine import TorchScorer
from blemish.scores.gradient import InputGradientScore
from blemish.scores.residual import ResidualScore
from blemish.tiling import Tiling

UNLIKELY = 1e-4  # that a test fails by chance, were its seed not fixed
STILL = Alignment(motion="none", illumination="none")


def comparison(tolerance=0, alignment=STILL, score=None, **settings):
    scorer = TorchScorer(ReferencePair(tolerance), score or ResidualScore(L1()), torch.device("cpu"))
    return Comparison(scorer, tolerance, alignment=alignment, **settings)


def fixed(value, **settings):
    return comparison(threshold=MapThreshold("fixed", value=value), **settings)


def picture(seed=0, size=(80, 96), channels=1):
    blobs = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(*size, channels)), (3, 3, 0))
    return (0.3 + 0.4 * (blobs > 0)).astype(np.float32)


# --- what is compared ---------------------------------------------------------------------------------------------


def test_the_map_is_the_difference_and_the_mask_what_exceeds_the_threshold():
    reference = picture()
    query = reference.copy()
    query[20:26, 30:40] += 0.2
    query[60, 70] += 0.1
    found = fixed(0.15)(reference, query)
    np.testing.assert_allclose(found.score_map, np.abs(query - reference)[..., 0], atol=1e-6)
    assert found.mask.sum() == 60 and found.mask[20:26, 30:40].all()
    (region,) = found.regions
    assert (region.left, region.top, region.width, region.height, region.area) == (30, 20, 10, 6, 60)
    assert found.is_different and found.share == 60 / (80 * 96)
    assert found.image_score == found.score_map.max() and found.p_value is None and found.valid.all()
    np.testing.assert_array_equal(found.observed, query)
    np.testing.assert_array_equal(found.expected, reference)


def test_equal_images_are_the_same():
    found = comparison()(picture(), picture())
    assert not found.is_different and not found.mask.any() and found.regions == [] and found.image_score == 0


def test_the_seconds_of_every_step_are_told():
    found = comparison()(picture(), picture())
    assert tuple(found.seconds) == STEPS and all(seconds >= 0 for seconds in found.seconds.values())


@pytest.mark.parametrize("which", [0, 1])
def test_a_grey_picture_saved_in_colour_is_grey(which):
    pair = [picture(0), picture(1)]
    grey = comparison()(*pair)
    pair[which] = np.repeat(pair[which], 3, axis=2)
    found = comparison()(*pair)
    assert found.observed.shape[2] == found.expected.shape[2] == 1
    np.testing.assert_allclose(found.score_map, grey.score_map, atol=1e-6)
    both = comparison()(*(np.repeat(image[..., :1], 3, axis=2) for image in pair))
    assert both.observed.shape[2] == 1


@pytest.mark.parametrize(("channels", "expected"), [(None, 3), (1, 1), (3, 3)])
def test_colours_are_compared_unless_channels_says_otherwise(channels, expected):
    reference = picture(channels=3)
    query = reference.copy()
    query[10:20, 10:20] += [0.2, -0.2, 0.0]
    found = comparison(channels=channels)(reference, query)
    assert found.observed.shape == (80, 96, expected)
    change = found.score_map[10:20, 10:20].mean()
    assert change == pytest.approx(0.4 / 3, abs=1e-6) if expected == 3 else change < 0.09


def test_a_grey_reference_makes_a_colour_query_grey():
    found = comparison()(picture(), picture(channels=3))
    assert found.observed.shape[2] == found.expected.shape[2] == 1
    assert comparison(channels=3)(picture(), picture(channels=3)).expected.shape[2] == 3


def test_depths_mix():
    reference = (picture() * 255).round().astype(np.uint8)
    deep = reference.astype(np.uint16) * 257
    assert comparison()(reference, deep).score_map.max() < 1e-6


def test_tiles_make_the_same_map_as_one_tile():
    pair = picture(0, (150, 170)), picture(1, (150, 170))
    whole, tiled = (comparison(tiling=Tiling(size, 0.25, 2))(*pair).score_map for size in (1024, 64))
    np.testing.assert_allclose(whole, tiled, atol=1e-6)


def test_images_smaller_than_a_tile_keep_their_size():
    found = comparison()(picture(size=(9, 30)), picture(1, (9, 30)))
    assert found.score_map.shape == found.mask.shape == (9, 30)


# --- sizes and borders --------------------------------------------------------------------------------------------


def test_another_size_without_a_motion_is_refused():
    with pytest.raises(ImageError, match=r"^The reference is of 96 x 80 pixels, the query of 90 x 70, and no motion"):
        comparison()(picture(), picture(size=(70, 90)))


def test_a_part_is_found_in_a_larger_reference():
    reference = picture()
    query = reference[4:76, 6:90].copy()
    query[30:38, 40:48] = 1
    found = fixed(0.2, alignment=Alignment(motion="translation"))(reference, query)
    assert found.score_map.shape == (72, 84) and found.valid.all()
    (region,) = found.regions
    assert abs(region.left - 40) <= 1 and abs(region.top - 30) <= 1 and abs(region.area - 64) <= 20


def test_nothing_differs_where_the_reference_ends():
    """Neither where it ends, nor beside it: filters of image and map see no edge there."""
    whole = picture(size=(90, 104))
    reference, query = whole[:80, :96], whole[5:85, 8:].copy()
    filters, map_filters = Filters(["low_pass"], sigma=2.0), MapFilters(["gaussian"])
    found = fixed(0.05, alignment=Alignment("translation"), filters=filters, map_filters=map_filters)(reference, query)
    np.testing.assert_allclose(found.motion.matrix[:2, 2], (8, 5), atol=0.1)
    assert not found.valid[-5:].any() and not found.valid[:, -8:].any() and found.valid[:74, :87].all()
    assert (found.score_map[~found.valid] == 0).all() and not found.is_different
    query[40:50, 40:50] = 1
    different = fixed(0.05, alignment=Alignment("translation"))(reference, query)
    assert different.share == different.mask.sum() / different.valid.sum() > different.mask.mean()


# --- tolerance ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_an_edge_may_be_off_by_the_tolerance_and_no_more(tolerance):
    reference = np.full((70, 70, 1), 0.2, np.float32)
    reference[:, 30:] = 0.8
    for off in range(4):
        query = np.where(np.arange(70)[None, :, None] >= 30 + off, reference.max(), reference.min())
        found = fixed(0.3, tolerance=tolerance)(reference, np.broadcast_to(query, reference.shape))
        assert found.mask.any() == (off > tolerance)


def test_the_tolerance_is_no_tolerance_of_values():
    reference = picture()
    query = np.where(reference > 0.5, reference + 0.1, reference - 0.1)
    found = fixed(0.05, tolerance=2)(reference, query)
    np.testing.assert_allclose(found.score_map, 0.1, atol=1e-6)


def test_the_difference_is_to_the_nearest_value_around():
    rng = np.random.default_rng(0)
    reference, query = rng.random((2, 66, 66, 1)).astype(np.float32)
    found = comparison(tolerance=1)(reference, query).score_map
    high, low = (
        each(reference[..., 0], 3, mode="nearest") for each in (ndimage.maximum_filter, ndimage.minimum_filter)
    )
    expected = np.maximum(query[..., 0] - high, 0) + np.maximum(low - query[..., 0], 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_where_an_edge_may_lie_beyond_the_reference_nothing_is_compared():
    whole = picture(size=(90, 104))
    reference, query = whole[:80, :96], whole[5:85, 8:]
    moved = Alignment("translation", illumination="none")
    exact, tolerant = (fixed(0.2, tolerance=tolerance, alignment=moved)(reference, query) for tolerance in (0, 2))
    assert not exact.valid.all() and tolerant.valid[0, 0]
    expected = ndimage.binary_erosion(exact.valid, np.ones((5, 5)), border_value=1)
    np.testing.assert_array_equal(tolerant.valid, expected)


@pytest.mark.parametrize("tolerance", [0, 2])
def test_what_is_expected_takes_no_part_in_the_gradient(tolerance):
    tile = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    tile[:, 2] = 1
    tile.requires_grad_()
    output = ReferencePair(tolerance)(tile)
    assert not output.expected.requires_grad and not output.valid.requires_grad
    (output.observed - output.expected).square().sum().backward()
    own = 2 * (output.observed - output.expected).detach()
    torch.testing.assert_close(tile.grad[:, :1], own)
    assert (tile.grad[:, 1:] == 0).all()


def test_the_gradient_of_l2_is_twice_the_difference():
    """So with a tolerance, too: were what is expected not held fixed, the gradient would vanish within its bounds."""
    reference, query = picture(0), picture(1)
    score = InputGradientScore(L2(), times_residual=False)
    gradient = comparison(2, score=score)(reference, query).score_map
    difference = comparison(2)(reference, query).score_map
    assert difference.max() > 0.3
    np.testing.assert_allclose(gradient, 2 * difference, atol=1e-5)


# --- what counts as different -------------------------------------------------------------------------------------


def noise_bounds(confidence, pixels):
    """Smallest and largest count of pixels above a threshold whose sigma is the pixels' median: see the thresholds."""
    places = stats.beta.ppf([UNLIKELY / 4, 1 - UNLIKELY / 4], pixels / 2, pixels / 2 + 1)
    low, high = stats.halfnorm.ppf(places) / noise_level(0.5) * noise_level(1 - confidence)
    fewest = stats.binom.ppf(UNLIKELY / 4, pixels, stats.halfnorm.sf(high))
    return fewest, stats.binom.isf(UNLIKELY / 4, pixels, stats.halfnorm.sf(low))


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99, 0.999])
@pytest.mark.parametrize("illumination", ["none", "global"])
def test_noise_is_flagged_as_often_as_promised(confidence, illumination):
    rng = np.random.default_rng(5)
    reference, query = (0.5 + rng.normal(0, 10 / 255, (2, 300, 320, 1))).astype(np.float32)
    threshold = MapThreshold("noise", confidence=confidence, least=0)
    found = comparison(alignment=Alignment("none", illumination=illumination), threshold=threshold)(reference, query)
    fewest, most = noise_bounds(confidence, found.mask.size)
    assert fewest <= found.mask.sum() <= most
    assert most - fewest < 1.3 * (1 - confidence) * found.mask.size


def test_a_single_pixel_of_six_sigma_is_found_in_noise():
    rng = np.random.default_rng(6)
    reference, query = (0.5 + rng.normal(0, 5 / 255, (2, 200, 200, 1))).astype(np.float32)
    places = rng.choice(query.size, 100, replace=False)
    query.flat[places] = reference.flat[places] + np.float32(6 * np.sqrt(2) * 5 / 255)
    threshold = MapThreshold("noise", confidence=0.999, least=0)
    assert comparison(threshold=threshold)(reference, query).mask.flat[places].all()


@pytest.mark.parametrize(("visible", "shown"), [(0.0, True), (0.1, True), (0.2, False)])
def test_less_than_a_share_of_the_contrast_is_not_visible(visible, shown):
    reference = picture()  # of contrast 0.4
    query = reference.copy()
    query[20:30, 20:30] += 0.05
    found = comparison(threshold=MapThreshold("noise", visible=visible))(reference, query)
    assert found.threshold == pytest.approx(max(1.5 / 255, visible * 0.4))
    assert found.is_different == shown


def test_a_sparse_pattern_has_its_contrast():
    reference = np.full((200, 200, 1), 0.9, np.float32)
    reference[40:160:20, 50:60] = 0.1  # 0.15 % of the pixels
    query = reference.copy()
    query[100, 120:130] = 0.85
    found = comparison(threshold=MapThreshold("noise", visible=0.1))(reference, query)
    assert found.threshold == pytest.approx(0.08) and not found.is_different


def test_small_regions_are_no_difference():
    reference = picture()
    query = reference.copy()
    query[10:13, 10:13] += 0.3
    assert fixed(0.1, cleaning=Cleaning(9))(reference, query).is_different
    assert not fixed(0.1, cleaning=Cleaning(10))(reference, query).is_different


def test_a_card_decides_instead_of_the_threshold():
    scores = [0.01 * number for number in range(1, 21)]
    card = Calibration.fit(scores, [str(number) for number in range(20)], Promise(0.1), "any")
    reference = picture()
    query = reference.copy()
    query[10:14, 10:14] += 0.195
    found = replace(fixed(0.9), card=card)(reference, query)
    assert found.threshold == card.threshold == 0.19 and found.is_different and found.mask.sum() == 16
    assert found.p_value == card.p_value(found.image_score) == pytest.approx(2 / 21)
    assert found.regions[0].p_value == found.p_value
    assert not replace(fixed(0.01), card=card)(reference, np.clip(query - 0.05, 0, 1)).is_different


def test_a_cards_mask_rule_scores_the_image():
    rule = MaskRule("region", region_area=16)
    card = Calibration.fit([0.1] * 20, [str(number) for number in range(20)], Promise(0.1), "any", rule)
    reference = picture()
    query = reference.copy()
    query[10:13, 10:15] += 0.3  # 15 pixels
    found = replace(comparison(), card=card)(reference, query)
    assert not found.is_different and not found.mask.any() and found.image_score < 0.1
    query[13, 10] += 0.3
    found = replace(comparison(), card=card)(reference, query)
    assert found.is_different and found.mask.sum() == 16 and found.image_score == pytest.approx(0.3)
