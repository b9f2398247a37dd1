"""LARS (You et al. 2017) in its three published forms."""

from typing import Literal, get_args

import torch
from torch import Tensor

from runtime.errors import UserError

Form = Literal["official", "tensorflow", "solo"]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling: q times the gradient of each weight, then SGD with momentum.

        official    q = eta |p| / |g + wd p|              buf <- momentum buf + q (g + wd p)       p <- p - lr buf
        tensorflow  q = eta |p| / |g + wd p|              buf <- momentum buf + lr q (g + wd p)    p <- p - buf
        solo        q = eta |p| / (|g| + wd |p| + 1e-8)   buf <- momentum buf + q (g + wd p)       p <- p - lr buf

    official: facebookresearch's DINO, Barlow Twins, VICReg and MoCo v3. tensorflow: google-research's SimCLR with
    `classic_momentum`; the rate stands inside the buffer, which differs from official whenever the rate changes. solo:
    Lightning Bolts, solo-learn and lightly add the norms, and where |g| = 0 leave out the decay. With clip_lr q becomes
    min(q / lr, 1), so that lr q is the smaller of q and lr (solo-learn's CIFAR configs, with eta = 0.02).

    q = 1 where a norm is 0; buf starts at 0. Biases and norm parameters, here all of at most one dimension, have
    neither decay nor q (TensorFlow's code tells them by name, lightly's by a decay of 0).
    """

    def __init__(
        self,
        params,
        *,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 1e-3,
        form: Form = "official",
        clip_lr: bool = False,
    ):
        if form not in get_args(Form):
            raise UserError(f"optim.form={form!r} is unknown; one of: {', '.join(get_args(Form))}")
        if clip_lr and form != "solo":
            raise UserError(f"optim.clip_lr=true is for optim.form=solo: remove it, optim.form is {form}")
        options = {"momentum": momentum, "eta": eta, "form": form, "clip_lr": clip_lr}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | options)

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ARG002 - the signature of torch.optim.Optimizer
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            weights, others = [p for p in moved if p.ndim > 1], [p for p in moved if p.ndim <= 1]
            parameters = weights + others
            updates = [*_scaled(weights, group), *(p.grad for p in others)]
            for p in parameters:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            inside, outside = (group["lr"], 1.0) if group["form"] == "tensorflow" else (1.0, group["lr"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates, alpha=inside)
            torch._foreach_add_(parameters, buffers, alpha=-outside)


def _scaled(weights: list[Tensor], group: dict) -> list[Tensor]:
    """q (g + wd p) of each weight. Norms stay on the device, and torch.where decides about them: no host sync."""
    if not weights:
        return []
    grads, decay = [p.grad for p in weights if p.grad is not None], group["weight_decay"]
    updates = list(torch._foreach_add(grads, weights, alpha=decay))
    p_norms = torch.stack(torch._foreach_norm(weights))  # (n_weights,)
    if group["form"] == "solo":
        g_norms = torch.stack(torch._foreach_norm(grads))  # (n_weights,)
        q = group["eta"] * p_norms / (g_norms + decay * p_norms + 1e-8)
        q = (q / group["lr"]).clamp(max=1.0) if group["clip_lr"] else q
        q = torch.where(g_norms > 0, q, 0.0)  # 0 and not 1: without the decay, too
        q = torch.where(p_norms > 0, q, 1.0)
    else:
        g_norms = torch.stack(torch._foreach_norm(updates))  # (n_weights,)
        q = torch.where((p_norms > 0) & (g_norms > 0), group["eta"] * p_norms / g_norms, 1.0)
    torch._foreach_mul_(updates, list(q))
    return updates
