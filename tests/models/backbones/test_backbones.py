"""What every backbone promises: shapes, gradients, precisions, and a place in pretraining and in detectors."""

import inspect

import pytest
import torch
from torch import nn

from data.normalize import normalize
from models.anomaly import DETECTORS
from models.anomaly.detector import TrainingBatch
from models.backbones import BACKBONES
from models.backbones.cbam import SpatialGate
from models.backbones.convnext import ConvNeXtBlock
from models.backbones.stages import stage_shapes
from models.backbones.vit import ViT
from models.ssl import SSL_METHODS
from models.ssl.dino import DINO
from models.ssl.simclr import SimCLR
from runtime.errors import UserError
from tests.images import batches
from tests.models.ssl.test_methods import CASES
from tests.processes import run_processes

SMALL = {  # one of each family and version, made small where it can be
    "resnet18": {},
    "resnet50": {},
    "cbam_resnet18": {},
    "unet_resnet18": {},
    "mobilenet_v2": {"width": 0.25},
    "mobilenet_v3_large": {"width": 0.35},
    "mobilenet_v3_small": {},
    "efficientnet_b0": {},
    "efficientnet_lite0": {},
    "convnext_atto": {},
    "convnextv2_atto": {},
    "vit_tiny": {"size": 64, "patch": 8},
}
smoke = pytest.mark.parametrize("name", SMALL)


def build(name: str, **options) -> nn.Module:
    """With weights that let every branch be seen: V1's layer scale and CBAM's gates hide theirs at the start."""
    torch.manual_seed(0)
    net = BACKBONES[name](**SMALL[name], **options)
    for module in net.modules():
        if isinstance(module, ConvNeXtBlock) and module.gamma is not None:
            nn.init.ones_(module.gamma)
        elif isinstance(module, SpatialGate):
            nn.init.ones_(module.bn.weight)
    return net


@pytest.mark.parametrize("name", BACKBONES)
def test_stages_and_features_have_the_promised_shapes(name):
    with torch.device("meta"):
        backbone = BACKBONES[name]().eval()
        maps = backbone.forward_stages(torch.zeros(2, 3, 64, 96))
        assert backbone(torch.zeros(2, 3, 64, 96)).shape == (2, backbone.num_features)
        assert BACKBONES[name](num_classes=7).eval()(torch.zeros(2, 3, 64, 96)).shape == (2, 7)
    strides = [16] * 4 if isinstance(backbone, ViT) else [4, 8, 16, 32]
    channels = backbone.stage_channels
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, strides)]


@smoke
def test_stage_shapes_change_nothing(name):
    net = build(name).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    assert len(stage_shapes(net, 3)) == 3 and net.training
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


@smoke
def test_gradient_reaches_every_parameter(name):
    model = build(name, num_classes=3)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not missing


@pytest.mark.parametrize("name", [name for name in SMALL if name != "unet_resnet18"])
def test_what_is_done_after_a_stage_reaches_the_next_one(name):
    backbone, images, seen = build(name).eval(), torch.randn(1, 3, 64, 64), []

    def after(stage, x):
        seen.append((stage, x.shape[1]))
        return x * 2 if stage == 2 else x

    with torch.no_grad():
        plain, changed = backbone.forward_stages(images), backbone.forward_stages(images, last=3, after=after)
    assert all(torch.equal(a, b) for a, b in zip(backbone.forward_stages(images, last=3), plain))
    assert not torch.allclose(changed[2], plain[2], atol=0)
    assert seen == list(zip((1, 2, 3), backbone.stage_channels))
    assert torch.equal(changed[0], plain[0]) and torch.equal(changed[1], 2 * plain[1])


@smoke
def test_channels_last_bf16_and_float64_agree(name):
    backbone = build(name).eval()
    images = torch.randn(2, 3, 64, 48)
    with torch.no_grad():
        exact = backbone.double()(images.double())
        single = backbone.float()(images)
        last = backbone.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", torch.bfloat16):
            half = backbone(images)
    assert exact.dtype == torch.float64
    assert half.shape == exact.shape
    scale = exact.abs().max().item()
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(last.double(), exact, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(half.double(), exact, rtol=0, atol=0.05 * scale)


@smoke
@pytest.mark.parametrize("method", ["simclr", "dino"])
def test_pretraining_changes_it(name, method):
    net = build(name, **({"drop_path": 0.1} if "drop_path" in inspect.signature(BACKBONES[name]).parameters else {}))
    method = SimCLR(net, out=8) if method == "simclr" else DINO(net, prototypes=16, hidden=16, bottleneck=8)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.01)
    images = torch.randn(4, 3, 64, 64)
    before = {n: p.clone() for n, p in net.named_parameters()}
    for step in range(2):
        method.set_epoch(1)
        loss, _ = method([images, images.flip(3) + 0.1 * step], torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    still = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert not still


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cbam_resnet18", "mobilenet_v3_small", "convnextv2_atto", "vit_tiny", "unet_resnet18"]
)
@pytest.mark.parametrize("method", [method for method in SSL_METHODS if method not in ("simclr", "dino")])
def test_every_method_takes_it(method, name):
    """RevD, which needs maps that halve each other, says so to a ViT."""
    net = build(name)
    if (method, name) == ("revd", "vit_tiny"):
        with pytest.raises(UserError, match="maps that halve each other"):
            SSL_METHODS[method](net)
        return
    model = SSL_METHODS[method](net, **CASES[method])
    number = 9 if method == "patch_position" else model.takes[0]
    size = 32 if method == "patch_position" else 64
    loss, _ = model([torch.randn(8, 3, size, size) for _ in range(number)], torch.tensor([0, 1, 2, 0, 3, 1, 0, 2]))
    loss.backward()
    model.after_step(1.0)
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


DETECTOR_OPTIONS = {
    "cflow": {"stages": (2, 3), "blocks": 2, "fiber": 4},
    "padim": {"channels": 20},
    "patchcore": {"coreset": 0.5},
}
REFUSED = {
    ("rd4ad", "vit_tiny"): "maps that halve each other",
    ("nsa", "vit_tiny"): "enlarges the backbone's last",
    ("regad", "unet_resnet18"): "does not allow",
}


QUICK = {("patchcore", name) for name in SMALL} | {(method, "vit_tiny") for method in DETECTORS}


@pytest.mark.parametrize(
    "method, name",
    [
        pytest.param(method, name, marks=() if (method, name) in QUICK else pytest.mark.slow)
        for method in DETECTORS
        for name in SMALL
    ],
)
def test_detectors_learn_and_score_with_it(method, name):
    """Every detector with every family, but for those whose own networks need maps that halve each other, and
    RegAD, which works between the stages."""
    net = build(name)
    if (method, name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[method, name]):
            DETECTORS[method](net)
        return
    detector = DETECTORS[method](net, **DETECTOR_OPTIONS.get(method, {}))
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    if detector.by_gradient:
        detector.train()
        batch = TrainingBatch(images, torch.zeros(4, dtype=torch.int64), torch.arange(4), 0, 0)
        for number, inputs in enumerate(detector.steps(batch)):
            loss, _ = detector(*inputs)
            assert loss.isfinite()
            loss.backward()
            if number == 1:
                break
        gradients = [p.grad for p in detector.parameters() if p.grad is not None]
        assert sum(g.abs().sum() for g in gradients) > 0
    detector.eval()
    if detector.fits:
        detector.fit(batches(normalize(images), 2), 4)
    maps, scores = detector.score(normalize(images))
    assert scores.shape == (4,) and scores.isfinite().all()
    assert maps is None or (maps.shape == (4, 64, 64) and maps.isfinite().all())


@pytest.mark.slow
@smoke
def test_compiled_it_gives_the_same(name):
    net = build(name).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = net(images)
        torch.testing.assert_close(torch.compile(net)(images), expected, rtol=1e-4, atol=1e-4)


def distributed_gradients(rank, world_size, name):
    net = nn.parallel.DistributedDataParallel(build(name).double().eval())  # eval: no batch norm that sees one shard
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)[rank::world_size]
    net(images).square().mean().backward()
    return {n: p.grad for n, p in net.module.named_parameters()}


@pytest.mark.slow
@smoke
def test_two_processes_give_one_process_gradients(name):
    (first, second), net = run_processes(distributed_gradients, 2, name), build(name).double().eval()
    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    net(images).square().mean().backward()
    for n, p in net.named_parameters():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(first[n], p.grad, rtol=0, atol=1e-10 * max(1, scale))
        assert torch.equal(first[n], second[n])
