"""What every detector that is trained by gradients has to do: two processes train as one, one image is learned by
heart, a batch of one trains, trained weights load, and a checkpoint of something else is one line."""

import pytest
import torch
from torch import Tensor, nn

from models.anomaly import DETECTORS, DetectorConfig, build_detector
from models.anomaly.detector import Detector, TrainingBatch
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.processes import run_processes

OPTIONS: dict[str, dict] = {  # what makes such a detector small; one without a line here has its defaults
    "cdo": {},
    "cutpaste": {},
    "cflow": {"stages": (2, 3), "blocks": 2, "fiber": 4},
    "nsa": {},
    "rd4ad": {},
    "regad": {},
}
SIZE = {"nsa": 64, "rd4ad": 64}  # of its images, where 32 x 32 is not enough
RATE = {}  # of Adam, where one image is overfit at another one than 1e-3
IN_COMPANY = {"regad"}  # those that compare the images of a batch, so that one alone is a mistake
NAMES = [name for name, detector in DETECTORS.items() if detector.by_gradient]


def build(name: str) -> Detector:
    torch.manual_seed(2)
    return DETECTORS[name](ResNet18(), **OPTIONS.get(name, {}))


def raw_images(name: str, count: int = 4) -> Tensor:
    """Stripes with noise: uint8 (count, 3, S, S), the same in every process."""
    generator, size = torch.Generator().manual_seed(4), SIZE.get(name, 32)
    stripes = 128 + 50 * torch.sin(torch.arange(size) / 2).expand(count, 3, size, size)
    return (stripes + 10 * torch.randn(stripes.shape, generator=generator)).to(torch.uint8)


def steps(name: str, detector: Detector, part: slice = slice(None), epoch: int = 0) -> list[tuple]:
    """The inputs of the steps for these of 4 images, as a loader would give them."""
    images, ids = raw_images(name)[part], torch.arange(4)[part]
    return detector.steps(TrainingBatch(images, torch.zeros(len(ids), dtype=torch.int64), ids, epoch, 0))


def doubled(inputs: tuple) -> list:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def trained(rank: int, world_size: int, name: str) -> dict[str, Tensor]:
    """Parameters after an epoch of plain SGD in float64, without batch norm: it sees one process's part only."""
    detector = build(name).double().train()

    def features(images: Tensor) -> list[Tensor]:  # in float64
        maps = detector.backbone.forward_stages(images.double(), max(detector.stages))
        return [maps[stage - 1].detach() for stage in detector.stages]

    detector.features = features
    for place, module in list(detector.named_modules()):
        if detector.frozen and place.startswith("backbone"):
            continue  # its batch norm never sees a batch
        for child, norm in list(module.named_children()):
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(module, child, nn.Identity())
    model = detector
    if world_size > 1:
        model = nn.parallel.DistributedDataParallel(detector, find_unused_parameters=detector.partial)
    optimizer = torch.optim.SGD([p for p in detector.parameters() if p.requires_grad], lr=1e-3)
    mine = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    for inputs in steps(name, detector, mine):
        loss, stats = model(*doubled(inputs))
        assert all(value.ndim == 0 for value in stats.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: p.detach() for n, p in detector.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_on_different_images_train_as_one(name):
    start = {n: p.detach() for n, p in build(name).double().named_parameters()}
    expected = trained(0, 1, name)
    assert any(not torch.equal(expected[n], start[n]) for n in expected if n in start)
    for parameters in run_processes(trained, 2, name):
        assert parameters.keys() == expected.keys()
        for key, value in parameters.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 4])
def test_one_image_is_overfit(name, count):
    """Alone, in batches of one, and four times; with the same defects in each epoch."""
    detector, image = build(name).train(), raw_images(name, 1).expand(count, -1, -1, -1).contiguous()
    optimizer = torch.optim.Adam([p for p in detector.parameters() if p.requires_grad], lr=RATE.get(name, 1e-3))
    labels, losses = torch.zeros(count, dtype=torch.int64), []
    if count == 1 and name in IN_COMPANY:
        with pytest.raises(UserError, match="batch_size to at least 2"):
            next(detector.steps(TrainingBatch(image, labels, torch.arange(count), 0, 0)))
        return
    for _ in range(15):
        for inputs in detector.steps(TrainingBatch(image, labels, torch.arange(count), 0, 0)):
            loss, _ = detector(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    part = max(1, len(losses) // 5)
    assert sum(losses[-part:]) < 0.8 * sum(losses[:part]) or sum(losses[-part:]) < 0 < sum(losses[:part])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_a_gradient_in_vain(name):
    """DistributedDataParallel waits for every trainable parameter, unless the detector says `partial`."""
    detector = build(name).train()
    for inputs in steps(name, detector):
        detector(*inputs)[0].backward()
    idle = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle
    moving = {n for n, p in detector.named_parameters() if p.requires_grad}
    assert moving and (not detector.frozen or not any(n.startswith("backbone.") for n in moving))


@pytest.mark.parametrize("name", NAMES)
def test_trained_weights_load_and_others_are_refused(name, tmp_path):
    detector = build(name).train()
    for inputs in steps(name, detector):
        detector(*inputs)
    torch.save({"config": {"detector": {"name": name}}, "model": detector.state_dict()}, tmp_path / "last.pt")
    config = DetectorConfig(name=name, weights=str(tmp_path / "last.pt"), options=OPTIONS.get(name, {}))
    fresh, where = build_detector(config, ResNet18())
    assert where == f" from {tmp_path}/last.pt"
    for key, value in detector.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value), key
    torch.save({"config": {"detector": {"name": "other"}}, "model": {}}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=f"is a run of other, not {name}"):
        build_detector(config, ResNet18())
    torch.save({"something": torch.zeros(1)}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="does not fit"):
        build_detector(config, ResNet18())


def test_what_has_nothing_to_train_takes_no_weights(tmp_path):
    torch.save({}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="has nothing to train"):
        build_detector(DetectorConfig(name="patchcore", weights=f"{tmp_path}/last.pt"), ResNet18())


def test_an_official_rd4ad_checkpoint_loads(tmp_path):
    theirs, ours = build("rd4ad"), build("rd4ad")
    nn.init.constant_(theirs.bn.conv1.weight, 0.5)
    torch.save({part: getattr(theirs, part).state_dict() for part in ("bn", "decoder")}, tmp_path / "official.pth")
    config = DetectorConfig(name="rd4ad", weights=str(tmp_path / "official.pth"))
    loaded, _ = build_detector(config, ResNet18())
    assert (loaded.bn.conv1.weight == 0.5).all() and torch.equal(
        loaded.decoder.layer1[0].conv1.weight, ours.decoder.layer1[0].conv1.weight
    )
