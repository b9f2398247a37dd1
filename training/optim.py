"""Optimizers by name, rates, parameter groups, precision, and the step that gradients make."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.precision import PRECISIONS
from runtime.schema import choice
from runtime.values import (
    BelowOne,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveFloat,
    PositiveShare,
    Range,
    UnitInterval,
)
from training.lars import LARS, Form
from training.schedule import (
    warmup_constant,
    warmup_cosine,
    warmup_cosine_7_16,
    warmup_exponential,
    warmup_steps,
)

# Of rates, their factors and decays, whose products single precision must hold
Factor = Annotated[float, Range(least=0, most=1e10)]
PositiveFactor = Annotated[float, Range(above=0, most=1e10)]


def sgd(groups, *, momentum: UnitInterval = 0.9, nesterov: bool = False):
    """Stochastic gradient descent.

    Args:
        momentum: factor on what is left of the steps before.
        nesterov: look ahead by that momentum.

    Raises:
        UserError: nesterov without momentum.
    """
    if nesterov and not momentum:
        raise UserError("optim.nesterov=true needs optim.momentum above 0: set one of the two")
    return torch.optim.SGD(groups, lr=0.0, momentum=momentum, nesterov=nesterov)


def adam(groups, *, betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)):
    """Adam, with weight decay inside the gradient.

    Args:
        betas: decay of the averages of the gradient and of its square.
    """
    return torch.optim.Adam(groups, lr=0.0, betas=betas)


def adamw(groups, *, betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)):
    """Adam, with weight decay beside the gradient.

    Args:
        betas: decay of the averages of the gradient and of its square.
    """
    return torch.optim.AdamW(groups, lr=0.0, betas=betas)


def lars(
    groups,
    *,
    momentum: UnitInterval = 0.9,
    eta: PositiveFactor = 1e-3,
    form: Form = "official",
    clip_lr: bool = False,
):
    """Layer-wise adaptive rate scaling, for large batches; see training/lars.py.

    Args:
        momentum: factor on what is left of the steps before.
        eta: trust coefficient: size of a step per size of the weights.
        form: where norms, rate and momentum meet.
        clip_lr: a weight's rate is never above the schedule's.
    """
    return LARS(groups, momentum=momentum, eta=eta, form=form, clip_lr=clip_lr)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw, "lars": lars}


@dataclass(kw_only=True)
class OptimConfig:
    name: str = choice(OPTIMIZERS)
    lr: PositiveFactor  # learning rate where the warm-up ends
    lr_scaling: Literal["linear", "none"] = "none"  # linear: lr is per 256 images of a step
    schedule: Literal["cosine", "cosine_7_16", "constant", "steps", "exponential"] = "cosine"  # cosine_7_16: FixMatch's
    steps: tuple[OpenUnitInterval, ...] = (0.6, 0.8)  # `steps`: a tenth of the rate after each of these parts of a run
    decay: PositiveShare = 0.95  # `exponential`: factor on the rate after every epoch
    warmup_epochs: NonNegativeFloat = 0.0  # the rate rises linearly over so many epochs
    final_lr: Factor = 0.0  # where the cosine ends
    weight_decay: Factor = 0.0  # of weights; not of biases and norms, unless decay_norms
    final_weight_decay: Factor | None = None  # a cosine from weight_decay to this (DINO); none: constant
    layer_decay: PositiveShare = 1.0  # learning rate x this per stage (ResNet, ConvNeXt) or block (others) to the head
    decay_norms: bool = False  # decay biases and norms, too (official SGD recipes of MoCo, SimSiam, SupCon, PsCo)
    backbone_lr: PositiveFactor | None = None  # where `lr` is, for a module `backbone`; none: lr
    bias_lr_scale: Factor = 1.0  # learning rate x this for biases, norms; Barlow Twins: 0.0048 / 0.2 = 0.024
    fix_predictor_lr: bool = False  # a module `predictor` learns at the peak rate throughout (SimSiam)
    predictor_lr_scale: PositiveFactor = 1.0  # learning rate x this for a module `predictor`; BYOL without target: 10
    clip: PositiveFloat | None = None  # largest gradient norm
    clip_mode: Literal["global", "tensor"] = "global"  # tensor: each parameter by itself, as official DINO does
    options: dict = field(default_factory=dict)

    def peak_lr(self, batch_size: int) -> float:
        """Learning rate where the warm-up ends; `batch_size` counts the images of all processes and accumulated
        batches."""
        return self.lr * batch_size / 256 if self.lr_scaling == "linear" else self.lr

    def lr_at(self, step: int, total: int, epoch_steps: int, batch_size: int) -> float:
        """Learning rate of a step; `batch_size` as for `peak_lr`."""
        start = self.peak_lr(batch_size)
        warmup = round(self.warmup_epochs * epoch_steps)
        if self.schedule == "constant":
            return warmup_constant(step, total, start=start, warmup=warmup)
        if self.schedule == "cosine_7_16":
            return warmup_cosine_7_16(step, total, start=start, warmup=warmup)
        if self.schedule == "steps":
            return warmup_steps(step, total, start=start, warmup=warmup, at=self.steps)
        if self.schedule == "exponential":
            return warmup_exponential(
                step, total, start=start, epoch_steps=epoch_steps, factor=self.decay, warmup=warmup
            )
        return warmup_cosine(step, total, start=start, end=self.final_lr, warmup=warmup)

    def weight_decay_at(self, step: int, total: int) -> float:
        if self.final_weight_decay is None:
            return self.weight_decay
        return warmup_cosine(step, total, start=self.weight_decay, end=self.final_weight_decay)


def build_optimizer(config: OptimConfig, model: nn.Module) -> torch.optim.Optimizer:
    if config.decay_norms and config.name == "lars":
        raise UserError("optim.decay_norms=true: LARS decays no biases and norms; set it to false")
    groups = parameter_groups(
        model,
        layer_decay=config.layer_decay,
        backbone_lr_scale=1.0 if config.backbone_lr is None else config.backbone_lr / config.lr,
        decay_norms=config.decay_norms,
        bias_lr_scale=config.bias_lr_scale,
        fix_predictor_lr=config.fix_predictor_lr,
        predictor_lr_scale=config.predictor_lr_scale,
    )
    return OPTIMIZERS[config.name](groups, **config.options)


def parameter_groups(
    model: nn.Module,
    *,
    layer_decay: float = 1.0,
    backbone_lr_scale: float = 1.0,
    decay_norms: bool = False,
    bias_lr_scale: float = 1.0,
    fix_predictor_lr: bool = False,
    predictor_lr_scale: float = 1.0,
) -> list[dict]:
    """Trainable parameters by (weight decay or not, learning-rate scale, fixed learning rate or not).

    Decayed: more than one dimension and not a bias (official DINO's rule), or all with `decay_norms`. A group's
    `lr_scale` is layer_decay^(L+1-l) with l = 0 for the stem (a MobileNet's counts as its first block), 1..L for the
    stages and L+1 for heads (official DINOv2's rule), times bias_lr_scale for parameters of at most one dimension,
    biases and norms (official Barlow Twins' rule). Only a module named `backbone` has a stem and stages; RD4AD's
    decoder, with its own layers 1 to 3, is a head. backbone_lr_scale multiplies all of such a module's.
    `fixed_lr`: with fix_predictor_lr the parameters of a module named `predictor`, which no schedule moves (official
    SimSiam's --fix-pred-lr). predictor_lr_scale multiplies theirs: BYOL needs no target if the predictor learns ten
    times as fast (Grill et al. 2020, appendix), and in short runs its embeddings keep their rank.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depths = {name: depth_of(name) for name, _ in named}
    head = max((d for d in depths.values() if d is not None), default=0) + 1
    groups, predictors, backbones = {}, [], []
    for name, p in named:
        depth = depths[name]
        depth = head if depth is None else depth
        decayed = decay_norms or (p.ndim > 1 and not name.endswith(".bias"))
        scale = layer_decay ** (head - depth) * (bias_lr_scale if p.ndim <= 1 else 1.0)
        if "backbone" in name.split(".")[:-1]:
            backbones.append(name)
            scale *= backbone_lr_scale
        predicts = "predictor" in name.split(".")[:-1]
        if predicts:
            predictors.append(name)
            scale *= predictor_lr_scale
        fixed = fix_predictor_lr and predicts
        group = {"params": [], "decayed": decayed, "lr_scale": scale, "fixed_lr": fixed}
        groups.setdefault((decayed, scale, fixed), group)["params"].append(p)
    for option, asked, plain, part, found in (
        ("fix_predictor_lr", fix_predictor_lr, "false", "predictor", predictors),
        ("predictor_lr_scale", predictor_lr_scale != 1.0, "1", "predictor", predictors),
        ("backbone_lr", backbone_lr_scale != 1.0, "none", "backbone to train", backbones),
    ):
        if asked and not found:
            raise UserError(f"optim.{option} is set, but {type(model).__name__} has no {part}: set it to {plain}")
    return list(groups.values())


STEM = re.compile(r"(conv1|bn1|stem|patch_embed|cls_token|pos_embed|register_tokens)(\.|$)")
STAGE = re.compile(r"(layer|features\.|blocks\.|stages\.)(\d+)\.")


def depth_of(name: str) -> int | None:
    """Position of a backbone's parameter by its published name; None for what follows the stages and for everything
    outside a module `backbone`."""
    inside = re.search(r"(?:^|\.)backbone\.(.+)", name)
    if inside and STEM.match(inside[1]):
        return 0
    stage = inside and STAGE.match(inside[1])
    return int(stage[2]) + (stage[1] != "layer") if stage else None  # ResNet's stages count from 1


def set_rates(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float, peak_lr: float | None = None) -> None:
    """Write this step's learning rate and weight decay into the groups; a fixed rate is `peak_lr`."""
    for group in optimizer.param_groups:
        if group["fixed_lr"] and peak_lr is None:
            raise ValueError("set_rates needs peak_lr: this optimizer has a group of fixed learning rate")
        group["lr"] = (peak_lr if group["fixed_lr"] else lr) * group["lr_scale"]
        group["weight_decay"] = weight_decay if group["decayed"] else 0.0


@torch.no_grad()
def clip_gradients(parameters, max_norm: float | None, mode: str = "global") -> Tensor:
    """Scale gradients in place to at most `max_norm`; returns the global norm before, without a host sync.

    global: one norm over all parameters (torch.nn.utils.clip_grad_norm_). tensor: each parameter's gradient by its own
    norm, g *= min(1, max_norm / (|g| + 1e-6)): what official DINO's clip_gradients does.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads))  # (n_parameters,)
    total = norms.norm()
    if max_norm is not None:
        scale = max_norm / ((norms if mode == "tensor" else total.expand_as(norms)) + 1e-6)
        torch._foreach_mul_(grads, list(scale.clamp(max=1.0)))
    return total


def mixed_precision(name: str, device: torch.device) -> tuple[Callable[[], torch.autocast], torch.amp.GradScaler]:
    """What makes the context of a forward pass in `fp32`, `bf16` or `fp16`, and the loss's scaler, which does something
    in fp16 only."""
    dtype = PRECISIONS[name]
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=name == "fp16")


def apply_gradients(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: Iterable[nn.Parameter],
    config: OptimConfig,
    frozen: Iterable[nn.Parameter] = (),
) -> Tensor:
    """Clip the gradients as `config` says, step, and drop them; returns their norm before, without a host sync.

    Args:
        scaler: that scaled the loss.
        parameters: all whose gradients are clipped together, the frozen ones among them (as in official DINO).
        frozen: parameters that this step leaves alone, weight decay included.
    """
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(parameters, config.clip, config.clip_mode)
    for parameter in frozen:
        parameter.grad = None  # and not zero, which AdamW would decay
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm
