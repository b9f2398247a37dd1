"""Backbones by name. Each gives (B, num_features), or logits, and four maps from `forward_stages`."""

from models.mobilenet import MobileNetV2
from models.resnet import ResNet18, ResNet34, ResNet50, ResNet101, WideResNet50

BACKBONES = {
    "resnet18": ResNet18,
    "resnet34": ResNet34,
    "resnet50": ResNet50,
    "resnet101": ResNet101,
    "wide_resnet50_2": WideResNet50,
    "mobilenet_v2": MobileNetV2,
}
