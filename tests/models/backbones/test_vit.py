"""ViT against torchvision's; position embeddings, attention, stages against their definitions; names against timm's."""

import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
import torchvision

from models.backbones import BACKBONES
from models.backbones.resnet import ResNet18
from models.backbones.stages import train_stages
from models.backbones.vit import ViTBase, ViTSmall, ViTTiny, resample
from models.backbones.vit_moco import ViTMoCoBase, ViTMoCoSmall
from models.ssl.moco_v3 import MoCoV3
from models.weights.load import load_weights
from runtime.errors import UserError
from tests.slow import leaving

PUBLISHED = {  # parameters with 1000 classes and without
    "vit_tiny": (5_717_416, 5_524_416),
    "vit_small": (22_050_664, 21_665_664),
    "vit_base": (86_567_656, 85_798_656),
    "vit_moco_small": (22_050_664, 21_665_664),
    "vit_moco_base": (86_567_656, 85_798_656),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_numbers_and_names_are_timms(name):
    with torch.device("meta"):
        model, backbone = BACKBONES[name](num_classes=1000), BACKBONES[name]()
    assert (sum(p.numel() for p in model.parameters()), sum(p.numel() for p in backbone.parameters())) == PUBLISHED[
        name
    ]
    names = hashlib.sha256("\n".join(sorted(model.state_dict())).encode()).hexdigest()[:16]
    assert names == "3140050d56e79b92"  # of vit_*_patch16_224 in timm 1.0.31, taken from its models


def test_base_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    theirs = torchvision.models.vit_b_16(image_size=64).eval()
    torch.nn.init.normal_(theirs.heads.head.weight, std=0.1)
    torch.nn.init.normal_(theirs.class_token)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = ViTBase(num_classes=1000, size=64).eval()
    report = load_weights(ours, tmp_path / "vit.pth")
    assert report == "vit.pth: 152 tensors loaded with the names of torchvision's ViT"
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits = ours(images)
        torch.testing.assert_close(logits, theirs(images), rtol=1e-5, atol=1e-5)
    assert logits.std() > 1e-2


def test_stages_are_the_patches_of_every_third_block():
    torch.manual_seed(0)
    net = ViTTiny(size=32, patch=8, registers=2).eval()
    images, outputs = torch.randn(2, 3, 32, 24), []
    for block in net.blocks:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))  # noqa: ARG005
    with torch.no_grad():
        maps = net.forward_stages(images)
        assert len(outputs) == 12
        for stage, number in enumerate((3, 6, 9, 12)):
            for i in range(4):
                for j in range(3):
                    token = outputs[number - 1][:, 1 + 2 + 3 * i + j]  # behind the class token and the registers
                    assert torch.equal(maps[stage][:, :, i, j], token)
        outputs.clear()
        assert torch.equal(net.forward_stages(images, last=2)[1], maps[1]) and len(outputs) == 6
        first, patches = net.forward_tokens(images)
        assert torch.equal(first, net(images))
        normed = net.norm(maps[3].flatten(2).transpose(1, 2))
        torch.testing.assert_close(patches, normed)


def test_attention_maps_are_what_the_last_block_uses():
    torch.manual_seed(0)
    net = ViTTiny(size=32, patch=8).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
        images = torch.randn(2, 3, 32, 32)
        maps = net.attention_maps(images)
        assert maps.shape == (2, 3, 17, 17)
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 17))
        x = net.tokens(images)
        for block in net.blocks[:-1]:
            x = block(x)
        block = net.blocks[-1]
        qkv = block.attn.qkv(block.norm1(x))
        seen = torch.empty(2, 17, 0)
        for head in range(3):
            q, k, v = (qkv[..., part * 192 + head * 64 : part * 192 + (head + 1) * 64] for part in range(3))
            weights = torch.softmax(q @ k.transpose(1, 2) / 64**0.5, dim=-1)
            torch.testing.assert_close(maps[:, head], weights)
            seen = torch.cat([seen, weights @ v], dim=-1)
        torch.testing.assert_close(block.attn(block.norm1(x)), block.attn.proj(seen))


def official_dino(pos_embed, h, w):
    """interpolate_pos_encoding of facebookresearch/dino's vision_transformer.py, for its case of another size."""
    n, dim = pos_embed.shape[1] - 1, pos_embed.shape[-1]
    grid = pos_embed[:, 1:].reshape(1, int(n**0.5), int(n**0.5), dim).permute(0, 3, 1, 2)
    scale = ((h + 0.1) / n**0.5, (w + 0.1) / n**0.5)
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    assert grid.shape[2:] == (h, w)
    return torch.cat((pos_embed[:, :1], grid.permute(0, 2, 3, 1).reshape(1, -1, dim)), dim=1)


@pytest.mark.parametrize("h, w", [(6, 6), (12, 12), (14, 7), (28, 30), (1, 1), (37, 37)])
def test_position_embeddings_of_other_sizes(h, w):
    torch.manual_seed(0)
    positions = torch.randn(1, 1 + 14 * 14, 8)
    torch.testing.assert_close(resample(positions, h, w, "dino"), official_dino(positions, h, w), rtol=0, atol=0)
    grid = positions[:, 1:].view(1, 14, 14, 8).permute(0, 3, 1, 2)
    timm = F.interpolate(grid, size=(h, w), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(resample(positions, h, w, "timm"), torch.cat([positions[:, :1], timm], dim=1))
    assert not torch.allclose(resample(positions, h, w, "timm"), resample(positions, h, w, "dino"), atol=1e-3)


def test_the_own_size_is_not_interpolated():
    net = ViTTiny(size=32, patch=8)
    assert net.positions(4, 4) is net.pos_embed
    assert net.positions(4, 5).shape == (1, 21, 192)


def test_dinov2s_additions_load_by_its_names(tmp_path):
    """Layer scale, registers, a mask token that is left over, positions for 37 x 37 patches, blocks in chunks."""
    torch.manual_seed(0)
    source = ViTTiny(size=518, patch=14, layer_scale=1e-5, registers=4)
    state = {}
    for name, tensor in source.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            name = ".".join(["blocks", str(int(parts[1]) // 6), *parts[1:]])
        state[f"backbone.{name}"] = torch.randn_like(tensor) * 0.05
    state["backbone.mask_token"] = torch.zeros(1, 192)
    torch.save({"teacher": state}, tmp_path / "dinov2.pth")
    net = ViTTiny(size=518, patch=14, layer_scale=1e-5, registers=4)
    report = load_weights(net, tmp_path / "dinov2.pth")
    assert report == (
        "dinov2.pth: 175 tensors loaded from part teacher with the names of DINOv2's chunks of blocks; "
        "left over: teacher.backbone.mask_token"
    )
    assert torch.equal(net.blocks[7].ls2.gamma, state["backbone.blocks.1.7.ls2.gamma"])
    small = ViTTiny(size=224, patch=14, layer_scale=1e-5, registers=4)
    report = load_weights(small, tmp_path / "dinov2.pth")
    assert "; resized: pos_embed [1, 1370, 192] to [1, 257, 192]; " in report
    assert torch.equal(small.pos_embed, official_dino(state["backbone.pos_embed"], 16, 16))
    with pytest.raises(UserError, match=r"it fits backbone.name=vit_tiny backbone.patch=14 backbone.size=518 "):
        load_weights(ViTTiny(), tmp_path / "dinov2.pth")


def test_timms_dinov2_with_registers_loads(tmp_path):
    """There the class token has its position added, as timm's _convert_dinov2 does it."""
    torch.manual_seed(0)
    ours = ViTTiny(size=48, patch=16, registers=4).eval()
    torch.nn.init.normal_(ours.cls_token)
    state = dict(ours.state_dict())
    state["reg_token"] = state.pop("register_tokens")
    state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "reg4.pth")
    theirs = ViTTiny(size=48, patch=16, registers=4).eval()
    assert load_weights(theirs, tmp_path / "reg4.pth") == (
        "reg4.pth: 151 tensors loaded with the names of timm's ViT with registers; "
        "resized: pos_embed [1, 9, 192] to [1, 10, 192]"
    )
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images))
    other = ViTTiny(size=64, patch=16, registers=4, interpolation="timm")
    assert "pos_embed [1, 9, 192] to [1, 17, 192]" in load_weights(other, tmp_path / "reg4.pth")
    assert torch.equal(other.pos_embed[:, 1:], resample(ours.pos_embed, 4, 4, "timm")[:, 1:])
    assert not other.pos_embed[:, 0].any()
    with pytest.raises(UserError, match=r"it fits backbone\.name=vit_tiny .*backbone\.registers=4"):
        load_weights(ViTTiny(size=48), tmp_path / "reg4.pth")


def test_mocos_positions_are_sines():
    """Against the definition, position by position, in float64; a position's token is its row-major one."""
    net = ViTMoCoSmall(size=96, patch=16)
    assert not net.pos_embed[0, 0].any()
    for row in range(6):
        for column in range(6):
            for n in range(96):
                rate = 10000 ** (-n / 96)
                theirs = [f(place * rate) for place in (row, column) for f in (math.sin, math.cos)]
                ours = net.pos_embed[0, 1 + 6 * row + column, n::96].tolist()
                assert ours == pytest.approx(theirs, abs=1e-5)


def test_mocos_start_and_what_stays_as_it_is():
    torch.manual_seed(0)
    net = ViTMoCoSmall(size=32)
    assert net.blocks[0].attn.heads == 12 and ViTMoCoBase(size=32).blocks[0].attn.heads == 12
    bounds = {"attn.qkv": 6 / (384 + 384), "attn.proj": 6 / (384 + 384), "mlp.fc1": 6 / (384 + 1536)}
    for name, squared in bounds.items():
        weight = net.blocks[5].get_submodule(name).weight
        assert weight.abs().max().item() == pytest.approx(squared**0.5, rel=1e-3) and weight.mean().abs() < 1e-3
    proj = net.patch_embed["proj"]
    assert proj.weight.abs().max().item() == pytest.approx((6 / (3 * 16 * 16 + 384)) ** 0.5, rel=1e-3)
    assert not proj.bias.any() and not net.blocks[5].attn.qkv.bias.any()
    assert net.cls_token.std().item() == pytest.approx(1e-6, rel=0.2)
    method = MoCoV3(net, layers=3, hidden=16, out=8, predictor_norm=True)
    loss, _ = method([torch.randn(4, 3, 32, 32) for _ in range(2)], torch.arange(4))
    loss.backward()
    still = [name for name, p in net.named_parameters() if p.grad is None]
    assert still == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert net(torch.randn(1, 3, 48, 64)).shape == (1, 384)  # its positions take other sizes, too


@pytest.mark.slow
def test_mocos_small_one_does_not_pass_for_dinos(tmp_path):
    """Both have the same names and shapes, and other heads."""
    state = {f"module.base_encoder.{n}": t for n, t in ViTMoCoSmall(size=64).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "vit-s.pth")
    for size in (64, 96):
        assert "150 tensors loaded from part base_encoder" in load_weights(
            ViTMoCoSmall(size=size), tmp_path / "vit-s.pth"
        )
        with pytest.raises(UserError, match=r"sines, so it has 12 heads, not 6; set backbone\.name=vit_moco_small"):
            load_weights(ViTSmall(size=size), tmp_path / "vit-s.pth")
    for other in (ViTTiny(size=64), ViTMoCoBase(size=64), ResNet18()):
        with pytest.raises(UserError, match=r"it fits backbone\.name=vit_moco_small backbone\.patch=16 "):
            load_weights(other, tmp_path / "vit-s.pth")
    torch.save(ViTMoCoBase(size=32).state_dict(), tmp_path / "vit-b.pth")
    load_weights(ViTBase(size=32), tmp_path / "vit-b.pth")  # 12 heads in both
    torch.save(ViTSmall(size=32).state_dict(), tmp_path / "small.pth")
    load_weights(ViTSmall(size=32), tmp_path / "small.pth")
    with pytest.raises(
        UserError, match=r"learned, not MoCo v3's, so it has 6 heads, not 12; set backbone\.name=vit_small"
    ):
        load_weights(ViTMoCoSmall(size=32), tmp_path / "small.pth")
    torch.save(ViTMoCoSmall(size=32).half().state_dict() | {"head.weight": torch.zeros(2)}, tmp_path / "half.pth")
    with pytest.raises(UserError, match="12 heads, not 6"):
        load_weights(ViTSmall(size=32), tmp_path / "half.pth")


def test_what_never_learns_stays_frozen_under_detectors():
    net = ViTMoCoSmall(size=64)
    train_stages(net, last=3)
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert frozen[:3] == ["pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    assert all(name.startswith(("blocks.9.", "blocks.10.", "blocks.11.", "norm.")) for name in frozen[3:])
    assert net.blocks[8].mlp.fc2.weight.requires_grad


@pytest.mark.parametrize("shape", [(), (384,), (1, 0, 384), (1, 7, 384), (1, 4, 384, 1), (1, 5, 192)])
@pytest.mark.parametrize("build", leaving([ViTMoCoSmall], [ViTSmall, ViTMoCoSmall]))
def test_positions_that_are_none(tmp_path, build, shape):
    state = build(size=64).state_dict() | {"pos_embed": torch.ones(shape)}
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"pos_embed is|positions are"):
        load_weights(build(size=32), tmp_path / "odd.pth")


def test_errors():
    net = ViTTiny(size=32)
    for call in (net, net.forward_stages, net.attention_maps):
        with pytest.raises(UserError, match="patches of 16 x 16 pixels, but 32 x 40 is not a multiple"):
            call(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match=r"backbone\.size=224 must be a multiple of backbone\.patch=15"):
        ViTTiny(patch=15)
