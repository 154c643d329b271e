"""The variational autoencoder on features."""

import pytest
import torch
from torch import nn

from blemish.errors import ConfigError
from blemish.models.contracts import Gaussian
from blemish.models.feature_vae import FeatureVariationalAutoencoder
from blemish.residuals import L2, SSIM
from blemish.scores.variational import ElboScore, KlScore, MonteCarloScore

FEATURES = 5


class Coarse(nn.Module):
    """Means of 4 x 4 pixels, five times, each with its own sign and size."""

    features = FEATURES

    def forward(self, x):
        grid = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 4)
        return grid * torch.tensor([1.0, -1.0, 2.0, 0.5, 3.0])[:, None, None] + grid.square()


def tiles(count=20, seed=0):
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def fitted(**arguments):
    torch.manual_seed(0)
    model = FeatureVariationalAutoencoder(Coarse(), latent_dim=2, steps=200, batch_size=64, **arguments)
    model.fit(tiles().split(7))
    return model.eval()


def test_the_loss_is_the_negative_elbo_by_hand():
    model = fitted(beta=0.3)
    x = torch.randn(2, FEATURES, 3, 4)
    generator, same = (torch.Generator().manual_seed(4) for _ in range(2))
    mean, log_variance = model.encoder(x).chunk(2, dim=1)
    code = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=same)
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    kl = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))
    wanted = (model.decoder(code) - x).square().mean() + 0.3 * kl.sum() / (2 * 3 * 4 * FEATURES)
    torch.testing.assert_close(model.loss(x, generator), wanted)


def test_a_large_beta_leaves_no_information_in_the_code_and_a_small_one_does():
    (strict,), (free,) = (fitted(beta=beta)(tiles(4, 9)).latents for beta in (100.0, 0.001))
    assert type(free.posterior) is Gaussian
    assert strict.kl().sum(dim=1).mean() < 0.05 < 0.5 < free.kl().sum(dim=1).mean()


def test_what_is_expected_repeats():
    model = fitted()
    assert torch.equal(model(tiles(2)).expected, model(tiles(2)).expected)


def test_scores_of_the_code_are_in_units_of_features_and_as_large_as_the_tile():
    model, x = fitted(beta=0.3), tiles(3, 9)
    output = model(x)
    squared = (output.expected - output.observed).square().mean()
    kl = output.latents[0].kl().sum() / output.observed.numel()
    elbo = ElboScore(L2(), beta=0.3)(model, x)
    assert elbo.shape == (3, 1, 16, 16)
    torch.testing.assert_close(elbo.mean(), squared + 0.3 * kl)
    torch.testing.assert_close(KlScore()(model, x).mean(), kl)
    assert MonteCarloScore(L2(), draws=2)(model, x).shape == (3, 1, 16, 16)
    with pytest.raises(ConfigError, match="SSIM compares pixels"):
        ElboScore(SSIM())(model, x)


def test_negative_beta_is_refused():
    with pytest.raises(ConfigError, match=r"model\.beta >= 0, found -1"):
        FeatureVariationalAutoencoder(Coarse(), beta=-1)
