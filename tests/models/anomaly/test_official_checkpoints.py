"""Official checkpoints of trained detectors in every layout that the docs promise: written here as the official code
writes them, loaded by name, and compared with networks of torch's functions and torchvision's layers. RegAD's and
pytorch-cutpaste's are in test_regad_official.py and test_cutpaste.py."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from models.anomaly import DetectorConfig, build_detector
from models.anomaly.cflow_networks import ConditionalFlow
from models.anomaly.detector import Detector
from models.anomaly.rd4ad import RD4AD
from models.backbones.mobilenet_v3 import MobileNetV3Large, MobileNetV3Small
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.models.anomaly.test_cflow_networks import by_hand
from tests.models.anomaly.test_nsa import Official as OfficialNSA
from tests.models.official_networks import norm


def load(tmp_path, name: str, contents: dict, backbone: nn.Module, **options) -> tuple[Detector, str]:
    torch.save(contents, tmp_path / "official.pt")
    config = DetectorConfig(name=name, weights=str(tmp_path / "official.pt"), options=options)
    detector, where = build_detector(config, backbone)
    return detector, where.removeprefix(f" from {tmp_path}/official.pt")


def stirred(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Batch norms that do something."""
    return {
        name: value + 0.3 * torch.rand_like(value) if value.is_floating_point() and value.ndim == 1 else value
        for name, value in state.items()
    }


# ---------------------------------------------------------------------------------------------------------- RD4AD


def rd4ad_block(state: dict, name: str, x: Tensor, resize: str | None) -> Tensor:
    """AttnBasicBlock of resnet.py, BasicBlock of de_resnet.py."""
    weight = state[f"{name}.conv1.weight"]
    if resize == "upsample":
        y = F.conv_transpose2d(x, weight, stride=2)
        x = norm(state, f"{name}.upsample.1", F.conv_transpose2d(x, state[f"{name}.upsample.0.weight"], stride=2))
    else:
        y = F.conv2d(x, weight, stride=2 if resize else 1, padding=1)
        if resize:
            x = norm(state, f"{name}.downsample.1", F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=2))
    y = norm(state, f"{name}.bn1", y).relu()
    return (norm(state, f"{name}.bn2", F.conv2d(y, state[f"{name}.conv2.weight"], padding=1)) + x).relu()


def official_rd4ad(teacher: nn.Module, bn: dict, decoder: dict, images: Tensor) -> np.ndarray:
    """test.py's anomaly maps, of ResNet-18."""
    x = teacher.maxpool(teacher.relu(teacher.bn1(teacher.conv1(images))))
    seen = [x := layer(x) for layer in (teacher.layer1, teacher.layer2, teacher.layer3)]

    def halve(number: int, x: Tensor) -> Tensor:
        return norm(bn, f"bn{number}", F.conv2d(x, bn[f"conv{number}.weight"], stride=2, padding=1)).relu()

    y = torch.cat([halve(2, halve(1, seen[0])), halve(3, seen[1]), seen[2]], dim=1)
    y = rd4ad_block(bn, "bn_layer.1", rd4ad_block(bn, "bn_layer.0", y, "downsample"), None)
    maps = np.zeros((len(images), *images.shape[2:]))
    for layer, feature in zip((1, 2, 3), reversed(seen)):
        y = rd4ad_block(decoder, f"layer{layer}.1", rd4ad_block(decoder, f"layer{layer}.0", y, "upsample"), None)
        distance = 1 - F.cosine_similarity(feature, y)
        maps += F.interpolate(distance[:, None], images.shape[2:], mode="bilinear", align_corners=True)[:, 0].numpy()
    return np.stack([gaussian_filter(each, sigma=4) for each in maps])


@pytest.mark.parametrize("memory", [{}, {"memory0.units": torch.ones(5, 4), "bn_layer.0.memory.weight": torch.ones(3)}])
def test_rd4ad(tmp_path, memory):
    """main.py's {"bn", "decoder"}; test.py takes what is called memory out of `bn`, as older checkpoints have it."""
    torch.manual_seed(0)
    teacher, source = torchvision.models.resnet18().eval(), RD4AD(ResNet18())
    bn, decoder = stirred(source.bn.state_dict()), stirred(source.decoder.state_dict())
    backbone = ResNet18()
    backbone.load_state_dict({n: v for n, v in teacher.state_dict().items() if not n.startswith("fc.")})
    ours, left = load(tmp_path, "rd4ad", {"bn": bn | memory, "decoder": decoder}, backbone)
    wanted = " without bn.memory0.units, bn.bn_layer.0.memory.weight, which its code does not use either"
    assert left == (wanted if memory else "")
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected, found = official_rd4ad(teacher, bn, decoder, images), ours.examine(images)
    assert expected.std() > 1e-3
    np.testing.assert_allclose(found.maps.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(found.scores.numpy(), expected.max((1, 2)), atol=1e-5)


def test_rd4ad_other_names_stay_errors(tmp_path):
    source = RD4AD(ResNet18())
    bn, decoder = source.bn.state_dict(), source.decoder.state_dict()
    with pytest.raises(UserError, match=r"does not fit RD4AD.*decoder\.memory\.weight is unknown"):
        load(tmp_path, "rd4ad", {"bn": bn, "decoder": decoder | {"memory.weight": torch.ones(2)}}, ResNet18())


# ---------------------------------------------------------------------------------------------------------- NSA


@pytest.mark.parametrize("final", [True, False])
def test_nsa(tmp_path, final):
    """mvtec_evaluation.ipynb: a `final_` file is the state_dict, another has it under model_state_dict."""
    torch.manual_seed(0)
    theirs, images = OfficialNSA(), torch.randn(2, 3, 64, 96)
    theirs(images)  # statistics of batch norm that are not the first
    state = theirs.state_dict()
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-3).state_dict()
    training = {"epoch": 80, "model_state_dict": state, "optimizer_state_dict": optimizer}
    ours, _ = load(tmp_path, "nsa", state if final else training, ResNet18())
    with torch.no_grad():
        expected, found = theirs.eval()(images)[:, 0], ours.examine(images)
    torch.testing.assert_close(found.maps, expected)
    torch.testing.assert_close(found.scores, expected.mean((1, 2)))


def test_nsa_of_another_network_is_an_error(tmp_path):
    state = {n: v for n, v in OfficialNSA().state_dict().items() if "uplayer2" not in n}  # preact, no pool, ...
    with pytest.raises(UserError, match=r"does not fit NSA.*uplayer2\.0\.conv1\.weight is missing"):
        load(tmp_path, "nsa", {"model_state_dict": state}, ResNet18())
    with pytest.raises(UserError, match=r"does not fit NSA"):
        load(tmp_path, "nsa", {"model_state_dict": 3}, ResNet18())


# ---------------------------------------------------------------------------------------------------------- CFlow-AD

BLOCKS = 2


def official_positions(height: int, width: int, count: int = 128) -> np.ndarray:
    """positionalencoding2d of model.py: (H, W, P)."""
    half = count // 2
    positions = np.zeros((height, width, count))
    for k in range(half // 2):
        rate = 10000 ** (-2 * k / half)
        positions[..., 2 * k] = np.sin(np.arange(width) * rate)
        positions[..., 2 * k + 1] = np.cos(np.arange(width) * rate)
        positions[..., half + 2 * k] = np.sin(np.arange(height) * rate)[:, None]
        positions[..., half + 2 * k + 1] = np.cos(np.arange(height) * rate)[:, None]
    return positions


def decoders(channels: list[int]) -> list[ConditionalFlow]:
    flows = [ConditionalFlow(c, 128, BLOCKS) for c in channels]
    with torch.no_grad():
        for flow in flows:
            for block in flow.module_list:
                for parameter in (block.global_scale, block.global_offset, *block.subnet.parameters()):
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return flows


def official_file(encoder: nn.Module, flows: list[ConditionalFlow]) -> dict:
    """save_weights of custom_models/utils.py; FrEIA keeps the inverse rotation, too."""
    states = [flow.state_dict() for flow in flows]
    states = [s | {n + "_inv": v.T.contiguous() for n, v in s.items() if n.endswith("w_perm")} for s in states]
    return {"encoder_state_dict": encoder.state_dict(), "decoder_state_dict": states}


def official_densities(features: list[Tensor], flows: list[ConditionalFlow]) -> list[np.ndarray]:
    """log p / C of every position, vector by vector, by FrEIA's formulas in float64."""
    grids = []
    for feature, flow in zip(features, [flow.double() for flow in flows]):
        count, channels, height, width = feature.shape
        positions, grid = official_positions(height, width), np.zeros((count, height, width))
        for i, y, x in np.ndindex(grid.shape):
            z, log_det = feature[i, :, y, x].double().numpy(), 0.0
            for block in flow.module_list:
                z, more = by_hand(block, z, positions[y, x])
                log_det += more
            grid[i, y, x] = (-channels * 0.9189385332046727 - 0.5 * (z**2).sum() + log_det) / channels
        grids.append(grid)
    return grids


def compare(ours: Detector, features: list[Tensor], flows: list[ConditionalFlow], images: Tensor) -> None:
    for mine, theirs in zip(ours.features(images), features, strict=True):
        assert theirs.std() > 1e-3
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = ours.networks(images)
    for mine, theirs in zip(found, official_densities(features, flows), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-3, atol=1e-4)


MOBILE = {  # encoder, ours, and where load_encoder_arch of model.py puts its hooks
    "large": (torchvision.models.mobilenet_v3_large, MobileNetV3Large, (-11, -5, -2), [40, 112, 160]),
    "small": (torchvision.models.mobilenet_v3_small, MobileNetV3Small, (-10, -5, -2), [24, 48, 96]),
}


@pytest.mark.parametrize("size", MOBILE)
def test_cflow_with_a_mobilenet_v3(tmp_path, size):
    """Its encoder is `.features` alone, and hooks on the last convolution of three blocks feed the flows: what stands
    before the batch norm and the shortcut."""
    torch.manual_seed(0)
    official, build, hooked, channels = MOBILE[size]
    encoder, seen, flows = official().features.eval(), [], decoders(channels)
    encoder.load_state_dict(stirred(encoder.state_dict()))
    for position in hooked:
        encoder[position].block[-1][0].register_forward_hook(lambda *about: seen.append(about[2]))
    contents, images = official_file(encoder, flows), torch.randn(2, 3, 64, 48)
    ours, left = load(tmp_path, "cflow", contents, build(), blocks=BLOCKS, before_norm=True)
    assert left.startswith(" without flows.0.module_list.0.w_perm_inv, ") and left.endswith(
        ", and 3 more, which its code does not use either"
    )
    with torch.no_grad():
        encoder(images)
    compare(ours, list(seen), flows, images)
    with pytest.raises(
        UserError, match=r"official\.pt.*MobileNetV3.*: set detector\.before_norm=true detector\.reflect=false$"
    ):
        load(tmp_path, "cflow", contents, build(), blocks=BLOCKS)
    with pytest.raises(UserError, match="does not fit CFlow"):
        other = MobileNetV3Small if size == "large" else MobileNetV3Large
        load(tmp_path, "cflow", contents, other(), blocks=BLOCKS, before_norm=True)


def test_cflow_with_a_resnet(tmp_path):
    """Its convolutions mirror at the border (custom_models/resnet.py)."""
    torch.manual_seed(0)
    encoder, flows = torchvision.models.resnet18().eval(), decoders([128, 256, 512])
    encoder.fc = nn.Identity()
    encoder.load_state_dict(stirred(encoder.state_dict()))
    for layer in encoder.modules():
        if isinstance(layer, nn.Conv2d) and layer.padding != (0, 0):
            layer.padding_mode = "reflect"
    contents, images = official_file(encoder, flows), torch.randn(1, 3, 64, 96)
    ours, _ = load(tmp_path, "cflow", contents, ResNet18(), blocks=BLOCKS, reflect=True)
    with torch.no_grad():
        x = encoder.layer1(encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(images)))))
        features = [x := layer(x) for layer in (encoder.layer2, encoder.layer3, encoder.layer4)]
    compare(ours, features, flows, images)
    with pytest.raises(
        UserError, match=r"official\.pt.*ResNet.*: set detector\.before_norm=false detector\.reflect=true$"
    ):
        load(tmp_path, "cflow", contents, ResNet18(), blocks=BLOCKS)


def test_before_norm_is_for_mobilenet_v3():
    for backbone in (ResNet18(), torch.nn.Module()):
        with pytest.raises(UserError, match=r"before_norm=true .* set backbone\.name=mobilenet_v3_large"):
            build_detector(DetectorConfig(name="cflow", options={"before_norm": True}), backbone)


# ---------------------------------------------------------------------------------------------------------- our runs


def test_a_run_of_ours_needs_its_options_again(tmp_path):
    """Those that no shape shows: else its weights load and mean something else."""
    options = {"blocks": BLOCKS, "stages": (2, 3), "reflect": True, "before_norm": False}
    source, _ = build_detector(DetectorConfig(name="cflow", options=options), ResNet18(stem="cifar_solo"))
    about = {"detector": {"name": "cflow", **options}, "backbone": {"name": "resnet18", "stem": "cifar_solo"}}
    run = {"model": source.state_dict(), "config": about}
    ours, _ = load(tmp_path, "cflow", run, ResNet18(stem="cifar_solo"), **options)
    images = torch.randn(1, 3, 32, 32)
    for mine, theirs in zip(ours.networks(images), source.networks(images), strict=True):
        torch.testing.assert_close(mine, theirs)
    with pytest.raises(UserError, match=r"official\.pt was trained with another reflect: set detector\.reflect=true$"):
        load(tmp_path, "cflow", run, ResNet18(stem="cifar_solo"), **options | {"reflect": False})
    with pytest.raises(UserError, match=r"official\.pt: this run's backbone .*: set backbone\.stem=cifar_solo$"):
        load(tmp_path, "cflow", run, ResNet18(stem="cifar"), **options)
