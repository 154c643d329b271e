"""What training minimises."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from blemish.errors import ConfigError
from blemish.models.contracts import Gaussian, Latent, Output
from blemish.residuals import L1, L2
from blemish.training.objectives import ReconstructionObjective

NOWHERE = torch.zeros(4, 1, 8, 8)


def random_batch(seed=0, latent_shape=(4, 5)):
    """A target and an output with one level of latents, whose prior is the standard normal."""
    generator = torch.Generator().manual_seed(seed)
    target, expected = torch.rand(2, 4, 3, 8, 8, generator=generator)
    return target, Output(target, expected, (Latent(random_gaussian(generator, latent_shape)),))


def random_gaussian(generator, shape):
    return Gaussian(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def random_mask(seed=0, shape=(4, 1, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) < 0.3).float(), 2 * torch.randn(shape, generator=generator)


def normal(gaussian):
    return Normal(gaussian.mean, (0.5 * gaussian.log_variance).exp())


def standard(gaussian):
    return Normal(torch.zeros_like(gaussian.mean), torch.ones_like(gaussian.mean))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_kl_against_torch_distributions(shape):
    generator = torch.Generator().manual_seed(0)
    posterior, prior = random_gaussian(generator, shape), random_gaussian(generator, shape)
    assert posterior.kl().shape == shape
    torch.testing.assert_close(posterior.kl(), kl_divergence(normal(posterior), standard(posterior)))
    torch.testing.assert_close(posterior.kl(prior), kl_divergence(normal(posterior), normal(prior)))
    torch.testing.assert_close(Latent(posterior, prior).kl(), posterior.kl(prior))
    torch.testing.assert_close(Latent(posterior).kl(), posterior.kl())


def test_kl_to_itself_is_zero():
    assert (Gaussian(torch.zeros(2, 3), torch.zeros(2, 3)).kl() == 0).all()
    any_one = random_gaussian(torch.Generator().manual_seed(0), (2, 3))
    assert (any_one.kl(any_one) == 0).all()


def test_samples_follow_the_distribution_and_pass_gradients():
    torch.manual_seed(0)
    mean = torch.tensor([0.0, 3.0]).expand(20000, 2).clone().requires_grad_()
    log_variance = torch.tensor([0.0, -2.0]).expand(20000, 2).clone().requires_grad_()
    draws = Gaussian(mean, log_variance).sample()
    torch.testing.assert_close(draws.mean(dim=0), torch.tensor([0.0, 3.0]), atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(dim=0), torch.tensor([1.0, torch.e**-1]), atol=0.03, rtol=0)
    draws.sum().backward()
    assert (mean.grad == 1).all()
    assert (log_variance.grad != 0).any()


@pytest.mark.parametrize("residual", [L1(), L2()], ids=["l1", "l2"])
@pytest.mark.parametrize("mask", [NOWHERE, 1 - NOWHERE, random_mask()[0]], ids=["clean", "all corrupted", "some"])
def test_reconstruction_is_the_mean_residual_to_the_clean_target(residual, mask):
    target, output = random_batch()
    corrupted = Output(target + 1, output.expected)
    loss = ReconstructionObjective(residual)(corrupted, target, mask, 0)
    torch.testing.assert_close(loss.reconstruction, residual(target, output.expected).mean())


def test_corrupted_pixels_weigh_what_was_set_by_hand():
    # One row of four pixels with residuals 1, 2, 3, 4, of which the last is corrupted.
    target, expected = torch.zeros(1, 1, 1, 4), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    mask = torch.tensor([0.0, 0.0, 0.0, 1.0]).view(1, 1, 1, 4)

    def reconstruction(weight, mask=mask):
        loss = ReconstructionObjective(L1(), corrupted_weight=weight)(Output(target, expected), target, mask, 0)
        return loss.reconstruction.item()

    assert reconstruction(1.0) == pytest.approx(10 / 4)
    assert reconstruction(3.0) == pytest.approx((1 + 2 + 3 + 3 * 4) / (1 + 1 + 1 + 3))
    assert reconstruction(0.0) == pytest.approx((1 + 2 + 3) / 3)
    half = 0.5 * mask  # half corrupted: halfway between the weights
    assert reconstruction(3.0, half) == pytest.approx((1 + 2 + 3 + 2 * 4) / (1 + 1 + 1 + 2))


def test_nothing_but_corrupted_pixels_at_weight_zero_is_no_division_by_zero():
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), corrupted_weight=0.0)(output, target, 1 - NOWHERE, 0)
    assert loss.reconstruction == 0


def test_what_the_model_does_not_give_costs_nothing():
    target, output = random_batch()
    objective = ReconstructionObjective(L1(), beta=5.0, mask_weight=5.0, penalty_weight=5.0)
    loss = objective(Output(target, output.expected), target, random_mask()[0], 0)
    assert (loss.kl, loss.mask, loss.penalty) == (0, 0, 0)
    assert loss.total == loss.reconstruction
    assert all(part.shape == () for part in loss)


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_kl_is_summed_over_the_code_and_divided_by_pixel_values(shape):
    target, output = random_batch(latent_shape=shape)
    loss = ReconstructionObjective(L1())(output, target, NOWHERE, 0)
    torch.testing.assert_close(loss.kl, output.latents[0].kl().flatten(1).sum(dim=1).mean() / (3 * 8 * 8))


def test_levels_of_a_hierarchy_add_up_each_with_its_free_bits():
    target, output = random_batch()
    generator = torch.Generator().manual_seed(1)
    levels = tuple(
        Latent(random_gaussian(generator, shape), random_gaussian(generator, shape) if learned else None)
        for shape, learned in [((4, 5), False), ((4, 2, 3, 3), True), ((4, 7), True)]
    )
    several = Output(target, output.expected, levels)
    kinds = [
        (normal(level.posterior), standard(level.posterior) if level.prior is None else normal(level.prior))
        for level in levels
    ]
    per_dimension = [kl_divergence(*pair).mean(dim=0) for pair in kinds]
    for free in (0.0, torch.cat([part.flatten() for part in per_dimension]).median().item()):
        loss = ReconstructionObjective(L1(), free_bits=free)(several, target, NOWHERE, 0)
        expected = sum(part.clamp(min=free).sum() for part in per_dimension) / (3 * 8 * 8)
        torch.testing.assert_close(loss.kl, expected)


@pytest.mark.parametrize("beta", [0.0, 0.01, 4.0])
def test_beta_weighs_the_kl(beta):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=beta)(output, target, NOWHERE, 0)
    torch.testing.assert_close(loss.total, loss.reconstruction + beta * loss.kl)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (4, 0.5), (8, 0.9), (9, 1.0), (10, 1.0), (10**6, 1.0)])
def test_beta_grows_linearly_over_the_warm_up(step, share):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=2.0, warmup_steps=10)(output, target, NOWHERE, step)
    torch.testing.assert_close(loss.total, loss.reconstruction + 2.0 * share * loss.kl)


@pytest.mark.parametrize("step", [0, 1000])
def test_without_warm_up_beta_is_whole_from_the_start(step):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=2.0)(output, target, NOWHERE, step)
    torch.testing.assert_close(loss.total, loss.reconstruction + 2.0 * loss.kl)


def test_warm_up_is_of_the_kl_alone():
    target, output = random_batch()
    mask, logits = random_mask()
    whole = Output(target, output.expected, (), torch.tensor(0.7), logits)
    first, last = (ReconstructionObjective(L1(), warmup_steps=10)(whole, target, mask, step) for step in (0, 10))
    assert first.total == last.total


def test_free_bits_bound_each_dimension_of_the_batch_mean():
    target, output = random_batch()
    per_dimension = output.latents[0].kl().mean(dim=0)
    free = per_dimension.median().item()
    loss = ReconstructionObjective(L1(), free_bits=free)(output, target, NOWHERE, 0)
    torch.testing.assert_close(loss.kl, per_dimension.clamp(min=free).sum() / (3 * 8 * 8))


def test_free_bits_stop_the_pull_on_cheap_dimensions():
    target, output = random_batch()
    mean = torch.full((4, 2), 0.1)
    mean[:, 1] = 3.0
    latent = Latent(Gaussian(mean.requires_grad_(), torch.zeros(4, 2)))
    objective = ReconstructionObjective(L1(), free_bits=0.5)
    objective(Output(target, output.expected, (latent,)), target, NOWHERE, 0).total.backward()
    assert (mean.grad[:, 0] == 0).all()
    assert (mean.grad[:, 1] > 0).all()


def by_hand(logits, mask):
    """Binary cross-entropy, as written in a book."""
    found = torch.sigmoid(logits.double())
    return -(mask * found.log() + (1 - mask) * (1 - found).log()).mean().float()


def mask_part(logits, mask):
    target, output = random_batch()
    return ReconstructionObjective(L1())(output._replace(repaired=logits), target, mask, 0).mask


def test_mask_loss_is_least_where_the_mask_is_told():
    mask, _ = random_mask()
    sure, unsure, wrong = (mask_part(strength * (2 * mask - 1), mask) for strength in (20.0, 0.0, -20.0))
    assert 0 <= sure < 1e-4
    assert sure < unsure < wrong


@pytest.mark.parametrize("mask", [NOWHERE, 1 - NOWHERE], ids=["clean", "all corrupted"])
def test_mask_loss_has_finite_gradients_at_the_extremes(mask):
    for strength in (0.0, 100.0, -100.0):
        logits = torch.full_like(mask, strength).requires_grad_()
        loss = mask_part(logits, mask)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_mask_and_penalty_are_weighted(weight):
    target, output = random_batch()
    mask, logits = random_mask()
    whole = Output(target, output.expected, output.latents, torch.tensor(0.7), logits)
    loss = ReconstructionObjective(L1(), mask_weight=weight, penalty_weight=2 * weight, beta=0.3)(
        whole, target, mask, 0
    )
    assert loss.penalty.item() == pytest.approx(0.7)
    torch.testing.assert_close(loss.mask, by_hand(logits, mask))
    expected = loss.reconstruction + 0.3 * loss.kl + weight * by_hand(logits, mask) + 2 * weight * 0.7
    torch.testing.assert_close(loss.total, expected)


def test_gradient_reaches_all_that_the_model_gives():
    target, output = random_batch()
    mask, logits = random_mask()
    penalty = torch.tensor(0.7).requires_grad_()
    leaves = [output.expected.requires_grad_(), *(part.requires_grad_() for part in output.latents[0].posterior)]
    whole = output._replace(penalty=penalty, repaired=logits.requires_grad_())
    ReconstructionObjective(L1(), beta=1.0)(whole, target, mask, 0).total.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in [*leaves, logits, penalty])


def test_half_precision_is_summed_in_float32():
    target, output = random_batch(latent_shape=(4, 64, 8, 8))
    mask, logits = random_mask()
    (latent,) = output.latents
    halved = Latent(Gaussian(*(part.bfloat16() for part in latent.posterior)))
    low = Output(target, output.expected, (halved,), torch.tensor(0.7).bfloat16(), logits.bfloat16())
    loss = ReconstructionObjective(L1())(low, target, mask, 0)
    assert {part.dtype for part in loss} == {torch.float32}
    exact = ReconstructionObjective(L1())(output, target, mask, 0).kl
    torch.testing.assert_close(loss.kl, exact, rtol=0.01, atol=0)
    torch.testing.assert_close(loss.mask, by_hand(logits, mask), rtol=0.01, atol=0)


@pytest.mark.parametrize(
    "name", ["corrupted_weight", "mask_weight", "penalty_weight", "beta", "warmup_steps", "free_bits"]
)
def test_negative_arguments_are_refused(name):
    with pytest.raises(ConfigError, match=rf"Expected objective\.{name} >= 0, found -1"):
        ReconstructionObjective(L1(), **{name: -1})
