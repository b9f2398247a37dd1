"""RegAD: official layers and checkpoint, the supports of a query, loss, registered features, and maps by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from torch import Tensor, nn

from data.augment import normalize
from models.anomaly import DetectorConfig, build_detector
from models.anomaly.detector import TrainingBatch
from models.anomaly.regad import RegAD
from models.mobilenet import MobileNetV2
from models.resnet import ResNet18
from tests.pictures import batches
from tests.processes import run_processes
from training.errors import UserError


def detector(backbone: type[nn.Module] = ResNet18, **options) -> RegAD:
    """Its transformers turn and scale, which they only do after training."""
    torch.manual_seed(3)
    model = RegAD(backbone(), **options)
    for transformer in model.transformers:
        nn.init.normal_(transformer.fc[2].weight, std=0.02)
    return model


def pictures(count: int = 3, size: int = 32) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch(images: Tensor, part: slice = slice(None), epoch: int = 0, seed: int = 0) -> TrainingBatch:
    ids = torch.arange(len(images))[part]
    return TrainingBatch(images[part], torch.zeros_like(ids), ids, epoch, seed)


# Layers ---------------------------------------------------------------------------------------------------------------


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
    assert where == f" from {path}" and len(loaded.mean) == 0
    for name, value in theirs.state_dict().items():
        same = torch.equal(loaded.state_dict()[name], value)
        assert same or name.startswith("backbone.layer4."), name
    for part, name in (("STN", "layer2.0.conv1.weight"), ("STN", "stn2.fc.0.bias"), ("ENC", "conv3.weight")):
        state = official_checkpoint(theirs)
        del state[part][name]
        torch.save(state, path)
        with pytest.raises(UserError, match=r"does not fit RegAD.*Missing key"):
            build_detector(DetectorConfig(name="regad", weights=str(path)), ResNet18())


# Training -------------------------------------------------------------------------------------------------------------


def partners(model: RegAD, images: Tensor, **when) -> Tensor:
    """The numbers of the supports (B, K) of pictures that are filled with their numbers."""
    [(queries, supports)] = model.steps(batch(images, **when))
    assert torch.equal(queries, images / 255) and supports.shape[1:] == (model.supports, *images.shape[1:])
    return (supports[:, :, 0, 0, 0] * 255).round().long()


def test_supports_are_others_of_the_batch_all_alike_and_new_in_every_epoch():
    model, count = detector(supports=3), 5
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    drawn = torch.stack([partners(model, images, epoch=epoch) for epoch in range(400)])  # (400, B, K)
    seen = F.one_hot(drawn, count).sum((0, 2)).double() / 1200  # (B, B) how often a picture has another
    torch.testing.assert_close(seen, (1 - torch.eye(count).double()) / (count - 1), atol=0.05, rtol=0)
    assert ((seen == 0) == torch.eye(count, dtype=torch.bool)).all()
    alike = (drawn[:, :, 0] == drawn[:, :, 1]).double().mean().item()
    assert alike == pytest.approx(1 / (count - 1), abs=0.03)  # with repetition
    again = [partners(model, images, epoch=1, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(again[0], drawn[1]) and torch.equal(again[1], drawn[1]) and not torch.equal(again[2], drawn[1])
    only = partners(detector(supports=2), images[:2])
    assert only.tolist() == [[1, 1], [0, 0]]
    with pytest.raises(UserError, match="batch_size to at least 2"):
        partners(model, images[:1])


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
    [(queries, supports)] = model.steps(batch(pictures(2, size=224)))
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


# Test -----------------------------------------------------------------------------------------------------------------


def test_features_are_the_official_ones():
    model, images = detector().eval(), pictures(2, size=224)
    official = Official(model).eval()
    with torch.no_grad():
        official(images / 255)  # not normalised
    for ours, theirs in zip(model.features(normalize(images)), official.outputs):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_without_transformation_it_reads_the_backbone():
    model, images = RegAD(ResNet18()).eval(), pictures()
    plain = model.backbone.forward_stages(images / 255, last=3)
    for ours, theirs in zip(model.features(normalize(images)), plain):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


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
    model, support, test = detector().train(), pictures(2), pictures(5)[2:]
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


# Processes ------------------------------------------------------------------------------------------------------------


def fitted_on(images: Tensor, numbers: list[int], rank: int = 0, world_size: int = 1) -> Tensor:
    """Maps of three pictures after a fit on this process's share of the supports."""
    mine = [b for i, b in enumerate(batches(images, 1)) if i in numbers and i % world_size == rank]
    model = detector(MobileNetV2).eval()
    model.fit(mine, len(numbers))
    return model.score(normalize(pictures(5)[2:]))[0]


def on_a_shard(rank: int, world_size: int) -> tuple[Tensor, ...]:
    mine, images = slice(0, 3) if rank == 0 else slice(3, 5), normalize(pictures(3))
    [(queries, supports)] = detector(MobileNetV2).steps(batch(pictures(5, size=8), mine))
    fitted = [fitted_on(images, numbers, rank, world_size) for numbers in ([0], [0, 1, 2])]
    return queries, supports, *fitted


def test_two_processes_draw_the_supports_of_one_and_fit_as_one():
    """Also with unequal parts, and with one support for two processes."""
    [(queries, supports)] = detector(MobileNetV2).steps(batch(pictures(5, size=8)))
    images = normalize(pictures(3))
    expected = [fitted_on(images, numbers) for numbers in ([0], [0, 1, 2])]
    results = run_processes(on_a_shard, 2)
    assert torch.equal(torch.cat([r[0] for r in results]), queries)
    assert torch.equal(torch.cat([r[1] for r in results]), supports)
    for _, _, *fitted in results:
        for a, b in zip(fitted, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Reuse and mistakes ---------------------------------------------------------------------------------------------------


def test_other_supports_need_no_training_but_a_fit(tmp_path):
    model, images = detector(MobileNetV2), pictures(6)
    model.fit(batches(normalize(images[:2]), 2), 2)
    torch.save({"config": {"detector": {"name": "regad"}}, "model": model.state_dict()}, tmp_path / "last.pt")
    loaded, _ = build_detector(DetectorConfig(name="regad", weights=str(tmp_path / "last.pt")), MobileNetV2())
    for a, b in zip(loaded.score(normalize(images)), model.score(normalize(images))):
        assert torch.equal(a, b)
    for each in (loaded, fresh := detector(MobileNetV2)):
        each.fit(batches(normalize(images[2:5]), 2), 3)
    for a, b in zip(loaded.score(normalize(images)), fresh.score(normalize(images))):
        assert torch.equal(a, b)


def test_supports_score_less_than_what_is_strange():
    model = detector()
    stripes = 128 + 50 * torch.sin(torch.arange(64) / 2).expand(3, 3, 64, 64) + 5 * torch.randn(3, 3, 64, 64)
    spoilt = stripes[2:].clone()
    spoilt[:, :, 24:40, 16:32] = 128 + 80 * torch.randn(1, 3, 16, 16)
    support, normal, spoilt = (normalize(x.clamp(0, 255).to(torch.uint8)) for x in (stripes[:2], stripes[2:], spoilt))
    model.fit(batches(support, 2), 2)
    found = model.examine(spoilt)
    assert found.scores.item() > 1.5 * model.examine(normal).scores.item()
    y, x = found.peaks[0].tolist()
    assert 20 <= y <= 44 and 12 <= x <= 36


class Closed(ResNet18):
    """A backbone that lets nothing happen between its stages."""

    def forward_stages(self, x: Tensor, last: int = 4) -> list[Tensor]:
        return super().forward_stages(x, last)


def test_mistakes_are_one_line():
    with pytest.raises(UserError, match=r"which Closed does not allow: set backbone\.name"):
        RegAD(Closed())
    with pytest.raises(UserError, match="regad regularization=0: it must be above 0"):
        RegAD(ResNet18(), regularization=0)
    with pytest.raises(UserError, match="supports=0"):
        RegAD(ResNet18(), supports=0)
    model, images = detector(MobileNetV2), normalize(pictures(2))
    with pytest.raises(UserError, match="RegAD is not fitted"):
        model.score(images)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :4] = False
    with pytest.raises(UserError, match="regad compares position by position, which padding shifts"):
        model.fit(batches(images, 2, valid=valid), 2)
    with pytest.raises(UserError, match="no training picture"):
        model.fit([], 0)
    model.fit(batches(images, 2), 2)
    with pytest.raises(UserError, match="fitted on 8 x 8 positions, and these pictures have 16 x 16"):
        model.score(normalize(pictures(1, size=64)))
    with pytest.raises(ValueError, match="cannot leave out"):
        model.score(images, leave_out=torch.arange(2))
