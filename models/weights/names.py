"""Other libraries' parameter names for these backbones, as rules: (pattern, replacement) on the whole name.

Each layout is known by names that together only it has. A rule's pattern may follow a prefix such as `module.backbone`,
which stays; the first pattern that fits a name is used, and a name that none fits stays as it is. Networks that are not
ours can have a layout's names as well: where its rules make one name of two, they are not used.
"""

import re
from collections.abc import Callable, Iterable

Rule = tuple[str, str | Callable[[re.Match], str]]


def _half(match: re.Match) -> str:
    """torchvision's ConvNeXt: features.1, 3, 5, 7 are the stages 0 to 3."""
    return f"stages.{int(match[1]) // 2}.blocks.{match[2]}."


def _flat(offsets: tuple[int, ...], inner: str) -> Callable[[re.Match], str]:
    """timm's blocks.s.b -> torchvision's features.(offsets[s] + b)."""
    return lambda match: f"features.{offsets[int(match[1])] + int(match[2])}.{inner}"


V2 = (1, 2, 4, 7, 11, 14, 17)  # features at which MobileNetV2's stages begin
V3_LARGE = (1, 2, 4, 7, 11, 13, 16)
V3_SMALL = (1, 2, 4, 7, 9, 12)
V3_BLOCK = r"blocks\.(\d)\.(\d)\."
MBCONV = r"blocks\.([1-6])\.(\d+)\."


def _v3(offsets: tuple[int, ...], squeezed: frozenset[int]) -> list[Rule]:
    """timm's MobileNetV3; `squeezed` are the `features` with squeeze and excitation, one module more before the last.
    The first block expands nothing, and its modules come one earlier. The last stage is a plain convolution."""

    def place(number: int, after_squeeze: bool) -> Callable[[re.Match], str]:
        def name(match: re.Match) -> str:
            i = offsets[int(match[1])] + int(match[2])
            at = number - (i == 1) + (after_squeeze and i in squeezed)
            return f"features.{i}.block.{at}."

        return name

    def norm(match: re.Match) -> str:
        first = match[1] == match[2] == "0"
        number = int(match[3]) - 1  # of bn1, bn2, bn3: after the expansion, the filter, the projection
        return place(number + first, number + first == 2)(match) + "1."

    last = len(offsets) - 1
    return [
        (rf"blocks\.{last}\.0\.conv\.", f"features.{offsets[last]}.0."),
        (rf"blocks\.{last}\.0\.bn1\.", f"features.{offsets[last]}.1."),
        (r"blocks\.(0)\.(0)\.conv_pw\.", lambda m: place(2, True)(m) + "0."),
        (V3_BLOCK + r"conv_pw\.", lambda m: place(0, False)(m) + "0."),
        (V3_BLOCK + r"conv_dw\.", lambda m: place(1, False)(m) + "0."),
        (V3_BLOCK + r"conv_pwl\.", lambda m: place(2, True)(m) + "0."),
        (V3_BLOCK + r"se\.conv_reduce\.", lambda m: place(2, False)(m) + "fc1."),
        (V3_BLOCK + r"se\.conv_expand\.", lambda m: place(2, False)(m) + "fc2."),
        (V3_BLOCK + r"bn(\d)\.", norm),
        (r"conv_stem\.", "features.0.0."),
        (r"bn1\.", "features.0.1."),
        (r"conv_head\.", "classifier.0."),
        (r"classifier\.", "classifier.3."),
    ]


def _mbconv(squeezed: bool) -> list[Rule]:
    """timm's EfficientNet: blocks.s.b is features.(s + 1).b. Its first stage expands nothing, so that its modules come
    one earlier; `squeezed`: with squeeze and excitation, one module more before the last."""

    def place(at: int, inner: str) -> Callable[[re.Match], str]:
        return lambda match: f"features.{int(match[1]) + 1}.{match[2]}.block.{at}.{inner}"

    rules, last = [], 1 + squeezed  # `last`: the projection of the first stage
    for stage, names, first in ((r"blocks\.(0)\.(\d+)\.", ("dw", "pw"), 0), (MBCONV, ("pw", "dw", "pwl"), 1)):
        numbers = (*range(first + 1), first + last)  # of its convolutions
        for i, (name, at) in enumerate(zip(names, numbers), 1):
            rules += [(rf"{stage}conv_{name}\.", place(at, "0.")), (rf"{stage}bn{i}\.", place(at, "1."))]
        rules += [(rf"{stage}se\.conv_reduce\.", place(first + 1, "fc1."))]
        rules += [(rf"{stage}se\.conv_expand\.", place(first + 1, "fc2."))]
    rules += [(r"conv_stem\.", "features.0.0."), (r"bn1\.", "features.0.1.")]
    rules += [(r"conv_head\.", "features.8.0."), (r"bn2\.", "features.8.1.")]
    return [*rules, (r"classifier\.", "classifier.1.")]


# layout: (names that together only it has, rules)
LAYOUTS: dict[str, tuple[tuple[str, ...], list[Rule]]] = {
    "torchvision's ConvNeXt": (
        (r"features\.1\.0\.layer_scale$",),
        [
            (r"features\.0\.", "stem."),
            (r"features\.([2468])\.", lambda m: f"stages.{int(m[1]) // 2}.downsample."),
            (r"features\.(\d)\.(\d+)\.layer_scale", lambda m: _half(m) + "gamma"),
            (r"features\.(\d)\.(\d+)\.block\.0\.", lambda m: _half(m) + "conv_dw."),
            (r"features\.(\d)\.(\d+)\.block\.2\.", lambda m: _half(m) + "norm."),
            (r"features\.(\d)\.(\d+)\.block\.3\.", lambda m: _half(m) + "mlp.fc1."),
            (r"features\.(\d)\.(\d+)\.block\.5\.", lambda m: _half(m) + "mlp.fc2."),
            (r"classifier\.0\.", "head.norm."),
            (r"classifier\.2\.", "head.fc."),
        ],
    ),
    "official ConvNeXt": (
        (r"downsample_layers\.0\.0\.weight$", r"stages\.0\.0\.dwconv\.weight$"),
        [
            (r"downsample_layers\.0\.", "stem."),
            (r"downsample_layers\.([123])\.", r"stages.\1.downsample."),
            (r"stages\.(\d)\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
            (r"stages\.(\d)\.(\d+)\.pwconv([12])\.", r"stages.\1.blocks.\2.mlp.fc\3."),
            (r"stages\.(\d)\.(\d+)\.grn\.gamma", r"stages.\1.blocks.\2.mlp.grn.weight"),
            (r"stages\.(\d)\.(\d+)\.grn\.beta", r"stages.\1.blocks.\2.mlp.grn.bias"),
            (r"stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"norm\.", "head.norm."),
            (r"head\.", "head.fc."),
        ],
    ),
    "torchvision's ViT": (
        (r"encoder\.layers\.encoder_layer_0\.ln_1\.weight$",),
        [
            (r"class_token$", "cls_token"),
            (r"conv_proj\.", "patch_embed.proj."),
            (r"encoder\.pos_embedding$", "pos_embed"),
            (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.", r"blocks.\1.norm\2."),
            (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
            (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
            (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.", r"blocks.\1.mlp.fc1."),
            (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.", r"blocks.\1.mlp.fc2."),
            (r"encoder\.ln\.", "norm."),
            (r"heads\.head\.", "head."),
        ],
    ),
    "DINOv2's chunks of blocks": (
        (r"blocks\.0\.0\.norm1\.weight$", r"blocks\.0\.0\.ls1\.gamma$"),
        [(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.")],
    ),
    "timm's ViT with registers": (  # its class token has its position added
        (r"reg_token$", r"blocks\.0\.norm1\.weight$"),
        [(r"reg_token$", "register_tokens")],
    ),
    "timm's MobileNetV3 small": (
        (r"blocks\.0\.0\.se\.conv_reduce\.weight$", r"blocks\.5\.0\.conv\.weight$"),
        _v3(V3_SMALL, frozenset({1, *range(4, 12)})),
    ),
    "timm's MobileNetV3 large": (
        (r"blocks\.2\.0\.se\.conv_reduce\.weight$", r"blocks\.6\.0\.conv\.weight$"),
        _v3(V3_LARGE, frozenset({4, 5, 6, *range(11, 16)})),
    ),
    "timm's EfficientNet": (
        (r"blocks\.0\.0\.se\.conv_reduce\.weight$", r"blocks\.6\.0\.conv_pwl\.weight$"),
        _mbconv(squeezed=True),
    ),
    "timm's EfficientNet-Lite": (
        (r"blocks\.0\.0\.conv_dw\.weight$", r"blocks\.5\.3\.conv_pwl\.weight$", r"blocks\.6\.0\.conv_pwl\.weight$"),
        _mbconv(squeezed=False),
    ),
    "timm's MobileNetV2": (
        (r"blocks\.1\.0\.conv_pwl\.weight$", r"blocks\.6\.0\.conv_pwl\.weight$", r"conv_head\.weight$"),
        [
            (r"blocks\.(0)\.(0)\.conv_dw\.", _flat(V2, "conv.0.0.")),
            (r"blocks\.(0)\.(0)\.bn1\.", _flat(V2, "conv.0.1.")),
            (r"blocks\.(0)\.(0)\.conv_pw\.", _flat(V2, "conv.1.")),
            (r"blocks\.(0)\.(0)\.bn2\.", _flat(V2, "conv.2.")),
            (r"blocks\.(\d)\.(\d)\.conv_pw\.", _flat(V2, "conv.0.0.")),
            (r"blocks\.(\d)\.(\d)\.bn1\.", _flat(V2, "conv.0.1.")),
            (r"blocks\.(\d)\.(\d)\.conv_dw\.", _flat(V2, "conv.1.0.")),
            (r"blocks\.(\d)\.(\d)\.bn2\.", _flat(V2, "conv.1.1.")),
            (r"blocks\.(\d)\.(\d)\.conv_pwl\.", _flat(V2, "conv.2.")),
            (r"blocks\.(\d)\.(\d)\.bn3\.", _flat(V2, "conv.3.")),
            (r"conv_stem\.", "features.0.0."),
            (r"bn1\.", "features.0.1."),
            (r"conv_head\.", "features.18.0."),
            (r"bn2\.", "features.18.1."),
            (r"classifier\.", "classifier.1."),
        ],
    ),
    "official CBAM": (
        (r"cbam\.ChannelGate\.mlp\.1\.weight$",),
        [
            (r"cbam\.ChannelGate\.mlp\.1\.", "cbam.channel.fc1."),
            (r"cbam\.ChannelGate\.mlp\.3\.", "cbam.channel.fc2."),
            (r"cbam\.SpatialGate\.spatial\.", "cbam.spatial."),
        ],
    ),
    "SupContrast's ResNet": (
        (r"layer2\.0\.shortcut\.0\.weight$", r"layer4\.0\.shortcut\.1\.weight$"),
        [(r"(layer\d\.\d+)\.shortcut\.", r"\1.downsample.")],
    ),
    "lightly's ResNet": (  # a Sequential of torchvision's children
        (r"\w*backbone\w*\.4\.0\.conv1\.weight$",),
        [
            (r"(\w*backbone\w*)\.0\.", r"\1.conv1."),
            (r"(\w*backbone\w*)\.1\.", r"\1.bn1."),
            (r"(\w*backbone\w*)\.([4567])\.", lambda m: f"{m[1]}.layer{int(m[2]) - 3}."),
        ],
    ),
}


def rename(names: Iterable[str]) -> tuple[dict[str, str], str | None]:
    """{name: name here} of all names of a file, and the layout, None if they are ours already."""
    names = list(names)
    for layout, (signature, rules) in LAYOUTS.items():
        if all(any(re.search(rf"(^|\.){part}", name) for name in names) for part in signature):
            try:
                renamed = {name: _rename(name, rules) for name in names}
            except IndexError:  # a network with more stages than this one
                continue
            if len(set(renamed.values())) == len(renamed):
                return renamed, layout
    return {name: name for name in names}, None


def _rename(name: str, rules: list[Rule]) -> str:
    for pattern, replacement in rules:
        if match := re.search(rf"(?:^|(?<=\.)){pattern}", name):
            new = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
            return name[: match.start()] + new + name[match.end() :]
    return name
