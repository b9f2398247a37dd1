"""Split batch norm against one nn.BatchNorm2d for each part of the batch, and against BatchNorm2d in evaluation."""

import copy

import pytest
import torch
from torch import nn

from models.backbones.resnet import ResNet18
from models.backbones.split_batch_norm import SplitBatchNorm2d
from models.backbones.vit import ViTTiny
from models.ssl.moco_v2 import MoCoV2
from runtime.errors import UserError


def norm_and_parts(splits, channels=3, **options):
    """A split norm with weights and statistics that are not the start's, and one BatchNorm2d like it for each part."""
    plain = nn.BatchNorm2d(channels, **options).double()
    with torch.no_grad():
        for tensor in (plain.weight, plain.bias, plain.running_mean):
            tensor.normal_()
        plain.running_var.uniform_(0.5, 2)
    return SplitBatchNorm2d.convert(copy.deepcopy(plain), splits), [copy.deepcopy(plain) for _ in range(splits)]


def by_hand(parts, x):
    """Image i goes through the norm of part i % splits."""
    out = torch.empty_like(x)
    for i, part in enumerate(parts):
        out[i :: len(parts)] = part(x[i :: len(parts)])
    return out


@pytest.mark.parametrize("splits", [1, 2, 3, 6])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.3, "eps": 0.1}])
def test_equals_a_norm_for_each_part(splits, layout, options):
    norm, parts = norm_and_parts(splits, **options)
    for step in range(1, 4):
        x = (2 * torch.randn(6, 3, 4, 5, dtype=torch.float64) + 1).to(memory_format=layout)
        results = []
        for network, modules in ((norm, [norm]), (lambda x: by_hand(parts, x), parts)):
            leaf, gradient = x.clone().requires_grad_(), torch.linspace(-1, 2, x.numel()).double().view(x.shape)
            out = network(leaf)
            (out * gradient).sum().backward()
            grads = [sum(getattr(module, name).grad for module in modules) for name in ("weight", "bias")]
            results.append((out, leaf.grad, *grads))
            for module in modules:
                module.zero_grad()
        torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
        for name in ("running_mean", "running_var"):  # linear in the statistics: the mean of the parts' own
            expected = torch.stack([getattr(part, name) for part in parts]).mean(0)
            torch.testing.assert_close(getattr(norm, name), expected, rtol=1e-12, atol=1e-12)
        assert norm.num_batches_tracked == step


def test_parts_do_not_see_each_other():
    norm, _ = norm_and_parts(2)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    changed = x.clone()
    changed[1] += 100 * torch.rand(3, 4, 4)
    same = [torch.equal(one, other) for one, other in zip(norm(x), norm(changed))]
    assert same == [True, False, True, False, True, False]


def test_gradient():
    norm, _ = norm_and_parts(2, channels=2)
    x = torch.randn(4, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, x)


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_evaluation_is_batch_norm(batch):
    norm, (plain, *_) = norm_and_parts(4)
    x = torch.randn(batch, 3, 2, 2, dtype=torch.float64)
    before = copy.deepcopy(norm.state_dict())
    assert torch.equal(norm.eval()(x), plain.eval()(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_images_with_float32_weights(dtype):
    norm, parts = norm_and_parts(2)
    x = torch.randn(6, 3, 4, 4).to(dtype)
    with torch.autocast("cpu", dtype):
        out, expected = norm.float()(x), by_hand([part.float() for part in parts], x)
    assert out.dtype == dtype and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(out, expected)


def test_without_running_statistics_for_a_while():
    """As sharpness-aware minimization's second pass sets it: the same output, and the buffers stay."""
    norm, parts = norm_and_parts(2)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    before = copy.deepcopy(norm.state_dict())
    norm.track_running_stats = False
    torch.testing.assert_close(norm(x), by_hand(parts, x), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.state_dict().items())
    norm.track_running_stats = True
    norm(x)
    torch.testing.assert_close(norm.running_mean, (parts[0].running_mean + parts[1].running_mean) / 2)


class Other(nn.BatchNorm2d):
    pass


def test_convert_replaces_two_dimensional_batch_norms_in_place():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), Other(4)))
    network.append(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16)))
    keys, parameters = list(network.state_dict()), [id(p) for p in network.parameters()]
    assert SplitBatchNorm2d.convert(network, 2) is network
    assert list(network.state_dict()) == keys and [id(p) for p in network.parameters()] == parameters
    kinds = [type(module) for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert kinds == [SplitBatchNorm2d, SplitBatchNorm2d, Other, nn.BatchNorm1d]
    twin = copy.deepcopy(network)  # as the EMA target is made
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(network(x), twin(x)) and twin[1].splits == 2


def test_a_resnets_checkpoint_goes_both_ways():
    plain = ResNet18()
    split = SplitBatchNorm2d.convert(ResNet18(), 2)
    assert split.state_dict().keys() == plain.state_dict().keys()
    split.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(split.eval()(x), plain.eval()(x))
    plain.load_state_dict(split.state_dict())


def test_a_batch_that_does_not_divide():
    norm, _ = norm_and_parts(4)
    with pytest.raises(UserError, match=r"method\.splits=4 does not divide the 6 images"):
        norm(torch.randn(6, 3, 2, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):  # one value a channel and part
        norm(torch.randn(4, 3, 1, 1, dtype=torch.float64))


def test_moco_needs_a_batch_norm_to_split():
    with pytest.raises(UserError, match=r"method\.splits=8 splits no batch norm: the backbone has none; set it to 1"):
        MoCoV2(ViTTiny(size=32), queue=8, splits=8)
    assert MoCoV2(ViTTiny(size=32), queue=8).queue.rows.shape == (8, 128)
