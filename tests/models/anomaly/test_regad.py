"""RegAD: supports of a query, what is odd, processes, other supports, mistakes; its numbers: test_regad_official.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.normalize import normalize
from models.anomaly import DetectorConfig, build_detector
from models.anomaly.detector import TrainingBatch
from models.anomaly.regad import RegAD
from models.backbones.mobilenet import MobileNetV2
from models.backbones.resnet import ResNet18
from runtime.errors import UserError
from tests.images import batches
from tests.processes import run_processes


def detector(backbone: type[nn.Module] = ResNet18, **options) -> RegAD:
    """Its transformers turn and scale, which they only do after training."""
    torch.manual_seed(3)
    model = RegAD(backbone(), **options)
    for transformer in model.transformers:
        nn.init.normal_(transformer.fc[2].weight, std=0.02)
    return model


def raw_images(count: int = 3, size: int = 32) -> Tensor:
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def batch(images: Tensor, part: slice = slice(None), epoch: int = 0, seed: int = 0) -> TrainingBatch:
    ids = torch.arange(len(images))[part]
    return TrainingBatch(images[part], torch.zeros_like(ids), ids, epoch, seed)


# Training -------------------------------------------------------------------------------------------------------------


def partners(model: RegAD, images: Tensor, **when) -> Tensor:
    """The numbers of the supports (B, K) of images that are filled with their numbers."""
    [(queries, supports)] = model.steps(batch(images, **when))
    assert torch.equal(queries, images / 255) and supports.shape[1:] == (model.supports, *images.shape[1:])
    return (supports[:, :, 0, 0, 0] * 255).round().long()


def test_supports_are_others_of_the_batch_all_alike_and_new_in_every_epoch():
    model, count = detector(supports=3), 5
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    drawn = torch.stack([partners(model, images, epoch=epoch) for epoch in range(400)])  # (400, B, K)
    seen = F.one_hot(drawn, count).sum((0, 2)).double() / 1200  # (B, B) how often an image has another
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


# Test -----------------------------------------------------------------------------------------------------------------


def test_without_transformation_it_reads_the_backbone():
    model, images = RegAD(ResNet18()).eval(), raw_images()
    plain = model.backbone.forward_stages(images / 255, last=3)
    for ours, theirs in zip(model.features(normalize(images)), plain):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


# Processes ------------------------------------------------------------------------------------------------------------


def fitted_on(images: Tensor, numbers: list[int], rank: int = 0, world_size: int = 1) -> Tensor:
    """Maps of three images after a fit on this process's share of the supports."""
    mine = [b for i, b in enumerate(batches(images, 1)) if i in numbers and i % world_size == rank]
    model = detector(MobileNetV2).eval()
    model.fit(mine, len(numbers))
    return model.score(normalize(raw_images(5)[2:]))[0]


def on_a_shard(rank: int, world_size: int) -> tuple[Tensor, ...]:
    mine, images = slice(0, 3) if rank == 0 else slice(3, 5), normalize(raw_images(3))
    [(queries, supports)] = detector(MobileNetV2).steps(batch(raw_images(5, size=8), mine))
    fitted = [fitted_on(images, numbers, rank, world_size) for numbers in ([0], [0, 1, 2])]
    return queries, supports, *fitted


def test_two_processes_draw_the_supports_of_one_and_fit_as_one():
    """Also with unequal parts, and with one support for two processes."""
    [(queries, supports)] = detector(MobileNetV2).steps(batch(raw_images(5, size=8)))
    images = normalize(raw_images(3))
    expected = [fitted_on(images, numbers) for numbers in ([0], [0, 1, 2])]
    results = run_processes(on_a_shard, 2)
    assert torch.equal(torch.cat([r[0] for r in results]), queries)
    assert torch.equal(torch.cat([r[1] for r in results]), supports)
    for _, _, *fitted in results:
        for a, b in zip(fitted, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


# Reuse and mistakes ---------------------------------------------------------------------------------------------------


def test_other_supports_need_no_training_but_a_fit(tmp_path):
    model, images = detector(MobileNetV2), raw_images(6)
    model.fit(batches(normalize(images[:2]), 2), 2)
    torch.save({"config": {"detector": {"name": "regad"}}, "model": model.state_dict()}, tmp_path / "last.pt")
    loaded, _ = build_detector(DetectorConfig(name="regad", weights=str(tmp_path / "last.pt")), MobileNetV2())
    again = detector(MobileNetV2)
    again.load_state_dict(model.state_dict())
    for a, b in zip(again.score(normalize(images)), model.score(normalize(images))):
        assert torch.equal(a, b)
    found = again.examine(normalize(images[:0]))  # a process may have nothing left to examine
    assert found.maps.shape == (0, 32, 32) and found.scores.shape == (0,)
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
    model, images = detector(MobileNetV2), normalize(raw_images(2))
    with pytest.raises(UserError, match="RegAD is not fitted"):
        model.score(images)
    valid = torch.ones(2, 32, 32, dtype=torch.bool)
    valid[:, :4] = False
    with pytest.raises(UserError, match="regad compares position by position, which padding shifts"):
        model.fit(batches(images, 2, valid=valid), 2)
    with pytest.raises(UserError, match="no training image"):
        model.fit([], 0)
    model.fit(batches(images, 2), 2)
    with pytest.raises(UserError, match="fitted on 8 x 8 positions, and these images have 16 x 16"):
        model.score(normalize(raw_images(1, size=64)))
    with pytest.raises(ValueError, match="cannot leave out"):
        model.score(images, leave_out=torch.arange(2))
