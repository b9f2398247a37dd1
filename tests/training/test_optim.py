"""Groups, layer-wise, bias and predictor rates, both clippings, EMA in closed form."""

import pytest
import torch
from torch import nn

from runtime.errors import UserError
from training.ema import ema_update
from training.optim import OptimConfig, build_optimizer, clip_gradients, depth_of, parameter_groups, set_rates


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Module()
        self.online.backbone = nn.Module()
        self.online.backbone.conv1 = nn.Conv2d(3, 4, 3)
        for i in (1, 2, 3, 4):
            setattr(self.online.backbone, f"layer{i}", nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        self.online.head = nn.Linear(4, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_groups_decay_matrices_only_and_scale_by_depth():
    model = Tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: (g["decayed"], g["lr_scale"]) for g in parameter_groups(model, layer_decay=0.5)
             for p in g["params"]}  # fmt: skip
    assert "frozen.weight" not in found
    assert found["online.head.weight"] == (True, 1.0)
    assert found["online.head.bias"] == (False, 1.0)
    assert found["online.backbone.layer4.0.weight"] == (True, 0.5)
    assert found["online.backbone.layer1.1.weight"] == (False, 0.5**4)
    assert found["online.backbone.conv1.weight"] == (True, 0.5**5)
    assert len(parameter_groups(model)) == 2


def test_a_backbone_has_its_own_rate():
    """Times the layers' decay; the head keeps `lr`. Without a backbone the key is a mistake."""
    model = Tiny()
    names = {id(p): n for n, p in model.named_parameters()}
    config = OptimConfig(name="sgd", lr=1e-2, backbone_lr=1e-3, layer_decay=0.5)
    optimizer = build_optimizer(config, model)
    set_rates(optimizer, 1e-2, 0.0)
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates["online.head.weight"] == rates["online.head.bias"] == 1e-2
    assert rates["online.backbone.layer4.0.weight"] == pytest.approx(0.5e-3)
    assert rates["online.backbone.conv1.weight"] == pytest.approx(1e-3 * 0.5**5)
    assert build_optimizer(OptimConfig(name="sgd", lr=1.0, backbone_lr=1.0), nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"optim\.backbone_lr is set, but Linear has no backbone to train: set it to"):
        build_optimizer(config, nn.Linear(2, 2))


def test_decay_of_everything():
    """Official MoCo, SimSiam and SupCon hand all parameters to SGD with one weight decay."""
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=1.0, weight_decay=5e-4, decay_norms=True), Tiny())
    set_rates(optimizer, 1.0, 5e-4)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4]


@pytest.mark.parametrize("name", ["decoder", "student.decoder", "head.features", "apprentice"])
def test_stages_outside_a_backbone_belong_to_the_head(name):
    """RD4AD's decoder and CDO's apprentice have layers 1 to 3 as well."""
    model, part = Tiny(), nn.Module()
    for stage in ("layer1", "layer3", "blocks", "0"):
        setattr(part, stage, nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    *parents, last = name.split(".")
    place = model
    for parent in parents:
        setattr(place, parent, nn.Module())
        place = getattr(place, parent)
    setattr(place, last, part)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: g["lr_scale"] for g in parameter_groups(model, layer_decay=0.5) for p in g["params"]}
    outside = {n: scale for n, scale in found.items() if "backbone" not in n}
    assert len(outside) == 4 * 4 + 2 and set(outside.values()) == {1.0}, outside
    assert found["online.backbone.layer4.0.weight"] == 0.5 and found["online.backbone.conv1.weight"] == 0.5**5


def test_depths_of_published_names():
    """Whatever holds the backbone; a stage counts from 1, the stem is 0, and only whole words are a backbone."""
    depths = {
        "backbone.conv1.weight": 0,
        "backbone.layer4.1.conv2.weight": 4,
        "target.backbone.features.0.0.weight": 1,
        "online.backbone.features.18.1.bias": 19,
        "online.backbone.blocks.11.mlp.fc1.weight": 12,
        "online.backbone.patch_embed.proj.weight": 0,
        "backbone.stages.3.blocks.2.gamma": 4,
        "backbone.stages.1.downsample.0.weight": 2,
        "backbone.stem.1.weight": 0,
        "backbone.pos_embed": 0,
        "backbone.register_tokens": 0,
        "backbone.conv1.to_rgb.weight": 0,
        "backbone.norm.weight": None,  # what follows the last block learns at the full rate, as in DINOv2
        "backbone.head.norm.bias": None,
        "backbone.fc.weight": None,
        "backbone.lateral.2.0.weight": None,
        "layer1.0.conv1.weight": None,
        "decoder.layer1.0.conv1.weight": None,
        "head.decoder.layer1.0.conv1.weight": None,
        "backbones.layer1.0.weight": None,
    }
    assert {name: depth_of(name) for name in depths} == depths


def test_rates_reach_the_groups():
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1.0, layer_decay=0.5), Tiny())
    set_rates(optimizer, 0.8, 0.1)
    for group in optimizer.param_groups:
        assert group["lr"] == 0.8 * group["lr_scale"]
        assert group["weight_decay"] == (0.1 if group["decayed"] else 0.0)


class Siamese(Tiny):
    """Predictors where methods have them, and names that only look like one."""

    def __init__(self):
        super().__init__()
        self.online.predictor = nn.Sequential(nn.Linear(2, 3, bias=False), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.head = nn.ModuleDict({"predictor": nn.Linear(2, 2)})
        self.predictors = nn.Linear(2, 2)
        self.temperature = nn.Parameter(torch.zeros(()))


def rates(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_biases_and_norms_have_a_rate_of_their_own():
    """Official Barlow Twins: two groups by `ndim == 1`, weights at 0.2 and the others at 0.0048, both x batch / 256."""
    model = Siamese()
    config = OptimConfig(name="lars", lr=0.2, lr_scaling="linear", bias_lr_scale=0.024, weight_decay=1e-6)
    optimizer = build_optimizer(config, model)
    assert len(optimizer.param_groups) == 2
    set_rates(optimizer, config.lr_at(0, 10, 1, 2048), 1e-6)
    found = rates(optimizer, model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert found[name] == pytest.approx(2048 / 256 * (0.0048 if p.ndim <= 1 else 0.2), rel=1e-12), name
    both = build_optimizer(OptimConfig(name="sgd", lr=1.0, bias_lr_scale=0.1, layer_decay=0.5), model)
    set_rates(both, 1.0, 0.0)
    found = rates(both, model)
    assert found["online.backbone.layer4.1.weight"] == pytest.approx(0.05)
    assert found["online.backbone.layer4.0.weight"] == 0.5 and found["temperature"] == pytest.approx(0.1)


@pytest.mark.parametrize("bias_lr_scale, predictor_lr_scale", [(1.0, 1.0), (0.1, 1.0), (1.0, 10.0), (0.1, 10.0)])
def test_a_predictor_keeps_the_peak_rate(bias_lr_scale, predictor_lr_scale):
    """Official SimSiam's --fix-pred-lr: init_lr = lr x batch / 256 in every epoch, here in the warm-up as well."""
    model = Siamese()
    config = OptimConfig(
        name="sgd",
        lr=0.05,
        lr_scaling="linear",
        warmup_epochs=2,
        fix_predictor_lr=True,
        bias_lr_scale=bias_lr_scale,
        predictor_lr_scale=predictor_lr_scale,
    )
    optimizer = build_optimizer(config, model)
    assert config.peak_lr(512) == pytest.approx(0.1)
    for step in (0, 2, 7, 9):
        lr = config.lr_at(step, 10, 1, 512)
        assert lr <= config.peak_lr(512)
        set_rates(optimizer, lr, 0.0, config.peak_lr(512))
        for name, rate in rates(optimizer, model).items():
            predictor = name.startswith(("online.predictor.", "head.predictor."))
            scale = bias_lr_scale if model.get_parameter(name).ndim <= 1 else 1.0
            scale *= predictor_lr_scale if predictor else 1.0
            assert rate == pytest.approx((0.1 if predictor else lr) * scale, rel=1e-12), name
    assert config.lr_at(0, 10, 1, 512) == 0 and config.lr_at(2, 10, 1, 512) == config.peak_lr(512)
    with pytest.raises(ValueError, match="needs peak_lr"):
        set_rates(optimizer, 0.1, 0.0)


def test_a_predictor_learns_at_a_multiple_of_the_rate():
    model = Siamese()
    optimizer = build_optimizer(OptimConfig(name="sgd", lr=1.0, predictor_lr_scale=10.0), model)
    for lr in (1.0, 0.25):
        set_rates(optimizer, lr, 0.0)
        for name, rate in rates(optimizer, model).items():
            assert rate == lr * (10.0 if name.startswith(("online.predictor.", "head.predictor.")) else 1.0), name


def test_a_predictor_that_is_not_there():
    for option, value, plain in (("fix_predictor_lr", True, "false"), ("predictor_lr_scale", 10.0, "1")):
        with pytest.raises(UserError, match=f"{option} is set, but Tiny has no predictor: set it to {plain}"):
            build_optimizer(OptimConfig(name="sgd", lr=1.0, **{option: value}), Tiny())
    assert len(parameter_groups(Siamese())) == 2
    assert OptimConfig(name="sgd", lr=0.3).peak_lr(4096) == 0.3


def test_nesterov_needs_momentum():
    with pytest.raises(UserError, match=r"optim\.nesterov=true needs optim\.momentum above 0"):
        build_optimizer(OptimConfig(name="sgd", lr=1.0, options={"momentum": 0.0, "nesterov": True}), Tiny())


def gradients():
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.randn(3, 2) * 10, torch.randn(4) * 0.01
    return parameters


def test_global_clipping_equals_torch():
    ours, theirs = gradients(), gradients()
    for a, b in zip(ours, theirs):
        b.grad = None if a.grad is None else a.grad.clone()
    norm = clip_gradients(ours, 1.5)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs, 1.5))
    torch.testing.assert_close(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad)


def test_per_tensor_clipping_as_in_official_dino():
    parameters = gradients()
    large, small = parameters[0].grad.clone(), parameters[1].grad.clone()
    clip_gradients(parameters, 3.0, "tensor")
    torch.testing.assert_close(parameters[0].grad, large * 3.0 / (large.norm() + 1e-6))
    torch.testing.assert_close(parameters[1].grad, small)
    before = parameters[0].grad.clone()
    clip_gradients(parameters, None)
    torch.testing.assert_close(parameters[0].grad, before)


def test_ema_closed_form_and_buffers_left_alone():
    online, target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    start, end = torch.randn(3), torch.randn(3)
    target.weight.data.copy_(start)
    online.weight.data.copy_(end)
    online.running_mean.fill_(7.0)
    for _ in range(5):
        ema_update(target, online, 0.9)
    torch.testing.assert_close(target.weight.data, 0.9**5 * start + (1 - 0.9**5) * end)
    assert (target.running_mean == 0).all()
