"""Backbones by name. Each gives (B, num_features), or logits, and four maps from `forward_stages`."""

from models.backbones.cbam import CBAMResNet18, CBAMResNet34, CBAMResNet50
from models.backbones.convnext import (
    ConvNeXtAtto,
    ConvNeXtFemto,
    ConvNeXtNano,
    ConvNeXtPico,
    ConvNeXtTiny,
    ConvNeXtV2Atto,
    ConvNeXtV2Femto,
    ConvNeXtV2Nano,
    ConvNeXtV2Pico,
    ConvNeXtV2Tiny,
)
from models.backbones.efficientnet import (
    EfficientNetB0,
    EfficientNetB1,
    EfficientNetB2,
    EfficientNetB3,
    EfficientNetB4,
    EfficientNetLite0,
    EfficientNetLite1,
    EfficientNetLite2,
)
from models.backbones.mobilenet import MobileNetV2
from models.backbones.mobilenet_v3 import MobileNetV3Large, MobileNetV3Small
from models.backbones.resnet import ResNet18, ResNet34, ResNet50, ResNet101, WideResNet50
from models.backbones.unet import UNetResNet18
from models.backbones.vit import ViTBase, ViTSmall, ViTTiny
from models.backbones.vit_moco import ViTMoCoBase, ViTMoCoSmall

BACKBONES = {
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "wide_resnet50_2": WideResNet50,
    "cbam_resnet18": CBAMResNet18,
    "cbam_resnet34": CBAMResNet34,
    "cbam_resnet50": CBAMResNet50,
    "unet_resnet18": UNetResNet18,
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3_large": MobileNetV3Large,
    "mobilenet_v3_small": MobileNetV3Small,
    "efficientnet_b0": EfficientNetB0,
    "efficientnet_b1": EfficientNetB1,
    "efficientnet_b2": EfficientNetB2,
    "efficientnet_b3": EfficientNetB3,
    "efficientnet_b4": EfficientNetB4,
    "efficientnet_lite0": EfficientNetLite0,
    "efficientnet_lite1": EfficientNetLite1,
    "efficientnet_lite2": EfficientNetLite2,
    "convnext_atto": ConvNeXtAtto,
    "convnext_femto": ConvNeXtFemto,
    "convnext_pico": ConvNeXtPico,
    "convnext_nano": ConvNeXtNano,
    "convnext_tiny": ConvNeXtTiny,
    "convnextv2_atto": ConvNeXtV2Atto,
    "convnextv2_femto": ConvNeXtV2Femto,
    "convnextv2_pico": ConvNeXtV2Pico,
    "convnextv2_nano": ConvNeXtV2Nano,
    "convnextv2_tiny": ConvNeXtV2Tiny,
    "vit_tiny": ViTTiny,
    "vit_small": ViTSmall,
    "vit_base": ViTBase,
    "vit_moco_small": ViTMoCoSmall,
    "vit_moco_base": ViTMoCoBase,
}
