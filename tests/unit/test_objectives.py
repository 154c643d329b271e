"""What training minimises."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from blemish.errors import ConfigError
from blemish.models.contracts import Gaussian, Output
from blemish.residuals import L1, L2
from blemish.training.objectives import ReconstructionObjective


def random_batch(seed=0, latent_shape=(4, 5)):
    generator = torch.Generator().manual_seed(seed)
    target, expected = torch.rand(2, 4, 3, 8, 8, generator=generator)
    latent = Gaussian(torch.randn(latent_shape, generator=generator), torch.randn(latent_shape, generator=generator))
    return target, Output(target, expected, latent)


def standard(latent):
    return Normal(torch.zeros_like(latent.mean), torch.ones_like(latent.mean))


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_kl_against_torch_distributions(shape):
    latent = random_batch(latent_shape=shape)[1].latent
    expected = kl_divergence(Normal(latent.mean, (0.5 * latent.log_variance).exp()), standard(latent))
    assert latent.kl().shape == shape
    torch.testing.assert_close(latent.kl(), expected)


def test_kl_of_the_standard_normal_is_zero():
    assert (Gaussian(torch.zeros(2, 3), torch.zeros(2, 3)).kl() == 0).all()


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
def test_reconstruction_is_the_mean_residual_to_the_clean_target(residual):
    target, output = random_batch()
    corrupted = Output(target + 1, output.expected)
    loss = ReconstructionObjective(residual)(corrupted, target, 0)
    torch.testing.assert_close(loss.reconstruction, residual(target, output.expected).mean())


def test_without_a_latent_there_is_no_kl():
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=5.0)(Output(target, output.expected), target, 0)
    assert loss.kl == 0
    assert loss.total == loss.reconstruction


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 2, 3)])
def test_kl_is_summed_over_the_code_and_divided_by_pixel_values(shape):
    target, output = random_batch(latent_shape=shape)
    loss = ReconstructionObjective(L1())(output, target, 0)
    torch.testing.assert_close(loss.kl, output.latent.kl().flatten(1).sum(dim=1).mean() / (3 * 8 * 8))


@pytest.mark.parametrize("beta", [0.0, 0.01, 4.0])
def test_beta_weighs_the_kl(beta):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta)(output, target, 0)
    torch.testing.assert_close(loss.total, loss.reconstruction + beta * loss.kl)


@pytest.mark.parametrize(("step", "share"), [(0, 0.1), (4, 0.5), (8, 0.9), (9, 1.0), (10, 1.0), (10**6, 1.0)])
def test_beta_grows_linearly_over_the_warm_up(step, share):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=2.0, warmup_steps=10)(output, target, step)
    torch.testing.assert_close(loss.total, loss.reconstruction + 2.0 * share * loss.kl)


@pytest.mark.parametrize("step", [0, 1000])
def test_without_warm_up_beta_is_whole_from_the_start(step):
    target, output = random_batch()
    loss = ReconstructionObjective(L1(), beta=2.0)(output, target, step)
    torch.testing.assert_close(loss.total, loss.reconstruction + 2.0 * loss.kl)


def test_free_bits_bound_each_dimension_of_the_batch_mean():
    target, output = random_batch()
    per_dimension = output.latent.kl().mean(dim=0)
    free = per_dimension.median().item()
    loss = ReconstructionObjective(L1(), free_bits=free)(output, target, 0)
    torch.testing.assert_close(loss.kl, per_dimension.clamp(min=free).sum() / (3 * 8 * 8))


def test_free_bits_stop_the_pull_on_cheap_dimensions():
    target, output = random_batch()
    mean = torch.full((4, 2), 0.1)
    mean[:, 1] = 3.0
    latent = Gaussian(mean.requires_grad_(), torch.zeros(4, 2))
    ReconstructionObjective(L1(), free_bits=0.5)(Output(target, output.expected, latent), target, 0).total.backward()
    assert (mean.grad[:, 0] == 0).all()
    assert (mean.grad[:, 1] > 0).all()


def test_gradient_reaches_expected_and_latent():
    target, output = random_batch()
    leaves = [output.expected.requires_grad_(), *(part.requires_grad_() for part in output.latent)]
    ReconstructionObjective(L1(), beta=1.0)(output, target, 0).total.backward()
    assert all(leaf.grad is not None and leaf.grad.abs().sum() > 0 for leaf in leaves)


def test_half_precision_latents_are_summed_in_float32():
    target, output = random_batch(latent_shape=(4, 64, 8, 8))
    halved = Gaussian(*(part.bfloat16() for part in output.latent))
    loss = ReconstructionObjective(L1())(Output(target, output.expected, halved), target, 0)
    assert loss.kl.dtype == torch.float32
    exact = ReconstructionObjective(L1())(output, target, 0).kl
    torch.testing.assert_close(loss.kl, exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("wrong", [{"beta": -0.1}, {"warmup_steps": -1}, {"free_bits": -0.5}])
def test_negative_arguments_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"objective\.beta, warmup_steps and free_bits >= 0"):
        ReconstructionObjective(L1(), **wrong)
