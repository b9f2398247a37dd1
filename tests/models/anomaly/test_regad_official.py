"""RegAD against the official code: layers, checkpoints, loss and gradients, registered features, maps and scores."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from data.normalize import normalize
from models.anomaly import DetectorConfig, build_detector
from models.anomaly.regad import RegAD
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.images import batches
from tests.models.anomaly.test_regad import batch, detector, raw_images


def test_what_is_trained_has_the_official_number_of_parameters():
    model = RegAD(ResNet18())
    resnet = torchvision.models.resnet18()
    stem = sum(p.numel() for layer in (resnet.conv1, resnet.bn1) for p in layer.parameters())
    stages = sum(p.numel() for layer in (resnet.layer1, resnet.layer2, resnet.layer3) for p in layer.parameters())
    count = {"backbone": stem + stages, "encoder": 3 * 256**2 + 4 * 256, "predictor": 2 * 256**2 + 2 * 256}
    count["transformers"] = sum(
        576 * c + 128 + 9216 + 32 + (16 * f * f + 1) * 1024 + 1025 * 3 for c, f in ((64, 14), (128, 7), (256, 4))
    )
    for name, expected in count.items():
        assert sum(p.numel() for p in getattr(model, name).parameters() if p.requires_grad) == expected, name
    assert not any(p.requires_grad for p in model.backbone.layer4.parameters())


def official_checkpoint(model: RegAD) -> dict:
    """As train.py of the official code saves it: no stage 4, an unused norm in the encoder."""
    stn = {n: v for n, v in model.backbone.state_dict().items() if not n.startswith(("layer4", "fc"))}
    for i, transformer in enumerate(model.transformers, 1):
        stn |= {f"stn{i}.{name}": value for name, value in transformer.state_dict().items()}
    unused = {f"bn3.{name}": value for name, value in nn.BatchNorm2d(256).state_dict().items()}
    return {"STN": stn, "ENC": model.encoder.state_dict() | unused, "PRED": model.predictor.state_dict()}


def test_an_official_checkpoint_loads_and_a_part_of_one_does_not(tmp_path):
    theirs, path = detector(), tmp_path / "bottle_2_rotation_scale_model.pt"
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.01)
    torch.save(official_checkpoint(theirs), path)
    loaded, where = build_detector(DetectorConfig(name="regad", weights=str(path)), ResNet18())
    unused = (
        " without encoder.bn3.weight, encoder.bn3.bias, encoder.bn3.running_mean, and 2 more, which its code does not"
    )
    assert where == f" from {path}{unused} use either" and len(loaded.mean) == 0
    for name, value in theirs.state_dict().items():
        same = torch.equal(loaded.state_dict()[name], value)
        assert same or name.startswith("backbone.layer4."), name
    for part, name in (("STN", "layer2.0.conv1.weight"), ("STN", "stn2.fc.0.bias"), ("ENC", "conv3.weight")):
        state = official_checkpoint(theirs)
        del state[part][name]
        torch.save(state, path)
        with pytest.raises(UserError, match=r"does not fit RegAD.* is missing"):
            build_detector(DetectorConfig(name="regad", weights=str(path)), ResNet18())


class Official(nn.Module):
    """The layers of models/stn.py and models/siamese.py around torchvision's, called as train.py does."""

    def __init__(self, ours: RegAD):
        super().__init__()
        self.resnet = torchvision.models.resnet18()
        self.resnet.load_state_dict(ours.backbone.state_dict(), strict=False)
        self.ours, self.outputs = ours, []

    def stn(self, stage: int, x: Tensor) -> tuple[Tensor, Tensor]:
        module = self.ours.transformers[stage]
        numbers = module.fc(module.conv(x).flatten(1))
        theta = torch.zeros(len(x), 2, 3, dtype=x.dtype)
        theta[:, 0, 0], theta[:, 0, 1] = numbers[:, 0].cos() * numbers[:, 1], -numbers[:, 0].sin()
        theta[:, 1, 0], theta[:, 1, 1] = numbers[:, 0].sin(), numbers[:, 0].cos() * numbers[:, 2]
        return self.sample(x, theta), theta

    def sample(self, x: Tensor, theta: Tensor) -> Tensor:
        return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection",
                             align_corners=False)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        net, fixes, self.outputs = self.resnet, [], []
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for stage, layer in enumerate((net.layer1, net.layer2, net.layer3)):
            x, theta = self.stn(stage, layer(x))
            square = np.concatenate([theta.detach().numpy(), np.tile([[[0.0, 0, 1]]], (len(x), 1, 1))], axis=1)
            fixes.insert(0, torch.from_numpy(np.linalg.inv(square)[:, :2]).to(x.dtype))
            fixed = x.detach()
            for fix in fixes:
                fixed = self.sample(fixed, fix)
            self.outputs.append(fixed)
        return x


def test_loss_and_gradient_are_the_official_ones():
    """224 x 224, as official layers need, in train mode: batch norm sees queries and supports apart."""
    model = detector(supports=2).double().train()
    official = Official(model).double().train()
    [(queries, supports)] = model.steps(batch(raw_images(2, size=224)))
    queries, supports = queries.double(), supports.double()
    loss, stats = model(queries, supports)
    ours = torch.autograd.grad(loss, [*model.backbone.layer2.parameters(), *model.transformers.parameters()])
    query_feat = official(queries)
    b, k, *shape = supports.shape
    support_feat = official(supports.view(b * k, *shape)) / k
    support_feat = support_feat.view(b, k, *support_feat.shape[1:]).sum(1)
    z1, z2 = model.encoder(query_feat), model.encoder(support_feat)
    p1, p2 = model.predictor(z1), model.predictor(z2)
    cosine = nn.CosineSimilarity(dim=1)
    expected = -cosine(p1, z2.detach()).mean() / 2 - cosine(p2, z1.detach()).mean() / 2
    theirs = torch.autograd.grad(expected, [*official.resnet.layer2.parameters(), *model.transformers.parameters()])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for a, e in zip(ours, theirs):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-9)
    directions = (z1 / z1.norm(dim=1, keepdim=True)).detach().float()
    torch.testing.assert_close(stats["spread"], 1 - directions.mean((0, 2, 3)).square().sum(), atol=1e-5, rtol=0)


def test_features_are_the_official_ones():
    model, images = detector().eval(), raw_images(2, size=224)
    official = Official(model).eval()
    with torch.no_grad():
        official(images / 255)  # not normalized
    for ours, theirs in zip(model.features(normalize(images)), official.outputs):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def views_by_hand(support: Tensor) -> Tensor:
    """utils/funcs.py: affine_grid and grid_sample with reflection."""
    angles = np.pi / 16 * np.array([-4, -3, -2, -1, 1, 2, 3, 4])
    thetas = [[[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]] for angle in angles]
    thetas += [[[1, 0, a], [0, 1, b]] for s in (0.2, 0.1) for a, b in ((s, s), (-s, s), (-s, -s), (s, -s))]
    warped = []
    for theta in thetas:
        grid = F.affine_grid(torch.tensor(theta).float().expand(len(support), 2, 3), support.shape, align_corners=False)
        warped.append(F.grid_sample(support, grid, padding_mode="reflection", align_corners=False))
    grey = torchvision.transforms.functional.rgb_to_grayscale(support, 3)
    return torch.cat([support, *warped, support.flip(3), grey, *(support.rot90(k, (2, 3)) for k in (1, 2, 3))])


def test_maps_and_scores_are_the_official_ones():
    model, support, test = detector().train(), raw_images(2), raw_images(5)[2:]
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    model.fit(batches(normalize(support), 1), 2)
    assert model.training and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    maps, scores = model.score(normalize(test))

    def embedded(pixels: Tensor) -> np.ndarray:
        with torch.no_grad():
            maps, thetas = model.eval().register(pixels)
        columns = []
        for stage, x in enumerate(maps):
            for theta in reversed(thetas[: stage + 1]):
                back = F.pad(torch.linalg.inv(theta[:, :, :2]), (0, 1))
                grid = F.affine_grid(back, x.shape, align_corners=False)
                x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
            columns.append(x.repeat_interleave(2**stage, 2).repeat_interleave(2**stage, 3))
        return torch.cat(columns, 1).double().numpy()

    fitted, tested = embedded(views_by_hand(support / 255)), embedded(test / 255)
    assert fitted.shape == (44, 448, 8, 8)
    grid = np.zeros((3, 8, 8))
    for y in range(8):
        for x in range(8):
            covariance = np.cov(fitted[:, :, y, x], rowvar=False) + 0.01 * np.eye(448)
            inverse, mean = np.linalg.inv(covariance), fitted[:, :, y, x].mean(0)
            grid[:, y, x] = [mahalanobis(one[:, y, x], mean, inverse) for one in tested]
    large = F.interpolate(torch.from_numpy(grid)[:, None], (32, 32), mode="bilinear", align_corners=False)[:, 0]
    expected = np.stack([gaussian_filter(one, 4) for one in large.numpy()])
    np.testing.assert_allclose(maps.numpy(), expected, rtol=2e-3)
    np.testing.assert_allclose(scores.numpy(), expected.max((1, 2)), rtol=2e-3)
