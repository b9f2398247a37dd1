"""A backbone knows its normalization, and whoever gives it images reads it there."""

import ast

import pytest
import torch
from torch import Tensor

import scavenge
from data.augment.negatives import DefectiveView
from data.augment.patch_grid import PatchGrid
from data.augment.recipes import RECIPES
from data.augment.spd_views import SpotTheDifference
from data.augment.views import Augment
from data.datasets.folder import ClassFolder
from data.defects import DEFECTS
from data.geometry import Geometry
from data.loading import Loader
from data.normalize import HALF, IMAGENET, Normalization, normalization_of, normalize, unnormalize
from evaluation.anomaly.detection import batches_of, examine_set
from evaluation.anomaly.prediction import LoadedImage, examine
from evaluation.anomaly.tiling import examine_tiles
from evaluation.features import extract
from models.anomaly import DETECTORS
from models.anomaly.detector import TrainingBatch
from models.backbones import BACKBONES
from models.backbones.build import BackboneConfig, build_backbone, normalization_from
from runtime import config
from runtime.errors import UserError
from tests.images import TOP, write_classes
from tests.test_rooms import FILES

ODD = Normalization((0.3, 0.2, 0.6), (0.5, 0.4, 0.7))
IMAGES = torch.randint(0, 256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
OPTIONS = {
    "cflow": {"stages": (2, 3), "blocks": 2, "fiber": 4},
    "padim": {"channels": 20},
    "patchcore": {"coreset": 1.0},
}
PIXELS = {"rtol": 0, "atol": 1e-5}


class Watched(BACKBONES["efficientnet_lite0"]):
    """Keeps what reaches it."""

    def __init__(self):
        super().__init__()
        self.seen: list[Tensor] = []

    def forward_stages(self, x: Tensor, last: int = 4, after=None) -> list[Tensor]:
        self.seen.append(x.detach().clone())
        return super().forward_stages(x, last, after)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return super().forward(x)


def watched() -> Watched:
    torch.manual_seed(0)
    return Watched().eval()


def test_each_backbone_says_what_it_takes():
    wanted = {name: HALF if "efficientnet_lite" in name else IMAGENET for name in BACKBONES}
    assert {name: normalization_of(build) for name, build in BACKBONES.items()} == wanted
    half = normalize(IMAGES, HALF)
    assert torch.equal(half, (IMAGES / 255 - 0.5) / 0.5) and half.min() == -1 and half.max() == 1
    torch.testing.assert_close(unnormalize(normalize(IMAGES, ODD), ODD), IMAGES / 255)


def test_the_yaml_decides():
    def built(**section):
        settings = config.build(BackboneConfig, {"name": "mobilenet_v2", "width": "0.1", **section}, "backbone.")
        backbone = build_backbone(settings)[0]
        assert normalization_of(backbone) == normalization_from(settings)
        return normalization_of(backbone)

    assert built() == IMAGENET
    assert built(mean="0.3,0.2,0.6", std="0.5,0.4,0.7") == ODD
    assert built(mean="0,0,0") == Normalization((0, 0, 0), IMAGENET.std)
    assert built(std="0.5,0.5,0.5") == Normalization(IMAGENET.mean, HALF.std)
    lite = config.build(BackboneConfig, {"name": "efficientnet_lite0", "mean": "0.485,0.456,0.406"}, "backbone.")
    assert normalization_from(lite) == Normalization(IMAGENET.mean, HALF.std)
    for section in ({"mean": "1.2,0,0"}, {"std": "0,1,1"}, {"mean": "0.5"}):
        with pytest.raises(UserError, match=r"^backbone\.(mean|std)"):
            built(**section)


@pytest.mark.parametrize("method", [name for name in DETECTORS if name != "regad"])
def test_detectors_train_on_what_their_backbone_takes(method):
    """The first step's images, whatever defects they have, are pixels in [0, 1] again when Lite's numbers are undone;
    ImageNet's would take them out of that range."""
    net = watched()
    detector = DETECTORS[method](net, **OPTIONS.get(method, {}))
    net.seen.clear()
    assert detector.normalization == HALF
    if detector.by_gradient:
        torch.manual_seed(0)
        batch = TrainingBatch(IMAGES, torch.zeros(4, dtype=torch.int64), torch.arange(4), 0, 0)
        inputs = next(iter(detector.steps(batch)))
        seen = net.seen[0] if net.seen else inputs[0]  # cflow's encoder sees the batch before the step
        levels = (seen + 1) * 127.5
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)  # bytes
        assert (seen.amin(), seen.amax()) == (-1, 1)
    detector.rehearse(IMAGES[0], batch_size=4, training=False, seed=0)
    assert torch.equal(net.seen[-1], normalize(IMAGES[:1], HALF))


def test_regad_gives_pixels_between_0_and_1_to_any_backbone():
    net = watched()
    detector = DETECTORS["regad"](net)
    for images in (normalize(IMAGES, HALF), normalize(IMAGES, detector.normalization)):
        detector.eval().networks(images)
        torch.testing.assert_close(net.seen[-1], IMAGES / 255)
    own = build_backbone(config.build(BackboneConfig, {"name": "resnet18", "mean": "0.5,0.5,0.5"}))[0]
    with pytest.raises(UserError, match=r"in \[0, 1\], as the official code: remove backbone\.mean and backbone\.std"):
        DETECTORS["regad"](own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("normalization"), classes=2, each=3, size=64)


def test_images_are_given_to_it_as_it_takes_them(folder):
    """On every way from a file to a backbone: its features, and a detector's fit, test, prediction and tiles."""
    net = watched()
    loader = Loader(ClassFolder("train", 64, root=folder), 6, torch.device("cpu"))
    images = next(iter(loader.epoch(0)))[0]
    expected = (images / 255 - 0.5) / 0.5
    for normalization in (HALF, ODD):
        net.normalization = normalization
        expected = normalize(images, normalization)
        detector = DETECTORS["patchcore"](net, coreset=1.0)
        detector.fit(batches_of(loader, "features", detector.normalization), len(images))
        assert torch.equal(net.seen[-1], expected)
        examine_set(detector, loader, "images")
        assert torch.equal(net.seen[-1], expected)
        extract(net, loader)
        assert torch.equal(net.seen[-1], expected)
        examine_tiles(detector, images[0], tile=64, overlap=32, batch_size=2, device=torch.device("cpu"))
        assert torch.equal(net.seen[-1], expected[:1])
        items = (LoadedImage("a.png", (64, 64), Geometry(64, 64), image) for image in images[:2])
        list(examine(detector, items, torch.device("cpu"), batch_size=2, precision="fp32"))
        assert torch.equal(net.seen[-1], expected[:2])


def test_scavenge_gives_it_images_as_it_takes_them(monkeypatch, tmp_path):
    torch.save(watched().state_dict(), tmp_path / "lite.pth")
    monkeypatch.setitem(BACKBONES, "efficientnet_lite0", Watched)
    for options, wanted in (({}, HALF), ({"mean": ODD.mean, "std": ODD.std}, ODD)):
        loaded = scavenge.load_backbone(
            tmp_path / "lite.pth", name="efficientnet_lite0", size=64, device="cpu", **options
        )
        loaded(IMAGES)
        torch.testing.assert_close(loaded.network.seen[0], normalize(IMAGES, wanted), **PIXELS)


@pytest.mark.parametrize("kind", ["views", "defect", "spd", "patches"])
def test_views_are_the_same_pixels_under_every_normalization(kind):
    ids, made = torch.arange(4), {}
    for normalization in (IMAGENET, ODD):
        augment = Augment(RECIPES["simclr"](size=32), 0, normalization=normalization)
        if kind == "defect":
            augment = DefectiveView(augment, DEFECTS["scar"]())
        elif kind == "spd":
            augment = SpotTheDifference(augment, DEFECTS["smooth_blend"]())
        elif kind == "patches":
            augment = PatchGrid(0, normalization, size=12, gap=4, jitter=2)
        mean = torch.zeros(3) if kind == "patches" else torch.tensor(normalization.mean)  # whose patches have mean 0
        std = torch.tensor(normalization.std)[:, None, None]
        made[normalization] = [view * std + mean[:, None, None] for view in augment(IMAGES, ids, 3)]
    for ours, theirs in zip(made[ODD], made[IMAGENET]):
        torch.testing.assert_close(ours, theirs, **PIXELS)
    assert len(made[ODD]) == {"views": 2, "defect": 3, "spd": 5, "patches": 9}[kind]


def test_nothing_here_normalizes_without_saying_by_what():
    """A second argument, in every script and module: the default is for programs of one's own."""
    silent = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("normalize", "unnormalize") and len(node.args) + len(node.keywords) < 2:
                silent.append(f"{path.relative_to(TOP)}:{node.lineno}")
    assert not silent
