"""Every detector, classifier and backbone as a program of torch.export, written, read and asked beside the live one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data.geometry import Geometry
from data.normalize import normalize
from evaluation.export.exported import Exported, load_exported
from evaluation.export.programs import BackboneProgram, ClassifierProgram, DetectorProgram, traced, write
from models.anomaly import DETECTORS
from models.backbones import BACKBONES
from models.backbones.resnet import ResNet18
from models.classifier import Classifier
from models.heads import mlp
from runtime.errors import UserError
from tests.images import batches

OPTIONS: dict[str, list[dict]] = {  # forms that compute in other ways
    "cflow": [{"blocks": 2}],
    "cdo": [{"version": "v1"}, {"version": "v2"}],
    "cutpaste": [{"density": "gaussian"}, {"density": "kde", "image_score": "max"}],
    "embedding": [
        {"distance": "knn_squared", "k": 3, "stages": (2, 4), "combine": "sum"},
        {"distance": "mahalanobis", "stages": (1, 2), "combine": "sum"},
        {"source": "output", "normalize": True},
    ],
    "padim": [{"channels": 20}, {"form": "low_rank", "image_score": "top1"}, {"form": "covariance", "channels": 30}],
    "patchcore": [
        {"mode": "paper", "coreset": 0.1},
        {"mode": "amazon", "embed_dim": 32, "coreset": 0.1},
        {"mode": "anomalib", "coreset": 1.0, "image_score": "mean"},
    ],
    "subspace": [{"variance": 0.9}, {"stages": (3,), "combine": "mean", "image_score": "max"}],
}
CASES = [(name, options) for name in DETECTORS for options in OPTIONS.get(name, [{}])]
THRESHOLDS = {"threshold": 1.0, "pixel_threshold": None, "low": None, "high": None, "scores": None}


def pixels(count: int, size: int = 64) -> Tensor:
    """Stripes with noise: uint8 (count, 3, S, S)."""
    stripes = 128 + 50 * torch.sin(torch.arange(size) / 2).expand(count, 3, size, size)
    return (stripes + 10 * torch.randn(stripes.shape)).clamp(0, 255).to(torch.uint8)


def through_a_file(program: nn.Module, kind: str, folder: Path, *, masked: bool = False) -> Exported:
    geometry, path = Geometry(64, 64), folder / f"{kind}.pt2"
    settings = {"precision": "fp32", "data": {"tile": 0, "overlap": 0}}
    state = {"config": settings, "calibration": THRESHOLDS, "names": ["0.png"], "learned": []}
    with open(path, "wb") as file:
        about = {"kind": kind, "masked": masked, "geometry": geometry, "state": state}
        write(traced(program, geometry, masked=masked), about, file)
    return load_exported(path, kind)


def fitted(name: str, **options):
    """A detector with statistics in its batch norms, as after training."""
    torch.manual_seed(1)
    detector = DETECTORS[name](ResNet18(), **options)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    if name == "regad":  # transformers start as the identity
        for transformer in detector.transformers:
            nn.init.normal_(transformer.fc[2].weight, std=1e-3)
    detector.eval()
    if detector.fits:
        detector.fit(batches(normalize(pixels(8), detector.normalization), 4), 8)
    return detector.eval()


def require_equal(found, live, images: slice = slice(None)) -> None:
    """Of maps that are flat at their top the peak may lie elsewhere on it."""
    for name in ("scores", "maps", "peaks", "nearest_image"):
        theirs, ours = getattr(live, name), getattr(found, name)
        assert (theirs is None) == (ours is None), name
        if theirs is not None:
            theirs = theirs[images].double()
            if name == "peaks" and not torch.equal(ours.double(), theirs):
                y, x = ours.long().unbind(1)
                tops = live.maps[images]
                assert torch.allclose(tops[range(len(y)), y, x], tops.amax((1, 2)), rtol=1e-4)
                continue
            assert ours.shape == theirs.shape, name
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name


@pytest.mark.parametrize(
    ("name", "options"),
    [("patchcore", {"coreset": 0.1}), ("padim", {"channels": 20}), ("cutpaste", {}), ("cutpaste", {"density": "kde"})],
)
def test_what_is_traced_computes_the_same(name, options, monkeypatch):
    """Without tracing it, which takes seconds: the steps that stand in for those that depend on values."""
    detector, images = fitted(name, **options), pixels(3)
    live = detector.examine_pixels(images)
    detector.prepare_export()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    require_equal(detector.examine_pixels(images), live)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(CASES)])
def test_each_detector_says_the_same_in_batches_of_any_size(name, options, tmp_path):
    detector = fitted(name, **options)
    images = pixels(5)
    images[1, :, 20:30, 20:30] = 250
    live = detector.examine_pixels(images)
    assert live.scores.unique().numel() == 5
    exported = through_a_file(DetectorProgram(detector, "fp32"), "detector", tmp_path)
    for first, size in ((0, 5), (0, 1), (1, 1), (2, 2)):
        some = slice(first, first + size)
        require_equal(exported.examine_pixels(images[some]), live, some)
    require_equal(detector.examine_pixels(images), live)  # which is as it was


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, detector in DETECTORS.items() if not detector.positional])
def test_padding_is_left_out_as_live(name, tmp_path):
    detector = fitted(name)
    images, valid = pixels(4), torch.ones(4, 64, 64, dtype=torch.bool)
    valid[1, :, 40:] = valid[2, :16] = False
    exported = through_a_file(DetectorProgram(detector, "fp32"), "detector", tmp_path, masked=True)
    for some in (slice(None), slice(1, 2)):
        require_equal(exported.examine_pixels(images[some], valid[some]), detector.examine_pixels(images, valid), some)
    require_equal(exported.examine_pixels(images), detector.examine_pixels(images))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_classifier_s_probabilities_have_the_temperature(loss, tmp_path):
    classifier = Classifier(ResNet18(), mlp([512, 3], batch_norm=False)).eval()
    bank = nn.functional.normalize(torch.rand(7, 512))
    state = {"config": {"loss": {"name": loss}, "precision": "fp32"}, "calibration": {"temperature": 2.5}, "bank": bank}
    images = pixels(5)
    live = classifier.answering(state, torch.device("cpu"), "fp32")(images)
    exported = through_a_file(ClassifierProgram(classifier, state), "classifier", tmp_path).answering()
    for some in (slice(None), slice(3, 4)):
        for theirs, ours in zip(live, exported(images[some])):
            assert torch.allclose(ours, theirs[some], rtol=1e-4, atol=1e-6)
    scaled = live.logits / 2.5
    assert torch.allclose(live.probabilities, scaled.sigmoid() if loss == "bce" else scaled.softmax(1))
    without = ClassifierProgram(classifier, state | {"bank": None, "calibration": {"temperature": None}})
    found = without(images)
    assert found["scores"].isinf().all()
    assert not torch.allclose(found["probabilities"], live.probabilities, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "mobilenet_v3_small", "efficientnet_lite0", "convnext_atto", "vit_tiny"]
)
def test_backbones_of_each_family_give_their_features(name, tmp_path):
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    images = pixels(3)
    with torch.no_grad():
        live = BackboneProgram(backbone)(images)["features"]
    exported = through_a_file(BackboneProgram(backbone), "backbone", tmp_path)
    for some in (slice(None), slice(1, 2)):
        assert torch.allclose(exported(images[some])["features"], live[some], rtol=1e-4, atol=1e-5)


class Branching(nn.Module):
    """What torch.export cannot trace: it goes on by a value."""

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"scores": pixels.float().mean((1, 2, 3))} if pixels.sum() > 0 else {}


@pytest.mark.slow
def test_what_cannot_be_traced_is_one_line():
    with pytest.raises(UserError, match=r"^torch.export cannot trace Branching of this run: [^\n]*$"):
        traced(Branching(), Geometry(8, 8), masked=False)
