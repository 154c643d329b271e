"""Models with a latent distribution, a code book, a memory, or high frequencies only: each against plain arithmetic."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.distributions import Categorical, Normal, kl_divergence

from blemish.errors import ConfigError
from blemish.models.contracts import Gaussian, Latent
from blemish.models.hierarchical_vae import HierarchicalVariationalAutoencoder, product
from blemish.models.memory_ae import Memory, MemoryAutoencoder, shrink
from blemish.models.restore_hf import HighFrequencyRestorer
from blemish.models.vae import read_gaussian
from blemish.models.vqvae import CodeBook, VectorQuantisedAutoencoder

SMALL = {"width": 4, "depth": 2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def a_gaussian(*shape):
    return Gaussian(torch.randn(shape), torch.randn(shape))


def as_normal(gaussian):
    return Normal(gaussian.mean, (0.5 * gaussian.log_variance).exp())


# Latent distributions


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_kl_of_two_gaussians_against_torch_distributions(shape):
    posterior, prior = a_gaussian(*shape), a_gaussian(*shape)
    expected = kl_divergence(as_normal(posterior), as_normal(prior))
    torch.testing.assert_close(Latent(posterior, prior).kl(), expected)


def test_kl_without_a_prior_is_to_the_standard_normal():
    posterior = a_gaussian(4, 5)
    torch.testing.assert_close(Latent(posterior).kl(), kl_divergence(as_normal(posterior), Normal(0.0, 1.0)))
    standard = Gaussian(torch.zeros(4, 5), torch.zeros(4, 5))
    torch.testing.assert_close(Latent(posterior).kl(), Latent(posterior, standard).kl())


def test_a_posterior_that_is_its_prior_costs_nothing():
    gaussian = a_gaussian(4, 5)
    assert (Latent(gaussian, gaussian).kl() == 0).all()


def test_numbers_are_read_as_mean_and_bounded_log_variance():
    gaussian = read_gaussian(torch.tensor([[1.0, 2.0, 1e4, -1e4]]))
    assert gaussian.mean.tolist() == [[1.0, 2.0]]
    assert torch.isfinite(gaussian.log_variance.exp()).all()
    assert (gaussian.log_variance.exp() > 0).all()


def test_product_against_densities_on_a_line():
    line = torch.linspace(-30, 30, 60001, dtype=torch.float64)
    first = Gaussian(torch.tensor([1.0, -2.0, 0.0]).double(), torch.tensor([0.5, -1.0, 2.0]).double())
    second = Gaussian(torch.tensor([-1.0, 3.0, 4.0]).double(), torch.tensor([1.0, 0.3, -2.0]).double())
    result = product(first, second)
    for one, two, mean, log_variance in zip(zip(*first, strict=True), zip(*second, strict=True), *result, strict=True):
        density = (as_normal(Gaussian(*one)).log_prob(line) + as_normal(Gaussian(*two)).log_prob(line)).exp()
        density /= density.sum()
        by_hand = (density * line).sum()
        torch.testing.assert_close(mean, by_hand)
        torch.testing.assert_close(log_variance.exp(), (density * (line - by_hand).square()).sum())


def test_product_stays_finite_at_the_bounds():
    for first in (-12.0, 12.0):
        for second in (-12.0, 12.0):
            result = product(
                Gaussian(torch.ones(1), torch.tensor([first])), Gaussian(-torch.ones(1), torch.tensor([second]))
            )
            assert torch.isfinite(torch.cat(result)).all()
            by_hand = -math.log(math.exp(-first) + math.exp(-second))
            assert result.log_variance.item() == pytest.approx(by_hand, abs=1e-5)


def test_levels_lie_on_their_grids_and_only_the_fine_one_has_a_prior_of_its_own():
    model = HierarchicalVariationalAutoencoder(width=4, depth=3, latent_dim=6, fine_dim=5).eval()
    coarse, fine = model(torch.rand(2, 1, 32, 48)).latents
    assert coarse.posterior.mean.shape == (2, 6, 4, 6)
    assert coarse.prior is None
    assert fine.posterior.mean.shape == (2, 5, 8, 12)
    assert fine.prior.mean.shape == (2, 5, 8, 12)


def test_the_prior_of_the_fine_code_follows_from_the_coarse_code_alone():
    model = HierarchicalVariationalAutoencoder(latent_dim=6, fine_dim=5, **SMALL)
    x = torch.rand(2, 1, 16, 16)
    first, again = model(x).latents[1].prior, model(x).latents[1].prior
    assert not torch.equal(first.mean, again.mean)  # drawn anew
    output = model.eval()(x)
    state = model.down(model.from_coarse(output.latents[0].posterior.mean))
    torch.testing.assert_close(output.latents[1].prior, read_gaussian(model.fine_prior(state)))


def test_in_evaluation_the_means_are_decoded():
    model = HierarchicalVariationalAutoencoder(latent_dim=6, fine_dim=5, **SMALL).eval()
    output = model(torch.rand(2, 1, 16, 16))
    coarse, fine = (latent.posterior.mean for latent in output.latents)
    state = model.down(model.from_coarse(coarse))
    torch.testing.assert_close(output.expected, model.decoder(state + model.from_fine(fine)))


def test_the_fine_posterior_is_surer_than_its_prior():
    latent = HierarchicalVariationalAutoencoder(latent_dim=6, fine_dim=5, **SMALL)(torch.rand(2, 1, 16, 16)).latents[1]
    assert (latent.posterior.log_variance < latent.prior.log_variance).all()


def test_two_levels_need_two_halvings():
    with pytest.raises(ConfigError, match=r"model\.depth of at least 2, one for each level of codes, found 1"):
        HierarchicalVariationalAutoencoder(depth=1)


# Code book


def filled_book(codes=7, dimensions=3, decay=0.9):
    book = CodeBook(codes, dimensions, decay)
    book.usage.fill_(1 / codes)
    return book


def test_nearest_entry_by_brute_force():
    book = CodeBook(11, 3).eval()
    code = torch.randn(2, 3, 4, 5)
    found = book(code)
    for b in range(2):
        for row in range(4):
            for column in range(5):
                distances = [float((code[b, :, row, column] - entry).square().sum()) for entry in book.entries]
                assert torch.equal(found[b, :, row, column], book.entries[int(np.argmin(distances))])


def test_entries_follow_the_moving_averages_by_hand():
    book = filled_book()
    entries, usage = book.entries.double().numpy().copy(), book.usage.double().numpy().copy()
    for _ in range(3):
        code = torch.randn(2, 3, 4, 4)
        flat = code.permute(0, 2, 3, 1).reshape(-1, 3).double().numpy()
        choice = ((flat[:, None] - entries[None]) ** 2).sum(axis=2).argmin(axis=1)
        sums = entries * usage[:, None]
        for k in range(7):
            usage[k] = 0.9 * usage[k] + 0.1 * (choice == k).sum() / len(flat)
            sums[k] = 0.9 * sums[k] + 0.1 * flat[choice == k].sum(axis=0) / len(flat)
        entries = sums / usage[:, None]
        book.train()(code)
        np.testing.assert_allclose(book.usage.numpy(), usage, rtol=1e-5)
        np.testing.assert_allclose(book.entries.numpy(), entries, rtol=1e-4, atol=1e-6)


def test_the_code_book_is_state_and_no_parameter():
    model = VectorQuantisedAutoencoder(latent_dim=4, codes=8, **SMALL)
    assert {"code_book.entries", "code_book.usage"} <= model.state_dict().keys()
    assert not list(model.code_book.parameters())


def test_evaluation_moves_no_entry():
    book = CodeBook(7, 3).eval()
    before = book.entries.clone()
    book(torch.randn(2, 3, 4, 4))
    assert torch.equal(book.entries, before)
    assert (book.usage == 0).all()


def test_the_first_batch_fills_the_book():
    book = CodeBook(7, 3)
    code = 100 + torch.randn(2, 3, 4, 4)
    assert (book.train()(code) - code).abs().max() < 10
    assert (book.entries > 90).all()
    assert (book.usage > 0).all()


def test_dead_entries_restart_on_codes_of_the_batch_and_the_living_stay():
    book = filled_book(codes=5, decay=0.999999)
    book.usage[[1, 3]] = book.dead_below / 5 * 0.5
    before = book.entries.clone()
    code = 50 + torch.randn(1, 3, 4, 4)
    book.train()(code)
    flat = code.permute(0, 2, 3, 1).reshape(-1, 3)
    for restarted in (1, 3):
        assert (book.entries[restarted] - flat).abs().amax(dim=1).min() < 0.01
    torch.testing.assert_close(book.entries[[0, 2, 4]], before[[0, 2, 4]])


def test_an_entry_that_is_never_chosen_dies_in_time():
    book = CodeBook(2, 2, decay=0.9)
    book.entries.copy_(torch.tensor([[0.0, 0.0], [90.0, 90.0]]))
    book.usage.fill_(0.5)
    for _ in range(60):
        book.train()(torch.randn(1, 2, 4, 4))
    assert book.entries.abs().max() < 5


def test_every_cluster_gets_an_entry():
    centres = torch.tensor([[x, y] for x in (-9.0, -3.0, 3.0, 9.0) for y in (-9.0, -3.0, 3.0, 9.0)])
    book = CodeBook(24, 2, decay=0.9)
    for _ in range(200):
        flat = centres[torch.randint(16, (64,))] + 0.3 * torch.randn(64, 2)
        book.train()(flat.T.reshape(1, 2, 8, 8))
    assert torch.cdist(centres, book.entries).amin(dim=1).max() < 0.6


@pytest.mark.parametrize("commitment", [0.0, 0.25])
def test_gradient_passes_straight_through_and_commits(commitment):
    model = VectorQuantisedAutoencoder(latent_dim=4, codes=8, commitment=commitment, **SMALL)
    seen = {}
    model.into_code.register_forward_hook(lambda module, inputs, output: seen.update(code=output))
    model.from_code.register_forward_pre_hook(lambda module, inputs: seen.update(passed=inputs[0]))
    output = model.train()(torch.rand(2, 1, 16, 16))
    code, passed = seen["code"], seen["passed"]
    loss = output.expected.square().sum() + output.penalty
    code_gradient, passed_gradient = torch.autograd.grad(loss, [code, passed])
    nearest = passed.detach()
    torch.testing.assert_close(code_gradient, passed_gradient + commitment * 2 * (code - nearest) / code.numel())
    torch.testing.assert_close(output.penalty, commitment * (code - nearest).square().mean())


def test_the_decoder_sees_entries_only():
    model = VectorQuantisedAutoencoder(latent_dim=4, codes=8, **SMALL).eval()
    seen = {}
    model.from_code.register_forward_pre_hook(lambda module, inputs: seen.update(passed=inputs[0]))
    model(torch.rand(2, 1, 16, 16))
    passed = seen["passed"].permute(0, 2, 3, 1).reshape(-1, 4)
    torch.testing.assert_close(
        torch.cdist(passed, model.code_book.entries).amin(dim=1), torch.zeros(len(passed)), atol=1e-3, rtol=0
    )


# Memory


def test_shrinkage_against_the_formula_of_the_paper():
    weights = torch.randn(50, 10).mul(2).softmax(dim=-1)
    threshold = 0.1
    by_hand = (weights - threshold).relu() * weights / ((weights - threshold).abs() + 1e-12)
    by_hand = by_hand / by_hand.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(shrink(weights, threshold), by_hand)
    assert (by_hand == 0).any()


def test_the_largest_weight_stays_where_none_reaches_the_threshold():
    assert shrink(torch.tensor([0.3, 0.5, 0.2]), 0.9).tolist() == [0, 1, 0]
    assert shrink(torch.full((4,), 0.25), 0.9).tolist() == [0.25] * 4


def test_no_threshold_shrinks_nothing():
    weights = torch.randn(5, 10).softmax(dim=-1)
    torch.testing.assert_close(shrink(weights, 0.0), weights)


@pytest.mark.parametrize("blocks", [1, 2, 6])
@pytest.mark.parametrize("shrinkage", [0.0, 1.0, 3.0])
def test_weights_sum_to_one_over_the_slots(blocks, shrinkage):
    weights = Memory(6, 10, blocks, shrinkage).address(3 * torch.randn(2, 6, 3, 4))
    assert weights.shape == (2, 3, 4, blocks, 10)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 4, blocks))


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_each_block_is_addressed_on_its_own(blocks):
    memory = Memory(6, 10, blocks, shrinkage=1.0)
    code = 3 * torch.randn(2, 6, 3, 4)
    size = 6 // blocks
    found = memory.read(memory.address(code))
    for block in range(blocks):
        part = slice(block * size, (block + 1) * size)
        items = memory.items[block]
        for row in range(3):
            for column in range(4):
                weights = (code[:, part, row, column] @ items.T).softmax(dim=1)
                torch.testing.assert_close(found[:, part, row, column], shrink(weights, 0.1) @ items)


def test_a_change_in_one_block_leaves_the_others():
    memory = Memory(6, 10, 3)
    code = torch.randn(1, 6, 2, 2)
    changed = code.clone()
    changed[:, 2:4] += 3
    first, second = (memory.read(memory.address(each)) for each in (code, changed))
    assert torch.equal(first[:, [0, 1, 4, 5]], second[:, [0, 1, 4, 5]])
    assert not torch.equal(first[:, 2:4], second[:, 2:4])


def test_what_is_read_is_a_mixture_of_items():
    memory = Memory(6, 10)
    found = memory.read(memory.address(100 * torch.randn(2, 6, 3, 4)))
    low, high = memory.items[0].amin(dim=0), memory.items[0].amax(dim=0)
    assert (found >= low[:, None, None] - 1e-6).all()
    assert (found <= high[:, None, None] + 1e-6).all()


@pytest.mark.parametrize("blocks", [1, 2])
def test_penalty_is_the_weighted_entropy_of_the_addressing(blocks):
    model = MemoryAutoencoder(latent_dim=6, slots=10, blocks=blocks, entropy_weight=0.3, **SMALL).eval()
    x = torch.rand(2, 1, 16, 16)
    weights = model.memory.address(model.into_code(model.encoder(x)))
    torch.testing.assert_close(model(x).penalty, 0.3 * Categorical(weights).entropy().mean())


def test_gradients_stay_finite_where_all_but_one_weight_is_zero():
    model = MemoryAutoencoder(latent_dim=6, slots=10, shrinkage=9.9, **SMALL)
    output = model(torch.rand(2, 1, 16, 16))
    (output.expected.sum() + output.penalty).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# High frequencies


@pytest.mark.parametrize("sigma", [0.7, 1.6, 2.5])
def test_detail_against_scipy(sigma):
    x = torch.rand(2, 3, 32, 24)
    detail = HighFrequencyRestorer(3, sigma=sigma, grey=False, **SMALL).detail(x).numpy()
    blurred = ndimage.gaussian_filter(x.double().numpy(), (0, 0, sigma, sigma), mode="mirror", truncate=4)
    np.testing.assert_allclose(detail, x.numpy() - blurred, atol=2e-6)


def test_grey_detail_is_that_of_the_mean_of_the_channels():
    x = torch.rand(2, 3, 32, 24)
    detail = HighFrequencyRestorer(3, **SMALL).detail(x)
    alone = HighFrequencyRestorer(1, **SMALL).detail(x.mean(dim=1, keepdim=True))
    torch.testing.assert_close(detail, alone.expand(2, 3, 32, 24))


def test_the_default_halves_30_cycles_on_256_pixels():
    wave = torch.sin(2 * math.pi * 30 / 256 * torch.arange(256.0)).expand(1, 1, 256, 256)
    detail = HighFrequencyRestorer(**SMALL).detail(wave)[..., 20:-20]
    assert float((detail * wave[..., 20:-20]).sum() / wave[..., 20:-20].square().sum()) == pytest.approx(0.5, abs=0.01)


def test_colour_cannot_be_copied():
    model = HighFrequencyRestorer(3, **SMALL).eval()
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(model(x).expected, model(x[:, [2, 0, 1]]).expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keep_mean", [True, False])
def test_brightness_is_followed_only_if_it_is_kept(keep_mean):
    model = HighFrequencyRestorer(keep_mean=keep_mean, **SMALL).eval()
    x = torch.rand(2, 1, 16, 16)
    shift = model(x + 0.25).expected - model(x).expected
    torch.testing.assert_close(shift, torch.full_like(x, 0.25 if keep_mean else 0.0), atol=1e-4, rtol=0)


def test_what_was_observed_is_the_tile():
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(HighFrequencyRestorer(**SMALL)(x).observed, x)


def test_detail_keeps_its_precision_under_autocast():
    model = HighFrequencyRestorer(**SMALL)
    x = 0.9 + 0.01 * torch.rand(2, 1, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = model.detail(x)
    assert torch.equal(halved, model.detail(x))


def test_a_mask_head_may_be_asked_for():
    assert HighFrequencyRestorer(**SMALL)(torch.rand(2, 1, 16, 16)).repaired is None
    assert HighFrequencyRestorer(mask_head=True, **SMALL)(torch.rand(2, 1, 16, 16)).repaired.shape == (2, 1, 16, 16)


def test_a_blur_wider_than_the_tile_is_refused_in_words():
    with pytest.raises(ConfigError, match=r"model\.sigma 5 blurs over 20 pixels to each side.*16 x 16"):
        HighFrequencyRestorer(sigma=5.0, **SMALL)(torch.rand(1, 1, 16, 16))
