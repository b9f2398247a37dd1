"""Heads against the official ones, rebuilt here layer by layer, DINO's with torch's weight_norm."""

import copy
import warnings

import pytest
import torch
from torch import nn

from models.backbones.resnet import ResNet18
from models.heads import DINOHead, WeightNormLinear, head_widths, mlp


def official_head(in_features, prototypes, hidden, bottleneck, use_bn, nlayers):
    """The computation of facebookresearch/dino vision_transformer.DINOHead, with torch's deprecated weight_norm."""
    layers = []
    for width in (in_features, *[hidden] * (nlayers - 2)):
        layers += [nn.Linear(width, hidden)] + ([nn.BatchNorm1d(hidden)] if use_bn else []) + [nn.GELU()]
    head = nn.Module()
    head.mlp = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head.last_layer = nn.utils.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
    head.forward = lambda x: head.last_layer(nn.functional.normalize(head.mlp(x), dim=-1, p=2))
    return head


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("use_bn", [False, True])
def test_dino_head_is_the_official_one(use_bn, layers):
    ours = DINOHead(12, 40, layers=layers, hidden=16, bottleneck=8, use_bn=use_bn, norm_last_layer=False).double()
    theirs = official_head(12, 40, 16, 8, use_bn, layers).double()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}
    assert ours.last_layer.weight_g.shape == (40, 1)
    assert ours.last_layer.weight_v.shape == (40, 8)
    nn.init.uniform_(theirs.last_layer.weight_g, 0.5, 2)  # not 1, so that its role shows
    ours.load_state_dict(theirs.state_dict(), strict=True)

    x = torch.randn(6, 12, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs.forward(x), rtol=1e-12, atol=1e-12)
    weights = torch.randn(6, 40, dtype=torch.float64)
    (ours(x) * weights).sum().backward()
    (theirs.forward(x) * weights).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-10, atol=1e-12)


def test_dino_head_number_of_parameters():
    with torch.device("meta"):
        head = DINOHead(384, 65536)  # ViT-S, ImageNet: 22.35 million
    mlp = (384 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 256
    assert sum(p.numel() for p in head.parameters()) == mlp + 65536 * 256 + 65536 == 22_352_128


def test_norm_last_layer_freezes_the_lengths_at_one():
    frozen, free = (
        DINOHead(4, 10, hidden=8, bottleneck=6),
        DINOHead(4, 10, hidden=8, bottleneck=6, norm_last_layer=False),
    )
    assert not frozen.last_layer.weight_g.requires_grad
    assert frozen.last_layer.weight_v.requires_grad
    assert free.last_layer.weight_g.requires_grad
    for head in (frozen, free):
        assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))
    x = torch.randn(32, 4)
    optimizer = torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=1.0)
    frozen(x).square().sum().backward()
    optimizer.step()
    assert torch.equal(frozen.last_layer.weight_g, torch.ones(10, 1))
    assert frozen(x).abs().max() <= 1 + 1e-6  # logits are cosines


def test_only_the_mlp_is_truncated_normal():
    head = DINOHead(256, 512, hidden=256, bottleneck=256)
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
            assert not layer.bias.any()
    bound = 256**-0.5  # Linear's own: uniform in +-1 / sqrt(in_features)
    assert head.last_layer.weight_v.abs().max() <= bound
    assert head.last_layer.weight_v.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_head_can_be_copied_after_a_forward_and_a_backward():
    """An EMA target is a deep copy; torch's old weight_norm refuses that."""
    head = DINOHead(4, 10, hidden=8, bottleneck=6)
    x = torch.randn(3, 4)
    head(x).sum().backward()
    twin = copy.deepcopy(head)
    assert torch.equal(twin(x), head(x))
    assert twin.last_layer.weight_v.data_ptr() != head.last_layer.weight_v.data_ptr()


def test_weight_norm_linear_ignores_the_length_of_v():
    layer = WeightNormLinear(5, 7).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.weight_v.mul_(13.0)
    torch.testing.assert_close(layer(x), before)
    v, x = layer.weight_v.tolist(), x.tolist()
    rows = [[sum(a * b for a, b in zip(row, item)) / sum(a * a for a in row) ** 0.5 for row in v] for item in x]
    torch.testing.assert_close(before, torch.tensor(rows, dtype=torch.float64))


def test_simclr_head():
    backbone = ResNet18()
    head = mlp([backbone.num_features, 512, 128], bias=True, last_bias=True)
    assert sum(p.numel() for p in [*backbone.parameters(), *head.parameters()]) == 11_505_856
    head.double()
    x = torch.randn(6, 512, dtype=torch.float64)
    h = x @ head[0].weight.T + head[0].bias
    h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt()  # a new BatchNorm has weight 1 and bias 0
    torch.testing.assert_close(head(x), h.clamp(min=0) @ head[3].weight.T + head[3].bias)
    head(x).square().sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def moco_v3_mlp(layers, width_in, hidden, out, last_bn=True):
    """_build_mlp of facebookresearch/moco-v3 moco/builder.py; get_mlp of alinlab/PsCo models.py makes the same."""
    modules = []
    for layer in range(layers):
        dim_1 = width_in if layer == 0 else hidden
        dim_2 = out if layer == layers - 1 else hidden
        modules.append(nn.Linear(dim_1, dim_2, bias=False))
        if layer < layers - 1:
            modules += [nn.BatchNorm1d(dim_2), nn.ReLU(inplace=True)]
        elif last_bn:
            modules.append(nn.BatchNorm1d(dim_2, affine=False))
    return nn.Sequential(*modules)


def projector(sizes, bias):
    """That of facebookresearch/barlowtwins main.py and, with biases in front of BatchNorm, of vicreg main_vicreg.py."""
    layers = []
    for i in range(len(sizes) - 2):
        layers += [nn.Linear(sizes[i], sizes[i + 1], bias=bias), nn.BatchNorm1d(sizes[i + 1]), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], bias=False))


def simsiam_projector(width_in, out):
    """simsiam/builder.py, with a bias in the last layer that gets no gradient and is undone by the BatchNorm."""
    last = nn.Linear(width_in, out)
    last.bias.requires_grad = False
    hidden = [nn.Linear(width_in, width_in, bias=False), nn.BatchNorm1d(width_in), nn.ReLU(inplace=True)]
    hidden += [nn.Linear(width_in, width_in, bias=False), nn.BatchNorm1d(width_in), nn.ReLU(inplace=True)]
    return nn.Sequential(*hidden, last, nn.BatchNorm1d(out, affine=False))


HEADS = {
    "SimCLR": (
        mlp(head_widths(6, "mlp", 0, 4), bias=True, last_bias=True),
        nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4)),
    ),
    "SupCon, MoCo v2": (  # networks/resnet_big.py; moco/builder.py puts Linear and ReLU in front of the backbone's fc
        mlp(head_widths(6, "mlp", 0, 4), batch_norm=False, bias=True, last_bias=True),
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 4)),
    ),
    "MoCo v3 ResNet, PsCo": (mlp(head_widths(6, "mlp", 9, 4), last_norm=True), moco_v3_mlp(2, 6, 9, 4)),
    "MoCo v3 ViT": (mlp(head_widths(6, "mlp", 9, 4, layers=3), last_norm=True), moco_v3_mlp(3, 6, 9, 4)),
    "MoCo v3 ResNet, PsCo predictor": (mlp([4, 9, 4]), moco_v3_mlp(2, 4, 9, 4, False)),
    "MoCo v3 ViT predictor": (mlp([4, 9, 4], last_norm=True), moco_v3_mlp(2, 4, 9, 4)),
    "BYOL": (  # MLP of byol/utils/networks.py: with_bias=True, then with_bias=False
        mlp(head_widths(6, "mlp", 9, 4), bias=True),
        nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 4, bias=False)),
    ),
    "SimSiam": (mlp(head_widths(6, "mlp", 0, 5, layers=3), last_norm=True), simsiam_projector(6, 5)),
    "SimSiam predictor": (
        mlp([5, 2, 5], last_bias=True),
        nn.Sequential(nn.Linear(5, 2, bias=False), nn.BatchNorm1d(2), nn.ReLU(inplace=True), nn.Linear(2, 5)),
    ),
    "Barlow Twins": (mlp(head_widths(6, "mlp", 9, 9, layers=3)), projector([6, 9, 9, 9], False)),
    "VICReg": (mlp(head_widths(6, "mlp", 9, 9, layers=3), bias=True), projector([6, 9, 9, 9], True)),
    "linear": (mlp(head_widths(6, "linear", 9, 4)), nn.Sequential(nn.Linear(6, 4, bias=False))),
    "linear, bias": (mlp(head_widths(6, "linear", 0, 4), bias=True, last_bias=True), nn.Sequential(nn.Linear(6, 4))),
}


@pytest.mark.parametrize("name", HEADS)
def test_published_heads(name):
    ours, theirs = (copy.deepcopy(head).double() for head in HEADS[name])
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)  # no BatchNorm at weight 1 and bias 0
    weights = theirs.state_dict()
    if name == "SimSiam":
        del weights["6.bias"]
    assert {n: w.shape for n, w in ours.state_dict().items()} == {n: w.shape for n, w in weights.items()}
    assert len(list(ours.parameters())) == sum(p.requires_grad for p in theirs.parameters())
    ours.load_state_dict(weights, strict=True)

    x, weight = torch.randn(8, ours[0].in_features).double(), torch.randn(8, 1).double()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    (ours(x).exp() * weight).sum().backward()
    (theirs(x).exp() * weight).sum().backward()
    expected = dict(theirs.named_parameters())
    for n, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[n].grad, rtol=1e-9, atol=1e-12)
    if name != "SimSiam":  # whose running mean takes many batches to hold the whole bias
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "head, parameters",
    [
        (lambda: mlp(head_widths(2048, "mlp", 0, 128), bias=True, last_bias=True), 4_462_720),  # SimCLR
        (lambda: mlp([2048, 2048, 128], batch_norm=False, bias=True, last_bias=True), 4_458_624),  # MoCo v2
        (lambda: mlp(head_widths(2048, "mlp", 4096, 256), last_norm=True), 9_445_376),  # MoCo v3
        (lambda: mlp(head_widths(384, "mlp", 4096, 256, layers=3), last_norm=True), 19_415_040),  # MoCo v3, ViT-S
        (lambda: mlp([256, 4096, 256], last_norm=True), 2_105_344),
        (lambda: mlp(head_widths(2048, "mlp", 4096, 256), bias=True), 9_449_472),  # BYOL
        (lambda: mlp(head_widths(2048, "mlp", 0, 2048, layers=3), last_norm=True), 12_591_104),  # SimSiam
        (lambda: mlp([2048, 512, 2048], last_bias=True), 2_100_224),
        (lambda: mlp(head_widths(2048, "mlp", 8192, 8192, layers=3)), 151_027_712),  # Barlow Twins
        (lambda: mlp(head_widths(2048, "mlp", 8192, 8192, layers=3), bias=True), 151_044_096),  # VICReg
    ],
)
def test_numbers_of_parameters_at_the_published_widths(head, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in head().parameters()) == parameters


def test_head_widths():
    assert head_widths(512, "linear", 2048, 128) == [512, 128]
    assert head_widths(512, "linear", 0, 128, layers=3) == [512, 128]
    assert head_widths(512, "mlp", 2048, 128) == [512, 2048, 128]
    assert head_widths(512, "mlp", 0, 128) == [512, 512, 128]
    assert head_widths(512, "mlp", 8, 4, layers=3) == [512, 8, 8, 4]
    assert head_widths(512, "mlp", 0, 4, layers=3) == [512, 512, 512, 4]


def test_a_dino_head_of_one_layer():
    assert [type(module) for module in DINOHead(4, 10, layers=1).mlp] == [nn.Linear]
