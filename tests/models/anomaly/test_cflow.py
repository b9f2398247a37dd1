"""CFlow-AD's fibers, encoder, training and checkpoints; the flows and the score have tests of their own."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import rotate

from data.normalize import normalize
from models.anomaly.cflow import CFlow, rows_of, turn
from models.anomaly.cflow_networks import encode_positions
from models.anomaly.detector import TrainingBatch
from models.backbones.mobilenet import MobileNetV2
from models.backbones.mobilenet_v3 import MobileNetV3Large
from models.backbones.resnet import ResNet18, WideResNet50
from runtime.errors import UserError
from tests.images import batches
from tests.processes import run_processes

SMALL = {"stages": (2, 3), "blocks": 2, "fiber": 8}


def detector(backbone: nn.Module | None = None, **options) -> CFlow:
    torch.manual_seed(3)
    return CFlow(backbone or ResNet18(), **(SMALL | options))


def batch(images: Tensor, epoch: int = 0, *, first: int = 0, seed: int = 0) -> TrainingBatch:
    return TrainingBatch(images, None, torch.arange(first, first + len(images)), epoch, seed)


def raw_images(count: int, size: int = 64) -> Tensor:
    """Stripes with noise, uint8."""
    stripes = 128 + 50 * torch.sin(torch.arange(size) / 2).expand(count, 3, size, size)
    return (stripes + 10 * torch.randn(stripes.shape)).clamp(0, 255).to(torch.uint8)


def train(model: CFlow, images: Tensor, epochs: int, lr: float = 1e-2) -> list[float]:
    optimizer, losses = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr), []
    for epoch in range(epochs):
        for inputs in model.steps(batch(images, epoch)):
            loss, _ = model(*inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def drawn(model: CFlow, work: TrainingBatch) -> list[list[tuple[int, int, int, int]]]:
    """(stage, image, y, x) of every vector of every fiber, found by its features; its position must be beside it."""
    features, fibers = model.features(normalize(work.images)), []
    for vectors, positions, number in model.steps(work):
        feature, found = features[number], []
        table = feature.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, C)
        encoded = encode_positions(feature.shape[-2:], 128, torch.device("cpu"))
        for vector, position in zip(vectors, positions):
            at = (table == vector).all(1).nonzero()
            assert len(at) == 1
            b, y, x = np.unravel_index(int(at), (len(feature), *feature.shape[-2:]))
            assert torch.equal(position, encoded[y, x])
            found.append((model.stages[number], int(b), int(y), int(x)))
        fibers.append(found)
    return fibers


def test_a_fiber_has_equally_many_positions_of_every_image_and_none_comes_twice():
    model, images = detector(fiber=15, rotation=0), raw_images(4)
    fibers = drawn(model, batch(images))
    assert [len(fiber) for fiber in fibers] == [12] * 26  # 3 of each image: 21 of 64 positions' threes, 5 of 16's
    assert [fiber[0][0] for fiber in fibers] == [2] * 21 + [3] * 5
    for fiber in fibers:
        assert [position[1] for position in fiber] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    everywhere = [position for fiber in fibers for position in fiber]
    assert len(set(everywhere)) == len(everywhere) == 4 * 3 * 26
    orders = {b: [position[2:] for position in everywhere if position[:2] == (2, b)] for b in range(4)}
    assert len({tuple(order) for order in orders.values()}) == 4 and orders[0] != sorted(orders[0])
    for other in (batch(images, 1), batch(images, seed=1)):
        assert drawn(model, other) != fibers
    assert drawn(model, batch(images)) == fibers
    alone = drawn(detector(fiber=3, rotation=0), batch(images[2:3], first=2))  # whatever batch it is in
    assert [[p[2:] for p in f] for f in alone] == [[p[2:] for p in f if p[1] == 2] for f in fibers]
    assert [len(f) for f in drawn(detector(fiber=2, rotation=0), batch(images))][:1] == [4]  # one of each at least


def shares(rank: int, world_size: int) -> list[Tensor]:
    torch.manual_seed(7)
    images = raw_images(4)
    mine = batch(images[2 * rank : 2 * rank + 2], first=2 * rank) if world_size > 1 else batch(images)
    return [vectors for vectors, *_ in detector().steps(mine)]


def test_the_papers_network_is_as_large_as_the_official_one():
    with torch.device("meta"):
        model = CFlow(WideResNet50())
    assert [flow.module_list[0].w_perm.shape[0] for flow in model.flows] == [512, 1024, 2048]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 81_647_616 == 5_523_456 + 17_074_176 + 59_049_984  # by hand in test_cflow_flows.py


def test_two_processes_share_a_fiber():
    one, two = shares(0, 1), run_processes(shares, 2)
    assert len(one) == len(two[0]) == len(two[1])
    for whole, *parts in zip(one, *two):
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)


def test_images_are_turned_as_torchvision_turns_them():
    smooth = torch.nn.functional.interpolate(torch.rand(6, 3, 6, 8) * 255, (48, 64), mode="bicubic")
    images, ids = smooth.clamp(0, 255).to(torch.uint8), torch.arange(10, 16)
    found = turn(images, ids, 2, seed=3, degrees=20)
    for one, turned in zip(images, found):
        angles = np.linspace(-20, 20, 401)
        errors = [(rotate(one, float(a)).float() - turned.float()).abs().mean().item() for a in angles]
        assert min(errors) < 1.0  # a pixel at the edge of two may go to either
        assert (turned == 0).all(0).any()  # corners are black
    assert torch.equal(turn(images[4:], ids[4:], 2, seed=3, degrees=20), found[4:])
    assert not torch.equal(turn(images, ids, 3, seed=3, degrees=20), found)
    assert turn(images, ids, 2, seed=3, degrees=0) is images
    model = detector(rotation=20)
    features = model.features(normalize(turn(raw_images(2), torch.arange(2), 0, seed=0, degrees=20)))
    assert features[0].shape == (2, 128, 8, 8)


def test_the_turned_images_are_those_that_it_learns():
    images = raw_images(2)
    model = detector(rotation=10)
    vectors, *_ = next(iter(model.steps(batch(images))))
    turned = rows_of(model.features(normalize(turn(images, torch.arange(2), 0, seed=0, degrees=10)))[0])[0]
    table = turned.flatten(0, 1)
    assert all((table == vector).all(1).any() for vector in vectors)


def test_an_encoder_that_reflects_has_the_official_convolutions():
    plain, mirrored = ResNet18(), ResNet18()
    mirrored.load_state_dict(plain.state_dict())
    model = detector(mirrored, reflect=True)
    images = torch.randn(2, 3, 64, 64)
    expected = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="reflect"), plain.conv1.weight, stride=2)
    with torch.no_grad():
        torch.testing.assert_close(mirrored.conv1(images), expected)
        x = plain.maxpool(plain.relu(plain.bn1.eval()(expected)))  # zeros are right here: nothing is below 0
        block = mirrored.layer1[0]
        mirror = [
            F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), block.conv1.weight),
            mirrored.layer2[0].downsample[0],
        ]
        torch.testing.assert_close(block.conv1(x), mirror[0])
        assert mirror[1].padding_mode == "zeros"  # there is nothing to pad
    assert {c.padding_mode for c in plain.modules() if isinstance(c, nn.Conv2d)} == {"zeros"}
    whole = model.features(images)
    assert not torch.allclose(whole[0][..., :1], detector(plain).features(images)[0][..., :1])
    with pytest.raises(UserError, match=r"reflect=true cannot mirror .* \(16, 16\)"):
        model.features(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("network", [MobileNetV2, MobileNetV3Large])
def test_an_encoder_with_tensorflows_padding_reflects_too(network):
    """Even sides at stride 2: one more pixel below and right, so the mirror image stands there alone."""
    plain, mirrored = network(padding="tensorflow"), network(padding="tensorflow")
    mirrored.load_state_dict(plain.state_dict())
    model = detector(mirrored, reflect=True)
    images = torch.randn(2, 3, 64, 96)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (0, 1), (0, 1)), mode="reflect")
    expected = F.conv2d(torch.from_numpy(padded), plain.features[0][0].weight, stride=2)
    with torch.no_grad():
        torch.testing.assert_close(mirrored.features[0][0](images), expected)
    one, other = model.features(images), detector(plain).features(images)
    assert not torch.allclose(one[0][..., -1:], other[0][..., -1:])
    with pytest.raises(UserError, match=r"reflect=true cannot mirror"):
        model.features(torch.randn(1, 3, 16, 16))


def test_reflect_where_nothing_is_padded_is_an_error():
    with pytest.raises(UserError, match="reflect=true changes nothing"):
        detector(Tokens(8), reflect=True)


def test_an_official_checkpoint_loads():
    source, model = detector(reflect=True), detector(reflect=True)
    with torch.no_grad():
        source.backbone.conv1.weight.mul_(2)
        for parameter in source.flows.parameters():
            parameter.add_(0.1)
    flows = [flow.state_dict() for flow in source.flows]
    for flow in flows:
        flow |= {name + "_inv": value.T for name, value in flow.items() if name.endswith("w_perm")}
    model.load_trained({"encoder_state_dict": source.backbone.state_dict(), "decoder_state_dict": flows}, "official.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"official.pt does not fit CFlow"):
        detector(blocks=1).load_trained({"encoder_state_dict": {}, "decoder_state_dict": flows}, "official.pt")


def test_it_learns_one_image_and_finds_what_does_not_belong():
    model, images = detector(rotation=0, fiber=32), raw_images(4)
    losses = train(model, images[:1].expand(4, -1, -1, -1).contiguous(), 12)
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    image = normalize(images[:1])
    model.fit(batches(image, 1), 1)
    spoilt = image.clone()
    spoilt[:, :, 24:40, 16:32] = 2 * torch.randn(1, 3, 16, 16)
    found, normal = model.examine(spoilt), model.examine(image)
    assert found.scores.item() > 1.2 * normal.scores.item()
    y, x = found.peaks[0].tolist()
    assert 12 <= y <= 52 and 8 <= x <= 44
    inside = found.maps[0, 24:40, 16:32].mean()
    assert inside > 1.5 * normal.maps.mean() and found.maps[0, :8, 56:].mean() < inside


def test_the_encoder_runs_in_the_autocast_that_steps_is_called_in():
    model, images = detector(), raw_images(2)
    with torch.autocast("cpu", torch.bfloat16):
        work = model.steps(batch(images))
    for vectors, *_ in work:  # as the loop does
        assert vectors.dtype == torch.float32 and torch.equal(vectors, vectors.bfloat16().float())
    vectors, *_ = next(iter(model.steps(batch(images))))
    assert not torch.equal(vectors, vectors.bfloat16().float())


class Tokens(nn.Module):
    """Stages of one size, as a ViT's, of C channels; or, with `grid` False, that are no maps."""

    def __init__(self, channels: int = 7, grid: bool = True):
        super().__init__()
        self.embed, self.grid = nn.Conv2d(3, channels, 16, 16), grid

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        tokens = self.embed(x)  # (B, C, H / 16, W / 16)
        return [(depth + 1) * (tokens if self.grid else tokens.flatten(2)) for depth in range(last)]


def test_stages_of_one_size_and_an_odd_number_of_channels():
    model, images = detector(Tokens(), stages=(1, 4)), raw_images(4)
    assert train(model, images, 5)[-1] > 0
    model.fit(batches(normalize(images), 2), 4)
    assert model.examine(normalize(images)).maps.shape == (4, 64, 64)
    none = model.examine(torch.empty(0, 3, 64, 64))  # of a process that has nothing to do
    assert none.maps.shape == (0, 64, 64) and none.scores.shape == (0,)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"needs stages that are maps .* \(1, 7, 196\)"):
        detector(Tokens(grid=False))
    with pytest.raises(UserError, match=r"2 channels or more, but stages \[2, 3\] .* \(1, 1, 14, 14\)"):
        detector(Tokens(channels=1))
    with pytest.raises(UserError, match="normalize='max' is unknown; one of: train, test"):
        detector(normalize="max")
    with pytest.raises(UserError, match=r"32 positions of each of 2 images, but stage 3 has 4 x 4: .* at most 32"):
        detector(fiber=64).steps(batch(raw_images(2)))
    with pytest.raises(UserError, match="is not fitted"):
        detector().examine(torch.randn(1, 3, 64, 64))
    model = detector()
    nn.init.constant_(model.backbone.conv1.weight, torch.nan)
    with pytest.raises(UserError, match=r"log-likelihoods of the images.* NaN"):
        model.fit(batches(torch.randn(2, 3, 64, 64), 2), 2)
