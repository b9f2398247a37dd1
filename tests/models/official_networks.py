"""The networks behind published checkpoints, written down from a state_dict in its own names with nothing but torch's
functions: oracles for what models/weights/load.py loads. Each gives pooled features, in eval mode."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=eps)


def cbam(state: State, name: str, x: Tensor) -> Tensor:
    """Jongchan/attention-module, MODELS/cbam.py."""
    raw = 0
    for pooled in (x.mean((2, 3)), x.amax((2, 3))):  # (B, C)
        hidden = F.linear(pooled, *(state[f"{name}.ChannelGate.mlp.1.{part}"] for part in ("weight", "bias"))).relu()
        raw = raw + F.linear(hidden, *(state[f"{name}.ChannelGate.mlp.3.{part}"] for part in ("weight", "bias")))
    x = x * raw.sigmoid()[:, :, None, None]
    two = torch.stack([x.amax(1), x.mean(1)], dim=1)  # (B, 2, H, W)
    gate = F.conv2d(two, state[f"{name}.SpatialGate.spatial.conv.weight"], padding=3)
    return x * norm(state, f"{name}.SpatialGate.spatial.bn", gate).sigmoid()


def resnet(state: State, x: Tensor, *, stride: int, padding: int, pool: bool, shortcut: str = "downsample") -> Tensor:
    """A ResNet whose stem is a convolution of this stride and padding, and a max pool or none; `shortcut` is what the
    projections are called: torchvision's word, or SupContrast's (networks/resnet_big.py). A CBAM where the state has
    one. solo-learn's CIFAR networks (solo/methods/base.py) are torchvision's with stride 1, padding 2 and no pool."""
    x = norm(state, "bn1", F.conv2d(x, state["conv1.weight"], stride=stride, padding=padding)).relu()
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    for stage in range(1, 5):
        block = 0
        while f"layer{stage}.{block}.conv1.weight" in state:
            name, step = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            last = 3 if f"{name}.conv3.weight" in state else 2
            y = x
            for n in range(1, last + 1):
                weight = state[f"{name}.conv{n}.weight"]
                here = step if n == last - 1 else 1  # a bottleneck strides in the middle, a basic block at the front
                y = norm(state, f"{name}.bn{n}", F.conv2d(y, weight, stride=here, padding=weight.shape[-1] // 2))
                y = y if n == last else y.relu()
            if f"{name}.cbam.ChannelGate.mlp.1.weight" in state:
                y = cbam(state, f"{name}.cbam", y)
            if f"{name}.{shortcut}.0.weight" in state:
                x = norm(state, f"{name}.{shortcut}.1", F.conv2d(x, state[f"{name}.{shortcut}.0.weight"], stride=step))
            x, block = (x + y).relu(), block + 1
    return x.mean((2, 3))


# timm's arch_def: (repeats, stride of the first, kernel, activation) of each stage
MOBILENET_V3_LARGE = [
    *((1, 1, 3, "relu"), (1, 2, 3, "relu"), (1, 1, 3, "relu"), (3, 2, 5, "relu"), (1, 2, 3, "hard_swish")),
    *((1, 1, 3, "hard_swish"), (2, 1, 3, "hard_swish"), (2, 1, 3, "hard_swish"), (3, 2, 5, "hard_swish")),
]
MOBILENET_V3_SMALL = [
    *((1, 2, 3, "relu"), (1, 2, 3, "relu"), (1, 1, 3, "relu"), (1, 2, 5, "hard_swish"), (2, 1, 5, "hard_swish")),
    *((2, 1, 5, "hard_swish"), (3, 2, 5, "hard_swish")),
]
MOBILENET_V2 = [(n, s, 3, "relu6") for n, s in ((1, 1), (2, 2), (3, 2), (4, 2), (3, 1), (3, 2), (1, 1))]
EFFICIENTNET_STAGES = ((1, 1, 3), (2, 2, 3), (2, 2, 5), (3, 2, 3), (3, 1, 5), (4, 2, 5), (1, 1, 3))
EFFICIENTNET_B1 = [(n, s, k, "swish") for n, (_, s, k) in zip((2, 3, 3, 4, 4, 5, 2), EFFICIENTNET_STAGES)]
EFFICIENTNET_LITE0 = [(*stage, "relu6") for stage in EFFICIENTNET_STAGES]
EFFICIENTNET_LITE1 = [(n, s, k, "relu6") for n, (_, s, k) in zip((1, 3, 3, 4, 4, 5, 1), EFFICIENTNET_STAGES)]
ACTIVATIONS = {"relu": F.relu, "relu6": F.relu6, "hard_swish": F.hardswish, "swish": F.silu}


def timm_mobilenet(state: State, x: Tensor, arch: list[tuple], *, eps: float = 1e-5, same: bool = False) -> Tensor:
    """timm's MobileNetV2 and V3, EfficientNet and Lite (timm/models/efficientnet.py, mobilenetv3.py). `same`:
    TensorFlow's padding."""
    swish = arch[0][3] == "swish"

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        kernel, groups = weight.shape[-1], x.shape[1] // weight.shape[1]
        if not same:
            return F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=groups)
        height, width = (max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[2:])
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def squeeze(name: str, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gates = (F.silu, torch.sigmoid) if swish else (F.relu, F.hardsigmoid)
        for layer, activation in zip(("conv_reduce", "conv_expand"), gates):
            gate = activation(F.conv2d(gate, state[f"{name}.{layer}.weight"], state[f"{name}.{layer}.bias"]))
        return x * gate

    one = len({activation for *_, activation in arch}) == 1  # which is then the stem's and the head's too
    stem = ACTIVATIONS[arch[0][3] if one else "hard_swish"]
    x = stem(norm(state, "bn1", conv("conv_stem", x, 2), eps))
    names = sorted({tuple(int(n) for n in name.split(".")[1:3]) for name in state if name.startswith("blocks.")})
    names = [f"blocks.{stage}.{block}" for stage, block in names]
    blocks = [(s if i == 0 else 1, k, act) for n, s, k, act in arch for i in range(n)]
    for name, (stride, kernel, activation) in zip(names, blocks):
        act, before = ACTIVATIONS[activation], x
        assert state[f"{name}.conv_dw.weight"].shape[-1] == kernel
        if f"{name}.conv_pwl.weight" in state:
            x = act(norm(state, f"{name}.bn1", conv(f"{name}.conv_pw", x), eps))
            inner, outer, last = "bn2", "bn3", "conv_pwl"
        else:
            inner, outer, last = "bn1", "bn2", "conv_pw"
        x = act(norm(state, f"{name}.{inner}", conv(f"{name}.conv_dw", x, stride), eps))
        x = squeeze(f"{name}.se", x) if f"{name}.se.conv_reduce.weight" in state else x
        x = norm(state, f"{name}.{outer}", conv(f"{name}.{last}", x), eps)
        x = x + before if stride == 1 and x.shape == before.shape else x
    if one:
        return stem(norm(state, "bn2", conv("conv_head", x), eps)).mean((2, 3))
    assert len(names) == len(blocks) + 1  # the last stage is one convolution
    return F.hardswish(norm(state, f"{names[-1]}.bn1", conv(f"{names[-1]}.conv", x), eps)).mean((2, 3))


def vit(state: State, x: Tensor, *, heads: int, registers: str = "register_tokens") -> Tensor:
    """DINO's, DINOv2's, MoCo v3's and timm's ViT, at its own size: the class token behind the last norm. With timm's
    `reg_token` the class token has no position."""

    def part(name: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.weight"], state[f"{name}.bias"]

    weight, bias = part("patch_embed.proj")
    x = F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).mT  # (B, N, D)
    token, width = state["cls_token"].expand(len(x), -1, -1), x.shape[2]
    if state["pos_embed"].shape[1] == x.shape[1]:
        x = torch.cat([token, x + state["pos_embed"]], dim=1)
    else:
        x = torch.cat([token, x], dim=1) + state["pos_embed"]
    if registers in state:
        x = torch.cat([x[:, :1], state[registers].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    blocks = {name.split(".norm1.")[0] for name in state if ".norm1." in name}  # blocks.3, or blocks.0.3 in chunks
    for name in sorted(blocks, key=lambda name: int(name.split(".")[-1])):
        y = F.layer_norm(x, (width,), *part(f"{name}.norm1"), eps=1e-6)
        q, k, v = F.linear(y, *part(f"{name}.attn.qkv")).unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        y = ((q @ k.mT * (width // heads) ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, T, D)
        x = x + F.linear(y, *part(f"{name}.attn.proj")) * state.get(f"{name}.ls1.gamma", 1)
        y = F.gelu(F.linear(F.layer_norm(x, (width,), *part(f"{name}.norm2"), eps=1e-6), *part(f"{name}.mlp.fc1")))
        x = x + F.linear(y, *part(f"{name}.mlp.fc2")) * state.get(f"{name}.ls2.gamma", 1)
    return F.layer_norm(x, (width,), *part("norm"), eps=1e-6)[:, 0]
