"""Every model with its score, and every score with a model, scores the same once exported, or says why it cannot be."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch

from blemish.build import TRUSTED, build
from blemish.checkpoint import assemble, build_model
from blemish.data.corruption import CutPaste
from blemish.engines.description import Description
from blemish.engines.load import FILES, PROGRAMS, load_exported
from blemish.errors import ConfigError, ExportError
from blemish.export import writing
from blemish.export.graph import check_exportable, input_shape, tiles_at_once, trace
from blemish.export.parity import TOLERANCE
from blemish.models.contracts import Contrasting, Fittable, Preparing, observed_by
from blemish.scores.contracts import FittableScore, learning_parts
from blemish.settings import config_folder

MODELS, SCORES, RESIDUALS = (
    [path.stem for path in sorted((config_folder() / group).glob("*.yaml"))] for group in ("model", "score", "residual")
)
SIZE = 48  # the least that MS-SSIM takes
SMALL = {"width": 4, "depth": 2, "steps": 4, "batch_size": 64, "samples": 100, "trees": 10, "bank": 50, "templates": 2}
PLAIN = ("image.channels=1", "image.short_side=null")
SMALL_BACKBONE = ("backbone.weights=none", "backbone.layers=[2,8]", "backbone.margin=0")
FITTING = ("conv_ae", "vae", "repair_ae", "ganomaly", "kde")  # one of them suits a score
SAYING_NO = ("golden_template", "template_bank")
SCORES_SAYING_NO = ("input_gradient", "projection", "grad_cam", "monte_carlo", "noise_draws", "inpainting")

needs_packages = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime", "openvino")),
    reason="pip install 'blemish[export]'",
)


def slow_but(names, quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def tiles(count, seed=0):
    """Smooth, with noise on them, so that no score is 0 everywhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1)
    return (0.8 * smooth + 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=generator)).contiguous()


@pytest.fixture(scope="module")
def make(settings, installed):
    """A detector whose model and score have learned something."""

    def build_detector(model, *words):
        composed = settings(f"model={model}", f"tiling.size={SIZE}", *PLAIN, *SMALL_BACKBONE, *words)
        composed["model"] |= {key: value for key, value in SMALL.items() if composed["model"].get(key)}
        with installed():
            torch.manual_seed(0)
            network = build_model(composed, TRUSTED)
            score = build(composed["score"], TRUSTED, "score")
        x = tiles(16, seed=1)
        if isinstance(network, Contrasting):
            network.contrast_with(CutPaste(1.0))
        if isinstance(network, Fittable):
            network.fit([x])
        else:
            if isinstance(network, Preparing):
                network.prepare([x])
            optimizer = torch.optim.Adam(network.parameters(), 0.003)
            for _ in range(5):
                output = network.train()(x)
                loss = (output.expected - observed_by(network, x)).square().mean() + (output.penalty or 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for part in learning_parts(score):
            part.learn(network.eval(), [x])
        if isinstance(score, FittableScore):
            score.fit(network.eval(), [x])
        return assemble(composed, network.eval(), score=score)

    return build_detector


@pytest.fixture
def assert_exports(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_onnx", cache(writing._onnx))  # OpenVINO's way leads over ONNX

    def check(detector, any_size=False):
        try:
            check_exportable(detector)
        except ExportError as refusal:
            sentence = str(refusal)
            assert "cannot be exported, because it" in sentence and "engine=torch" in sentence
            assert sentence.count(". ") == 0
            return None
        program = trace(detector, any_size)
        assert input_shape(program)[:2] == [None, 1]
        text = Description.of(detector, {}, tiles_at_once(program, 32)).to_text()
        for form, name in FILES.items():
            writing.write(form, program, text, tmp_path / name)
            exported = load_exported(tmp_path / name, trusted=[PROGRAMS]).scorer
            for count in (1, 3):
                x = tiles(count).numpy()
                before, after = detector.scorer(x), exported(x)
                assert after.shape == before.shape and after.dtype == before.dtype
                assert abs(after - before).max() <= TOLERANCE * before.max(), (form, count)
                before, after = detector.scorer.explain(x), exported.explain(x)
                assert after.shape == before.shape
                assert abs(after - before).max() <= TOLERANCE * abs(before).max(), (form, count)
        return program

    return check


@needs_packages
@pytest.mark.parametrize("model", slow_but(MODELS, SAYING_NO))
def test_every_model_scores_the_same_or_says_why_not(make, assert_exports, model):
    assert (assert_exports(make(model)) is None) is (model in SAYING_NO)


@needs_packages
@pytest.mark.parametrize("score", slow_but(SCORES, SCORES_SAYING_NO))
def test_every_score_is_the_same_or_says_why_not(make, assert_exports, score):
    for model in FITTING:
        try:
            detector = make(model, f"score={score}")
            break
        except ConfigError as misfit:
            refusal = misfit
    else:
        raise refusal
    assert (assert_exports(detector) is None) is (score in SCORES_SAYING_NO)


@needs_packages
@pytest.mark.slow
@pytest.mark.parametrize("residual", RESIDUALS)
def test_every_residual_is_the_same(make, assert_exports, residual):
    assert_exports(make("conv_ae", "score=residual", f"residual={residual}"))


@needs_packages
@pytest.mark.slow
def test_a_convolutional_model_takes_tiles_of_any_size_that_it_took_before(make, assert_exports, tmp_path):
    detector = make("conv_ae")
    assert input_shape(assert_exports(detector, any_size=True)) == [None, 1, None, None]
    x = torch.nn.functional.interpolate(tiles(2), (64, 48)).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / FILES["onnx"], providers=["CPUExecutionProvider"])
    before, after = detector.scorer(x), session.run(["score"], {"tiles": x})[0][:, 0]
    assert abs(after - before).max() <= TOLERANCE * before.max()


@pytest.mark.slow
def test_a_model_with_a_flat_code_takes_the_size_that_it_was_made_for(make):
    assert input_shape(trace(make("conv_ae", "model.latent=flat"))) == [None, 1, SIZE, SIZE]


def test_nested_parts_are_asked_too(make):
    words = ["score=flips", "+score.score.draws=2", "score.score._target_=blemish.scores.variational.MonteCarloScore"]
    with pytest.raises(ExportError, match="MonteCarloScore cannot be exported, because it draws"):
        check_exportable(make("vae", *words))


def test_a_graph_that_holds_much_gets_fewer_tiles_at_once(monkeypatch):
    class Wide(torch.nn.Module):
        def forward(self, tiles):
            return tiles.expand(-1, 64, -1, -1) + 1

    program = torch.export.export(
        Wide(), (torch.rand(2, 1, 8, 8),), dynamic_shapes={"tiles": {0: torch.export.Dim("b")}}
    )
    assert tiles_at_once(program, 32) == 32
    monkeypatch.setattr("blemish.export.graph._MOST_VALUES", 5 * 64 * 8 * 8)
    assert tiles_at_once(program, 32) == 5
    monkeypatch.setattr("blemish.export.graph._MOST_VALUES", 7)
    assert tiles_at_once(program, 32) == 1


def test_what_does_not_grow_with_the_tiles_does_not_count(monkeypatch):
    class Remembering(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("bank", torch.zeros(1000, 1000, dtype=torch.float16))

        def forward(self, tiles):
            return tiles + self.bank.float().max()

    program = torch.export.export(
        Remembering(), (torch.rand(2, 1, 8, 8),), dynamic_shapes={"tiles": {0: torch.export.Dim("b")}}
    )
    monkeypatch.setattr("blemish.export.graph._MOST_VALUES", 5 * 8 * 8)
    assert tiles_at_once(program, 32) == 5


def test_a_model_that_no_exporter_follows_is_refused_in_a_sentence(make):
    detector = make("conv_ae", "score=residual")

    class Counting(type(detector.scorer.model)):
        def forward(self, x):
            return super().forward(x * float(x.mean()))

    detector.scorer.model.__class__ = Counting
    with pytest.raises(ExportError, match="PyTorch's exporter cannot follow its model or score"):
        trace(detector)
