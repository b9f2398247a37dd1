"""Features of a whole set: against one plain eval-mode call, on one and several processes."""

import pytest
import torch
from torch import nn

from data.loading import Loader
from data.normalize import normalize
from evaluation.features import extract
from runtime.errors import UserError
from tests.processes import run_processes


class Images:
    """n seeded images of 8 x 8 in memory; with masks as an anomaly test set has them."""

    def __init__(self, n: int, masks: bool = False):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
        self.labels = torch.randint(0, 5, (n,), generator=generator)
        self.masks = masks

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        mask = (torch.zeros(8, 8, dtype=torch.bool),) if self.masks else ()
        return self.images[i], *mask, int(self.labels[i]), i


def make_backbone() -> nn.Module:
    """(B, 3, 8, 8) -> (B, 6), in train mode, with BatchNorm whose running statistics are not its first values."""
    torch.manual_seed(3)
    backbone = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    backbone(torch.randn(16, 3, 8, 8) * 2 + 1)
    return backbone


def plain(raw_images: Images, index: slice | list[int] = slice(None)) -> torch.Tensor:
    with torch.no_grad():
        return make_backbone().eval()(normalize(raw_images.images[index]))


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_equals_one_eval_mode_call_in_data_set_order(shuffle, masks):
    raw_images = Images(11, masks)
    features, labels = extract(make_backbone(), Loader(raw_images, 4, "cpu", shuffle=shuffle))
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, plain(raw_images))
    assert torch.equal(labels, raw_images.labels)


def test_some_of_the_images_in_ascending_order():
    raw_images = Images(11)
    features, labels = extract(make_backbone(), Loader(raw_images, 2, "cpu", indices=torch.tensor([9, 2, 5])))
    torch.testing.assert_close(features, plain(raw_images, [2, 5, 9]))
    assert torch.equal(labels, raw_images.labels[[2, 5, 9]])


def test_one_image():
    features, labels = extract(make_backbone(), Loader(Images(1), 64, "cpu"), progress="features")
    torch.testing.assert_close(features, plain(Images(1)))
    assert labels.shape == (1,)


def test_leaves_the_backbone_and_the_random_numbers_alone():
    backbone = make_backbone()
    backbone[1].eval()  # a frozen BatchNorm in a network that trains
    backbone[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [module.training for module in backbone.modules()]
    state = torch.get_rng_state()
    features, _ = extract(backbone, Loader(Images(5), 2, "cpu", shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in backbone.modules()] == modes
    assert [parameter.requires_grad for parameter in backbone.parameters()] == [True, False, True, True]
    assert not features.requires_grad
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modes_return_after_an_error():
    backbone = make_backbone()
    backbone.append(nn.Linear(5, 1))  # the width is 6
    with pytest.raises(RuntimeError):
        extract(backbone, Loader(Images(5), 2, "cpu"))
    assert all(module.training for module in backbone.modules())


def test_diverged_weights_are_named():
    backbone = make_backbone()
    backbone[1].bias.data[0] = torch.inf
    with pytest.raises(UserError, match=r"2 of 2 images.*first: image 3"):
        extract(backbone, Loader(Images(6), 2, "cpu", indices=[5, 3]))


def test_an_image_twice_is_an_error():
    with pytest.raises(ValueError, match="image 2 twice"):
        extract(make_backbone(), Loader(Images(6), 2, "cpu", indices=[1, 2, 5, 2]))


def extract_here(rank, world_size):  # noqa: ARG001 (run_processes gives them)
    """Of 11 images and of one, with which the second process has none."""
    return [extract(make_backbone(), Loader(Images(n), 2, "cpu", shuffle=True)) for n in (11, 1)]


def test_all_ranks_get_what_one_process_gets():
    alone = extract_here(0, 1)
    for results in run_processes(extract_here, 2):
        for (features, labels), (expected, expected_labels) in zip(results, alone):
            torch.testing.assert_close(features, expected)
            assert torch.equal(labels, expected_labels)
