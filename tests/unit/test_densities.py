"""Densities carried as tensors, against the scikit-learn estimators that they were fitted by."""

import io
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist
from scipy.special import logsumexp
from torch import nn

from blemish.errors import ConfigError
from blemish.models.colour_histogram import ColourHistogram
from blemish.models.contracts import Fittable, Output
from blemish.models.features import in_parts
from blemish.models.isolation_forest import IsolationForest
from blemish.models.kde import KernelDensity
from blemish.models.one_class_svm import OneClassSVM
from blemish.models.pca import PrincipalSubspace
from blemish.residuals import L2
from blemish.scores.evidence import EvidenceScore
from blemish.scores.gradient import InputGradientScore
from blemish.scores.residual import ResidualScore

SIZE, SIDE, FEATURES = 32, 8, 6
KINDS = {
    "forest": (IsolationForest, {"trees": 20, "tree_samples": 64}),
    "forest_of_stumps": (IsolationForest, {"trees": 3, "tree_samples": 3}),
    "rbf": (OneClassSVM, {"samples": 400}),
    "nystroem": (OneClassSVM, {"kernel": "nystroem", "components": 50, "samples": 1000}),
    "linear": (OneClassSVM, {"kernel": "linear", "samples": 400}),
    "kde": (KernelDensity, {"samples": 300}),
    "kde_projected": (KernelDensity, {"bandwidth": 0.5, "samples": 300, "projection": "pca", "dimensions": 3}),
}
every_kind = pytest.mark.parametrize("name", KINDS)


class Patches(nn.Module):
    """A source of features that needs no network: sums over the pixels of each 4 x 4 patch."""

    features = FEATURES

    def __init__(self):
        super().__init__()
        mix = torch.randn(FEATURES, 16, generator=torch.Generator().manual_seed(0))
        self.register_buffer("mix", mix, persistent=False)

    def forward(self, x):
        return torch.einsum("fp,bphw->bfhw", self.mix, F.pixel_unshuffle(x[:, :1], 4))


def tiles(count=40, seed=0):
    """Smooth random tiles (N, 1, 32, 32)."""
    coarse = torch.rand(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)


def others():
    """Tiles that hold normal places, unusual ones, and very unusual ones."""
    x = torch.cat([tiles(2, 5), tiles(2, 6) - 0.5, 20 * tiles(1, 7)])
    x[1, :, ::2] = 0
    return x


@pytest.fixture(scope="module")
def fitted():
    """A fitted model by its name, made once, and the estimator of scikit-learn's that its patches give."""
    made = {}

    def fit(name):
        if name not in made:
            kind, arguments = KINDS[name]
            model = kind(Patches(), seed=3, **arguments)
            assert isinstance(model, Fittable)
            seen = []
            plain = model.estimate
            model.estimate = lambda patches: (seen.append(patches.clone()), plain(patches))
            model.fit(tiles().split(7))
            del model.estimate
            made[name] = model.eval(), seen[0]
        return made[name]

    return fit


def estimator(name, model, patches):
    """Fitted by scikit-learn alone: a function from places to its score_samples."""
    from sklearn.ensemble import IsolationForest as Forest
    from sklearn.kernel_approximation import Nystroem
    from sklearn.linear_model import SGDOneClassSVM
    from sklearn.neighbors import KernelDensity as Density
    from sklearn.svm import OneClassSVM as Machine

    values = patches.numpy()
    wide = values.astype(np.float64)
    if name.startswith("forest"):
        forest = Forest(n_estimators=model.trees, max_samples=model.tree_samples, random_state=3)
        return forest.fit(values).score_samples
    if name.startswith("kde"):
        return Density(bandwidth=model.bandwidth).fit(wide).score_samples
    if name == "nystroem":
        mapping = Nystroem(gamma=1 / (FEATURES * wide.var()), n_components=50, random_state=3)
        machine = SGDOneClassSVM(nu=0.1, random_state=3).fit(mapping.fit_transform(wide))
        return lambda places: machine.score_samples(mapping.transform(places))
    return Machine(kernel=name, nu=0.1, gamma="scale").fit(wide).score_samples


@every_kind
def test_scores_are_those_of_scikit_learn(fitted, name):
    model, patches = fitted(name)
    x = others()
    output = model(x)
    assert torch.equal(output.observed, output.expected) and output.evidence.shape == (5, 1, SIDE, SIDE)
    places = output.observed.permute(0, 2, 3, 1).reshape(-1, model.dimensions)
    places = torch.cat([places, patches])  # on these, trees ask whether a value is at most itself
    wanted = estimator(name, model, patches)(places.numpy())
    found = model.score_samples(places).numpy()
    # Distances are computed in float32. Of very small densities, scikit-learn's tree loses some digits itself.
    tolerance = {"rtol": 1e-6 if name.startswith("forest") else 1e-4, "atol": 1e-6}
    told = wanted > -500
    np.testing.assert_allclose(found[told], wanted[told], **tolerance)
    assert told.mean() > 0.8 and (found[~told] < -400).all() and len(np.unique(found)) > 2
    evidence = output.evidence.flatten().numpy()
    np.testing.assert_allclose(evidence, np.maximum(float(model.highest) - found[: len(evidence)], 0), 1e-6, 1e-5)
    assert evidence[-SIDE * SIDE :].mean() > evidence[: SIDE * SIDE].mean() or name == "linear"


def test_small_densities_are_those_of_brute_force(fitted):
    model, points = fitted("kde")
    places = model(others()).observed.permute(0, 2, 3, 1).reshape(-1, FEATURES)
    exponents = cdist(places.double(), points.double(), "sqeuclidean") / (-2 * float(model.width) ** 2)
    wanted = logsumexp(exponents, axis=1) - np.log(len(points)) + float(model.highest)
    assert wanted.min() < -1000
    np.testing.assert_allclose(model.score_samples(places), wanted, rtol=1e-5, atol=1e-4)


@every_kind
def test_no_score_is_above_the_highest_that_there_can_be(fitted, name):
    model, patches = fitted(name)
    scores = model.score_samples(patches)
    assert scores.max() <= model.highest + 1e-4
    if name == "linear":
        assert scores.max() == pytest.approx(float(model.highest), abs=1e-5)


@every_kind
def test_parts_give_what_the_whole_gives(fitted, name, monkeypatch):
    model, patches = fitted(name)
    whole = model.score_samples(patches)
    asked = []

    def watched(function, places, width):
        return in_parts(lambda part: (asked.append(len(part) * width), function(part))[1], places, width)

    monkeypatch.setattr("blemish.models.features._MOST_VALUES", 5000)
    for module in ("isolation_forest", "one_class_svm", "kde"):
        monkeypatch.setattr(f"blemish.models.{module}.in_parts", watched)
    torch.testing.assert_close(model.score_samples(patches), whole, rtol=1e-5, atol=1e-5)
    assert max(asked) <= 5000


@every_kind
def test_a_fresh_model_takes_the_tensors_of_a_fitted_one(fitted, name):
    model, _ = fitted(name)
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    kind, arguments = KINDS[name]
    fresh = kind(Patches(), **arguments).eval()
    assert torch.isfinite(fresh(others()).evidence).all()  # it is tried on a tile before it has learned
    fresh.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(fresh(others()).evidence, model(others()).evidence)
    narrow = kind(Patches(), **arguments).state_dict() | {"mean": torch.zeros(3)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        fresh.load_state_dict(narrow)


def test_fewer_patches_than_asked_for_are_enough():
    for kind, arguments in KINDS.values():
        model = kind(Patches(), **arguments)
        model.fit([tiles(1)])
        assert torch.isfinite(model.eval()(others()).evidence).all()


def test_even_tiles_are_enough_to_be_finite():
    for kind, arguments in KINDS.values():
        model = kind(Patches(), **arguments)
        model.fit([torch.full((3, 1, SIZE, SIZE), 0.5)])
        assert torch.isfinite(model.eval()(others()).evidence).all()


def test_scikit_learn_is_asked_for_before_features_are_computed(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # as if it were not installed
    for kind in (IsolationForest, OneClassSVM):
        with pytest.raises(
            ConfigError, match=r"fitted by scikit-learn, which is not installed: pip install 'blemish\["
        ):
            kind(Patches()).fit([])
        with pytest.raises(ConfigError, match="fitted by scikit-learn"):
            kind(Patches()).check_installed()
    KernelDensity(Patches(), samples=10).check_installed()
    KernelDensity(Patches(), samples=10).fit([tiles(1)])


# --- scores


def test_evidence_is_enlarged_to_the_tile_and_needs_no_residual(fitted):
    model, _ = fitted("kde")
    told, expected = EvidenceScore().explain(model, others())
    output = model(others())
    wanted = F.interpolate(output.evidence, (SIZE, SIZE), mode="bilinear", align_corners=False)
    assert torch.equal(told, wanted) and torch.equal(expected, output.expected)


@pytest.mark.parametrize("score", [ResidualScore(L2()), InputGradientScore(L2())])
def test_a_residual_of_what_expects_nothing_is_refused(fitted, score):
    with pytest.raises(ConfigError, match=r"L2 compares .* judges without expecting anything: set score=evidence"):
        score(fitted("forest")[0], tiles(1))


def test_evidence_of_a_model_that_expects_something_is_refused():
    with pytest.raises(ConfigError, match=r"EvidenceScore expects a model that judges .*: set score=residual"):
        EvidenceScore()(PrincipalSubspace(Patches()).eval(), tiles(1))


def test_a_place_that_is_not_valid_has_no_evidence():
    class Given(nn.Module):
        def forward(self, x):
            valid = torch.tensor([[[[True, False]] * 2]])
            return Output(x, x, valid=valid, evidence=torch.ones(1, 1, 2, 2))

    told = EvidenceScore()(Given(), torch.zeros(1, 1, 8, 8))
    assert (told[..., 0] == 1).all() and (told[..., 7] == 0).all()


# --- principal components


@pytest.mark.parametrize("components", [2, 0.9, 6])
def test_subspace_is_that_of_scikit_learn(components):
    from sklearn.decomposition import PCA

    model = PrincipalSubspace(Patches(), components)
    model.fit(tiles().split(7))
    grid = Patches()(tiles()).permute(0, 2, 3, 1).reshape(-1, FEATURES)
    reference = PCA(components, svd_solver="full").fit(((grid - model.mean) / model.deviation).double().numpy())
    output = model.eval()(others())
    seen = output.observed.permute(0, 2, 3, 1).reshape(-1, FEATURES).double().numpy()
    wanted = reference.inverse_transform(reference.transform(seen))
    found = output.expected.permute(0, 2, 3, 1).reshape(-1, FEATURES)
    np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(seen).max())  # float16 in between
    assert int(model.axes.any(dim=1).sum()) == reference.n_components_


def test_the_whole_variance_leaves_no_residual():
    model = PrincipalSubspace(Patches(), FEATURES)
    model.fit(tiles().split(7))
    assert ResidualScore(L2())(model.eval(), tiles(2, 4)).max() < 1e-8


# --- mistakes


@pytest.mark.parametrize(
    ("kind", "change", "sentence"),
    [
        (PrincipalSubspace, {"components": 7}, r"model\.components from 1 to the backbone's 6, or a share .* found 7"),
        (PrincipalSubspace, {"components": 1.5}, r"or a share between 0 and 1, found 1\.5"),
        (IsolationForest, {"trees": 0}, r"model\.trees to be a positive whole number, found 0"),
        (IsolationForest, {"tree_samples": 1}, r"model\.tree_samples to be a whole number of at least 2, found 1"),
        (IsolationForest, {"samples": 0.5}, r"model\.samples to be a positive whole number, found 0\.5"),
        (OneClassSVM, {"kernel": "rbff"}, r"Unknown model\.kernel 'rbff': did you mean 'rbf'"),
        (OneClassSVM, {"nu": 0}, r"model\.nu between 0 and 1, found 0"),
        (OneClassSVM, {"nu": 1.0}, r"model\.nu between 0 and 1, found 1"),
        (OneClassSVM, {"gamma": -1}, r"model\.gamma > 0, or null, found -1"),
        (OneClassSVM, {"components": 0}, r"model\.components to be a positive whole number, found 0"),
        (KernelDensity, {"bandwidth": "silverman"}, r"model\.bandwidth > 0, or scott, found silverman"),
        (KernelDensity, {"bandwidth": 0}, r"model\.bandwidth > 0, or scott, found 0"),
        (ColourHistogram, {"hue": 2}, r"backbone\.hue of 0, or 3 or more bins, found 2"),
        (ColourHistogram, {"hue": 0, "saturation": 0, "value": 0}, r"Expected bins in backbone\.hue.* found none"),
        (ColourHistogram, {"stride": 0}, r"backbone\.stride to be a positive whole number, found 0"),
        (ColourHistogram, {"cell": 8}, r"backbone\.cell to be an odd multiple of backbone\.stride \(4\), found 8"),
    ],
)
def test_mistakes_are_one_sentence(kind, change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        kind(**({} if kind is ColourHistogram else {"backbone": Patches()}) | change)
