"""Models in feature space, against plain computations of what they say they do."""

import sys
import warnings
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import cdist, mahalanobis
from torch import nn

from blemish.errors import ConfigError
from blemish.models import feature_cache
from blemish.models.backbones import Backbone, LiteBackbone
from blemish.models.contracts import Fittable, Output, Unexportable
from blemish.models.feature_ae import FeatureAutoencoder
from blemish.models.feature_cache import cached
from blemish.models.gaussian import GlobalGaussian, PlaceGaussian
from blemish.models.nearest import Cells, NearestFeature, greedy_coreset, nearest
from blemish.models.place_nearest import PlaceNearest
from blemish.residuals import L1, L2, SSIM, WeightedSum
from blemish.scores.contracts import compared, residual_tile
from blemish.scores.gradient import InputGradientScore
from blemish.scores.residual import ResidualScore

SIZE, SIDE, FEATURES = 32, 8, 6


class Tiny(Backbone):
    """One layer of random filters with a stride of 4 pixels."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__("tiny", nn.Conv2d(3, FEATURES, 4, 4), 1, 0)

    def layers(self, x):
        return [self.network(x)]


def tiles(count=40, seed=0):
    """Smooth random tiles (N, 1, 32, 32)."""
    coarse = torch.rand(count, 1, 9, 9, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)


def fitted(kind, *arguments, normal=None, **keywords):
    torch.manual_seed(1)
    model = kind(Tiny(), *arguments, **keywords)
    assert isinstance(model, Fittable)
    model.fit((tiles() if normal is None else normal).split(7))
    return model.eval()


def standardised(model, x):
    """The features of tiles, by hand: (N, h, w, D) float64."""
    grid = model.backbone(x).double().permute(0, 2, 3, 1).numpy()
    normal = model.backbone(tiles()).double().permute(0, 2, 3, 1).numpy().reshape(-1, FEATURES)
    return (grid - normal.mean(axis=0)) / normal.std(axis=0)


# --- the cache


def test_cache_holds_all_features_and_their_moments():
    backbone = Tiny()
    wanted = backbone(tiles()).permute(0, 2, 3, 1)
    with cached(backbone, tiles().split(7), 1.0, torch.device("cpu")) as cache:
        path = Path(cache.values.filename)
        assert cache.tiles == 40 and cache.patches == 40 * SIDE * SIDE
        assert path.exists() == (sys.platform == "win32"), "elsewhere a kill leaves no file behind"
        np.testing.assert_allclose(cache.values, wanted.half(), atol=1e-3)
        flat = wanted.reshape(-1, FEATURES)
        torch.testing.assert_close(cache.mean, flat.mean(dim=0))
        torch.testing.assert_close(cache.deviation, flat.std(dim=0, correction=0))
        torch.testing.assert_close(cache.places(9, 11), wanted[:, 1, 1:3], atol=1e-3, rtol=1e-3)
    assert not path.exists()


def test_cache_draws_what_is_there_by_its_seed():
    with cached(Tiny(), tiles(5).split(2), 1.0, torch.device("cpu")) as cache:
        known = {tuple(row) for row in cache.values.reshape(-1, FEATURES).astype(np.float32).tolist()}
        for read in (cache.draw, cache.sample):
            first, again, other = (read(300, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
            assert torch.equal(first, again) and not torch.equal(first, other)
            assert {tuple(row) for row in first.tolist()} <= known
        everything = cache.sample(10_000, torch.Generator())
        assert len(everything) == cache.patches
        assert {tuple(row) for row in everything.tolist()} == known
        windows = cache.windows(6, 3, torch.Generator().manual_seed(0))
        assert windows.shape == (6, FEATURES, 3, 3)
        assert {tuple(row) for row in windows.permute(0, 2, 3, 1).reshape(-1, FEATURES).tolist()} <= known
        assert cache.windows(1, 99, torch.Generator()).shape == (1, FEATURES, SIDE, SIDE)


def test_cache_is_bounded_and_says_so():
    bytes_of_one = SIDE * SIDE * FEATURES * 2
    asked = []

    def counting(x):
        asked.append(len(x))
        return backbone(x)

    backbone = Tiny()
    with (
        pytest.warns(UserWarning, match=r"features of 10 of 40 tiles, evenly spread, fit into model\.cache_gb"),
        cached(counting, tiles().split(7), 10.5 * bytes_of_one / 2**30, torch.device("cpu")) as cache,
    ):
        assert cache.tiles == 10 and sum(asked) == 1 + 10
        assert isinstance(cache.values, np.memmap) and cache.values.nbytes == 10 * bytes_of_one
        ends = backbone(tiles()[[0, -1]]).permute(0, 2, 3, 1)
        np.testing.assert_allclose(cache.values[[0, -1]], ends, atol=1e-3)


@pytest.fixture
def looked(monkeypatch):
    """The numbers of tiles that `Tiny` was shown, call by call."""
    calls, look = [], Tiny.layers
    monkeypatch.setattr(Tiny, "layers", lambda self, x: calls.append(len(x)) or look(self, x))
    return calls


def kept_features(folder, normal=None, **changes):
    backbone = Tiny()
    for name, value in changes.items():
        setattr(backbone, name, value)
    normal = tiles() if normal is None else normal
    with cached(backbone, normal.split(7), 1.0, torch.device("cpu"), folder=folder) as cache:
        return np.array(cache.values), cache.mean.clone(), cache.deviation.clone()


def test_features_that_are_kept_are_computed_once(tmp_path, looked):
    folder = tmp_path / "some" / "cache"
    first = kept_features(folder)
    assert sum(looked) == 2 + 40, "the probe of a new backbone, and a picture to know it by"
    looked.clear()
    again = kept_features(folder)
    assert looked == [1, 1]
    for before, after in zip(first, again, strict=True):
        np.testing.assert_array_equal(before, after)
    with cached(Tiny(), tiles().split(7), 1.0, torch.device("cpu")) as cache:
        np.testing.assert_array_equal(cache.values, first[0])
        assert torch.equal(cache.mean, first[1]) and torch.equal(cache.deviation, first[2])
    assert {path.suffix for path in folder.glob("*/*")} == {".npz"} and len(list(folder.glob("*/*"))) == 40


def test_of_other_tiles_only_batches_with_new_ones_are_computed(tmp_path, looked):
    kept_features(tmp_path)
    looked.clear()
    values, *_ = kept_features(tmp_path, normal=torch.cat([tiles(3, seed=1), tiles()[5:]]))
    assert sum(looked) == 2 + 7
    np.testing.assert_array_equal(values[3:], kept_features(tmp_path)[0][5:])


def test_another_backbone_is_asked_anew(tmp_path, looked):
    kept_features(tmp_path)
    looked.clear()
    kept_features(tmp_path, average=3)
    assert sum(looked) == 2 + 40 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("content", [b"damaged", b""])
def test_damaged_features_are_computed_again(tmp_path, looked, content):
    first = kept_features(tmp_path)
    sorted(tmp_path.glob("*/*"))[0].write_bytes(content)
    looked.clear()
    np.testing.assert_array_equal(kept_features(tmp_path)[0], first[0])
    assert sum(looked) in (2 + 7, 2 + 5), "its batch; the last has 5"


def test_what_was_computed_before_a_stop_is_kept_and_whole(tmp_path, monkeypatch, looked):
    add, added = feature_cache._Moments.add, []

    def stop(self, grid):
        added.append(grid)
        if len(added) > 10:
            raise KeyboardInterrupt
        add(self, grid)

    with monkeypatch.context() as patched:
        patched.setattr(feature_cache._Moments, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            kept_features(tmp_path)
    files = list(tmp_path.glob("*/*"))
    assert len(files) == 14 and {file.suffix for file in files} == {".npz"}, "two batches of 7"
    looked.clear()
    kept_features(tmp_path)
    assert sum(looked) == 2 + 26


def test_features_are_kept_as_float32_where_that_is_asked_for(tmp_path):
    large = tiles(4) * 1e6
    with cached(lambda x: x, large.split(3), 1.0, torch.device("cpu"), folder=tmp_path, dtype="float32") as cache:
        assert cache.values.dtype == np.float32
        assert torch.equal(cache.places(0, cache.patches // 4), large.permute(0, 2, 3, 1).flatten(1, 2))
    with cached(lambda x: x, large.split(3), 1.0, torch.device("cpu"), folder=tmp_path, dtype="float32") as cache:
        assert torch.equal(cache.places(0, cache.patches // 4), large.permute(0, 2, 3, 1).flatten(1, 2)), "as kept"
    bound = 2.5 * 4 * large[0].numel() / 2**30
    with (
        pytest.warns(UserWarning, match="features of 2 of 4 tiles"),
        cached(lambda x: x, large.split(3), bound, torch.device("cpu"), dtype="float32") as cache,
    ):
        assert cache.values.nbytes == 2 * 4 * large[0].numel()


def test_a_model_keeps_features_as_its_backbone_says(monkeypatch):
    backbone = Tiny()
    look = Tiny.layers
    monkeypatch.setattr(Tiny, "layers", lambda self, x: [1e6 * grid for grid in look(self, x)])
    told = r"beyond what float16 holds: set backbone\.cache_dtype=float32, where"
    with pytest.raises(ConfigError, match=told), NearestFeature(backbone, 4).normal([tiles(3)]):
        pass
    backbone.cache_dtype = "float32"
    with NearestFeature(backbone, 4).normal([tiles(3)]) as cache:
        assert cache.values.dtype == np.float32


def test_nothing_to_learn_from_and_features_too_large_are_one_sentence():
    with pytest.raises(ConfigError, match="learns from normal tiles, found none"):
        fitted(NearestFeature, 4, normal=tiles()[:0])
    with (
        pytest.raises(ConfigError, match="beyond what float16 holds: train the model anew"),
        cached(lambda x: x * 1e6, [tiles(2)], 1.0, torch.device("cpu")),
    ):
        pass


# --- what is common


@pytest.mark.parametrize("kind", [NearestFeature, FeatureAutoencoder])
def test_features_are_in_deviations_of_normal_tiles(kind):
    model = fitted(kind, **({"steps": 1} if kind is FeatureAutoencoder else {}))
    np.testing.assert_allclose(
        model(tiles(3, 5)).observed.detach().permute(0, 2, 3, 1), standardised(model, tiles(3, 5)), atol=2e-3
    )


def test_a_feature_that_never_changes_is_not_blown_up():
    flat = torch.full((3, 1, SIZE, SIZE), 0.5)
    model = fitted(NearestFeature, 4, normal=flat)
    assert torch.isfinite(model(tiles(2)).observed).all()


def test_principal_components_are_those_of_numpy():
    model = fitted(NearestFeature, 4, projection="pca", dimensions=3)
    values = standardised(model, tiles()).reshape(-1, FEATURES)
    _, _, components = np.linalg.svd(values, full_matrices=False)
    overlap = np.abs(model.projection.numpy() @ components[:3].T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=5e-3)
    assert model(tiles(2)).observed.shape == (2, 3, SIDE, SIDE)
    np.testing.assert_allclose(
        model(tiles(2)).observed.permute(0, 2, 3, 1),
        standardised(model, tiles(2)) @ model.projection.double().numpy().T,
        atol=5e-3,
    )


def test_random_projection_follows_from_the_seed_and_keeps_lengths_on_average():
    one, same, other = (NearestFeature(Tiny(), 4, projection="random", dimensions=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.projection, same.projection) and not torch.equal(one.projection, other.projection)
    many = [NearestFeature(Tiny(), 4, projection="random", dimensions=4, seed=s).projection for s in range(100)]
    gram = torch.stack([matrix.T @ matrix for matrix in many]).mean(dim=0)
    torch.testing.assert_close(gram, torch.eye(FEATURES), atol=0.25, rtol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"projection": "pac"}, r"Unknown model\.projection 'pac': did you mean 'pca'"),
        ({"projection": "pca"}, r"model\.dimensions from 1 to the backbone's 6, found None"),
        ({"projection": "pca", "dimensions": 7}, r"model\.dimensions from 1 to the backbone's 6, found 7"),
        ({"dimensions": 3}, r"model\.dimensions=3 needs model\.projection=random or pca"),
        ({"cache_gb": 0}, r"model\.cache_gb > 0, found 0"),
        ({"bank": 0}, r"model\.bank to be a positive whole number, found 0"),
        ({"coreset": "gredy"}, r"Unknown model\.coreset 'gredy': did you mean 'greedy'"),
        ({"coreset": "greedy", "candidates": 10}, r"model\.candidates of at least model\.bank \(4000\), found 10"),
    ],
)
def test_mistakes_are_one_sentence(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        NearestFeature(Tiny(), **change)


# --- the autoencoder


@pytest.mark.parametrize("kernel", [1, 3])
def test_autoencoder_learns_normal_features_and_misses_others(kernel):
    model = fitted(FeatureAutoencoder, 2, 16, kernel, 150, 256)
    score = ResidualScore(L2())
    other = 1 - tiles(8, 3)
    other[:, :, ::2] = 0  # stripes, which no normal tile has
    normal, defect = score(model, tiles(8, 3)).mean(), score(model, other).mean()
    untrained = FeatureAutoencoder(Tiny(), 2, 16, kernel)
    untrained.mean, untrained.deviation = model.mean, model.deviation
    assert normal < 0.5 * score(untrained.eval(), tiles(8, 3)).mean()
    assert defect > 3 * normal


def test_training_follows_from_the_seed_and_leaves_the_generator_alone():
    first = fitted(FeatureAutoencoder, steps=5, seed=1)
    state = torch.get_rng_state()
    torch.manual_seed(9)
    again, other = (fitted(FeatureAutoencoder, steps=5, seed=seed) for seed in (1, 2))
    x = tiles(2)
    assert torch.equal(first(x).expected, again(x).expected)
    assert not torch.equal(first(x).expected, other(x).expected)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in first.parameters())


def test_parameters_of_the_default():
    model = FeatureAutoencoder(LiteBackbone(weights="none"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_104


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"latent_dim": 0}, r"model\.latent_dim to be a positive whole number, found 0"),
        ({"width": 1.5}, r"model\.width to be a positive whole number, found 1\.5"),
        ({"kernel": 2}, r"model\.kernel to be odd, found 2"),
        ({"learning_rate": 0}, r"model\.learning_rate > 0, found 0"),
    ],
)
def test_impossible_autoencoder_is_refused(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        FeatureAutoencoder(Tiny(), **change)


# --- the nearest


@pytest.mark.parametrize("limit", [1, 1000, 2**24])
def test_nearest_is_that_of_brute_force(monkeypatch, limit):
    monkeypatch.setattr("blemish.models.features._MOST_VALUES", limit)
    rng = np.random.default_rng(0)
    queries, bank = rng.normal(size=(301, 7)), rng.normal(size=(97, 7))
    found = nearest(torch.from_numpy(queries).float(), torch.from_numpy(bank).float())
    np.testing.assert_array_equal(found, cdist(queries, bank).argmin(axis=1))


needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="needs the package faiss-cpu")


@needs_faiss
def test_faiss_finds_the_nearest_in_all_cells_and_hardly_worse_in_some():
    generator = torch.Generator().manual_seed(0)
    middles = torch.randn(60, 6, generator=generator)
    bank, queries = (
        middles[torch.randint(60, (count,), generator=generator)] + 0.3 * torch.randn(count, 6, generator=generator)
        for count in (6000, 200)
    )
    exact = nearest(queries, bank)
    assert torch.equal(Cells(10_000).nearest(queries, bank), exact)
    found = Cells(4).nearest(queries, bank)
    distance = [(queries - bank[which]).norm(dim=1) for which in (exact, found)]
    assert (found == exact).float().mean() > 0.8 and (distance[1] / distance[0]).mean() < 1.02
    same = bank[:50].repeat(80, 1)  # most cells are empty, or of one feature
    found = same[Cells(1).nearest(queries, same)]
    assert (queries - found).norm(dim=1).mean() < 1.1 * (queries - same[nearest(queries, same)]).norm(dim=1).mean()
    few = bank[:3]
    assert torch.equal(Cells(1).nearest(queries, few), nearest(queries, few)), "one cell"


@needs_faiss
def test_faiss_follows_the_bank_and_its_model():
    model = fitted(NearestFeature, 300, search="faiss", probes=100)
    exact = fitted(NearestFeature, 300)
    with torch.inference_mode():
        assert torch.equal(model(tiles(3, seed=5)).expected, exact(tiles(3, seed=5)).expected)
        copy = deepcopy(model)
        assert torch.equal(copy(tiles(3, seed=5)).expected, model(tiles(3, seed=5)).expected)
    model.load_state_dict(model.state_dict() | {"bank": 0.5 * model.bank})
    moved = model(tiles(3, seed=5)).expected
    assert {tuple(row) for row in moved.movedim(1, -1).flatten(0, 2).tolist()} <= {
        tuple(row) for row in model.bank.tolist()
    }
    model.fit(tiles(seed=9).split(7))
    relearned = model(tiles(3, seed=5)).expected
    assert not torch.equal(relearned, moved)
    assert torch.equal(relearned, fitted(NearestFeature, 300, normal=tiles(seed=9))(tiles(3, seed=5)).expected)
    assert isinstance(model, Unexportable) and not isinstance(exact, Unexportable)


def test_faiss_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr("blemish.models.nearest.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model\.search=faiss needs a package: pip install 'blemish\[faiss\]'"):
        NearestFeature(Tiny(), 4, search="faiss")
    with pytest.raises(ConfigError, match=r"Unknown model\.search 'fais': did you mean 'faiss'"):
        NearestFeature(Tiny(), 4, search="fais")


def test_memory_of_a_search_is_bounded(monkeypatch):
    monkeypatch.setattr("blemish.models.features._MOST_VALUES", 500)
    asked, plain = [], torch.addmm

    def watched(lengths, part, bank, **keywords):
        asked.append(len(part) * bank.shape[1])
        return plain(lengths, part, bank, **keywords)

    monkeypatch.setattr(torch, "addmm", watched)
    nearest(torch.rand(100, 3), torch.rand(90, 3))
    assert max(asked) <= 500 and sum(asked) == 9000


def test_what_is_in_the_bank_is_expected_exactly():
    model = fitted(NearestFeature, 40 * SIDE * SIDE)
    output = model(tiles()[:3])
    np.testing.assert_allclose(output.observed, output.expected, atol=2e-2)  # float16 in between
    score = ResidualScore(L2())
    assert score(model, 1 - tiles(3, 3)).mean() > 10 * score(model, tiles()[:3]).mean()


def test_few_patches_fill_the_bank():
    model = fitted(NearestFeature, 200, normal=tiles(1))
    assert len(model.bank.unique(dim=0)) == SIDE * SIDE


def plain_coreset(points, count):
    chosen = [0]
    while len(chosen) < count:
        distances = cdist(points, points[chosen]).min(axis=1)
        chosen.append(int(distances.argmax()))
    return chosen


def test_greedy_coreset_is_the_plain_one():
    points = np.random.default_rng(1).normal(size=(200, 5))
    assert greedy_coreset(torch.from_numpy(points).float(), 30).tolist() == plain_coreset(points, 30)


def test_greedy_bank_covers_better_than_a_random_one():
    values = torch.from_numpy(standardised(NearestFeature(Tiny()), tiles()).reshape(-1, FEATURES)).float()
    reach = []
    for coreset in ("random", "greedy"):
        model = fitted(NearestFeature, 50, coreset)
        assert len(model.bank.unique(dim=0)) == 50
        reach.append(float(torch.cdist(values, model.bank).min(dim=1).values.max()))
    assert reach[1] < 0.7 * reach[0]


# --- normal distributions


def test_place_gaussian_is_mahalanobis_at_each_place():
    model = fitted(PlaceGaussian, SIZE, projection="none", dimensions=None, shrinkage=0.02)
    normal, new = (standardised(model, x) for x in (tiles(), tiles(2, 8)))
    residual = L2()(*model(tiles(2, 8))[:2]) * FEATURES
    for row, column in ((0, 0), (3, 5), (7, 2)):
        seen = normal[:, row, column]
        inverse = np.linalg.inv(np.cov(seen.T) + 0.02 * np.eye(FEATURES))
        for number in range(2):
            wanted = mahalanobis(new[number, row, column], seen.mean(axis=0), inverse) ** 2
            assert residual[number, 0, row, column].item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("limit", [2**24, 5000])
def test_place_nearest_is_that_of_brute_force_at_each_place(monkeypatch, limit):
    for name in ("_MOST_VALUES", "_IN_CACHE"):
        monkeypatch.setattr(f"blemish.models.places.{name}", limit)
    model = fitted(PlaceNearest, SIZE, bank=40, projection="none", dimensions=None, shrinkage=0.05)
    normal, new = (standardised(model, x) for x in (tiles(), tiles(2, 8)))
    residual = L2()(*model(tiles(2, 8))[:2]) * FEATURES
    for row, column in ((0, 0), (3, 5), (7, 2)):
        seen = normal[:, row, column]
        inverse = np.linalg.inv(np.cov(seen.T) + 0.05 * np.eye(FEATURES))
        wanted = cdist(new[:, row, column], seen, "mahalanobis", VI=inverse).min(axis=1) ** 2
        np.testing.assert_allclose(residual[:, 0, row, column], wanted, rtol=0.05, atol=0.01)
    # What is remembered is expected exactly, but for float16.
    assert L2()(*model(tiles()[:3])[:2]).max() < 1e-4


def test_a_bank_of_places_holds_no_more_than_there_is():
    for count, bank in ((40, 7), (3, 7), (1, 2)):
        options = {"bank": bank, "projection": "none", "dimensions": None}
        model = fitted(PlaceNearest, SIZE, normal=tiles(count), **options)
        assert model.bank.shape == (SIDE * SIDE, min(count, bank), FEATURES)
        own = L2()(*model(tiles(count))[:2]).amax(dim=(1, 2, 3))
        assert int((own < 1e-3).sum()) == min(count, bank)
        fresh = PlaceNearest(model.backbone, SIZE, **options)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(tiles(2, 8)).expected, model(tiles(2, 8)).expected)


def test_a_bank_of_other_features_is_refused():
    model = fitted(PlaceNearest, SIZE, projection="none", dimensions=None)
    state = model.state_dict()
    for damaged in (state["bank"][:, :, 1:], state["bank"][1:]):
        with pytest.raises(RuntimeError, match="size mismatch for bank"):
            model.load_state_dict(state | {"bank": damaged})


def test_a_covariance_of_fewer_tiles_than_features_takes_little_shrinkage():
    model = fitted(PlaceGaussian, SIZE, projection="none", dimensions=None, shrinkage=1e-9, normal=tiles(2))
    assert torch.isfinite(L2()(*model(tiles(2, 8))[:2])).all()


def test_global_gaussian_is_mahalanobis_everywhere():
    model = fitted(GlobalGaussian, shrinkage=0.02)
    normal, new = (standardised(model, x) for x in (tiles(), tiles(2, 8)))
    values = normal.reshape(-1, FEATURES)
    inverse = np.linalg.inv(np.cov(values.T, bias=True) + 0.02 * np.eye(FEATURES))
    residual = L2()(*model(tiles(2, 8))[:2]) * FEATURES
    wanted = [mahalanobis(row, values.mean(axis=0), inverse) ** 2 for row in new.reshape(-1, FEATURES)]
    np.testing.assert_allclose(residual.flatten(), wanted, rtol=0.02)


def test_one_place_after_another_gives_the_same(monkeypatch):
    at_once = fitted(PlaceGaussian, SIZE, projection="none", dimensions=None)
    everywhere = fitted(GlobalGaussian)
    for module in ("places", "features"):
        monkeypatch.setattr(f"blemish.models.{module}._MOST_VALUES", 40 * FEATURES * 3)
    for whole, parted in (
        (at_once, fitted(PlaceGaussian, SIZE, projection="none", dimensions=None)),
        (everywhere, fitted(GlobalGaussian)),
    ):
        torch.testing.assert_close(whole.whitening, parted.whitening, atol=1e-3, rtol=1e-3)


def test_a_single_normal_tile_is_enough_to_be_finite():
    model = fitted(PlaceGaussian, SIZE, projection="none", dimensions=None, normal=tiles(1))
    assert torch.isfinite(model(tiles(2)).observed).all()


def test_places_are_of_one_size():
    model = PlaceGaussian(Tiny(), SIZE, projection="none", dimensions=None)
    assert PlaceGaussian.whole_image and not GlobalGaussian.whole_image
    with pytest.raises(ConfigError, match=r"grid of 8 x 8 places, the tile has 16 x 16: set image\.size"):
        model(torch.rand(1, 1, 64, 64))
    with pytest.raises(ConfigError, match=r"model\.shrinkage > 0, found 0"):
        GlobalGaussian(Tiny(), 0)


# --- from features to pixels


class Given(nn.Module):
    """Compares grids that are given, whatever the tile."""

    def __init__(self, **parts):
        super().__init__()
        self.output = Output(torch.ones(1, 2, 2, 2), torch.zeros(1, 2, 2, 2), **parts)

    def forward(self, x):
        return self.output


def test_a_coarse_residual_is_enlarged_to_the_tile():
    model, x = fitted(NearestFeature, 50), tiles(2, 4)
    score = ResidualScore(L2())
    output = model(x)
    coarse = L2()(output.observed, output.expected)
    wanted = F.interpolate(coarse, (SIZE, SIZE), mode="bilinear", align_corners=False)
    told, expected = score.explain(model, x)
    assert torch.equal(told, wanted)
    assert torch.equal(expected, output.expected)


def test_valid_and_spread_of_a_coarse_grid_reach_the_pixels():
    valid = torch.tensor([[[[True, True], [False, True]]]])
    spread = torch.full((1, 1, 2, 2), 4.0)
    told = ResidualScore(L1())(Given(valid=valid, spread=spread), torch.zeros(1, 1, 8, 8))
    assert (told[..., 6:, :2] == 0).all() and (told[..., 0, :] == 0.25).all() and (told[..., :, 7] == 0.25).all()
    assert compared(torch.ones(1, 1, 8, 8), Output(valid, valid)).sum() == 64


def test_a_gradient_reaches_the_pixels_through_a_backbone():
    told = InputGradientScore(L2())(fitted(NearestFeature, 50), tiles(2, 4))
    assert told.shape == (2, 1, SIZE, SIZE) and told.max() > 0


@pytest.mark.parametrize("residual", [SSIM(), WeightedSum([L1(), SSIM()])])
def test_a_residual_for_pixels_is_refused_for_features(residual):
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(
        ConfigError, match=r"compares pixels, and the model features of shape \(2, 2, 2\): set score=residual resid"
    ):
        ResidualScore(residual)(Given(), x)
    with pytest.raises(ConfigError, match="compares pixels"):
        residual_tile(residual, Given().output, x)


def test_no_warning_in_plain_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(NearestFeature, 50)(tiles(1))
