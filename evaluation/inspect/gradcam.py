"""Grad-CAM of what a network makes of an image: of a class, of the similarity with another image, of an anomaly score.

    target = class_target(classifier, image, state)
    heat = explain(target, image)  # (h, w)
    number = faithfulness(image[0], enlarged(heat, size), target.value).faithfulness

Images are normalized, and one at a time, (1, 3, H, W): each has a target of its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.inspect.faithfulness import enlarged
from losses.supervised import probabilities
from models.anomaly.detector import Detector
from models.backbones.vit import ViT
from models.classifier import Classifier
from models.gradcam import grad_cams
from runtime.errors import UserError


class Target(NamedTuple):
    """A number for an image, and the maps that it is made of."""

    what: str  # in words
    layers: Callable[[Tensor], tuple[list[Tensor], Tensor]]  # (1, 3, H, W) -> maps [(1, C, h, w)] in a graph that leads
    # to what Grad-CAM takes the gradient of, (1,)
    value: Callable[[Tensor], Tensor]  # (B, 3, H, W) -> the number that deletion and insertion follow, (B,)
    texture: Tensor | None = None  # (3, H, W) normalized, of what is put where pixels are removed


def class_target(network: Classifier, image: Tensor, state: dict, name: str | None = None) -> Target:
    """A class's probability, as the run reports it; the gradient is that of its logit, as in the paper.

    Args:
        state: of `load_classifier_run`. name: of the class; None: the likeliest for this image.

    Raises:
        UserError: the run has no such class.
    """
    classes, loss = state["classes"], state["config"]["loss"]["name"]
    temperature = state["calibration"]["temperature"] or 1.0
    if name is not None and name not in classes:
        raise UserError(f"class_name={name} is none of the run's classes: {', '.join(classes)}")
    with torch.no_grad():
        number = int(network(image).argmax()) if name is None else classes.index(name)

    def value(images: Tensor) -> Tensor:
        return probabilities(network(images).float(), loss, temperature)[:, number]

    def layers(images: Tensor) -> tuple[list[Tensor], Tensor]:
        with last_map(network.backbone) as seen:
            logits = network(images.requires_grad_())
        return seen, logits[:, number]

    with torch.no_grad():
        return Target(f"{classes[number]}, probability {float(value(image)):.2f}", layers, value)


def similarity_target(backbone: nn.Module, image: Tensor, reference: Tensor | None = None) -> Target:
    """The cosine of an image's features with those of another one, or with those of the image as it is.

    In the gradient the length of the image's own features is constant: at the image itself the cosine is largest, and
    its gradient 0.

    Args:
        reference: (1, 3, H', W'); None: the image.
    """
    with torch.no_grad():
        direction = F.normalize(backbone(image if reference is None else reference))  # (1, D)

    def value(images: Tensor) -> Tensor:
        return F.cosine_similarity(backbone(images), direction)

    def layers(images: Tensor) -> tuple[list[Tensor], Tensor]:
        with last_map(backbone) as seen:
            features = backbone(images.requires_grad_())  # (1, D)
        return seen, (features * direction).sum(1) / features.detach().norm(dim=1)

    if reference is None:
        return Target("similarity with itself", layers, value)
    with torch.no_grad():
        return Target(f"similarity with the reference, {float(value(image)):.2f}", layers, value)


def score_target(
    detector: Detector, image: Tensor, valid: Tensor | None = None, texture: Tensor | None = None
) -> Target:
    """A detector's image score. The layers are the maps that it is computed from, all those that `networks` gives.

    Args:
        valid: bool (1, H, W), False in padding. texture: (3, H, W), a normal image, normalized, for deletion.

    Raises:
        UserError, when it is explained: the score does not come from maps, or autograd cannot follow it.
    """

    def value(images: Tensor) -> Tensor:
        return detector.examine(images, None if valid is None else valid.expand(len(images), -1, -1)).scores

    def layers(images: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.no_grad():
            outputs = detector.eval().networks(images)
        seen = []
        outputs = _as_leaves(outputs, seen)
        scores = detector.measure(outputs, images.shape[-2:], valid).scores if seen else images.new_zeros(1)
        if not scores.requires_grad:
            raise UserError(
                f"Grad-CAM needs a score that autograd can follow to feature maps, which it cannot for this detector, "
                f"{type(detector).__name__}: take patchcore, padim, subspace, embedding, rd4ad, cdo or regad"
            )
        return seen, scores

    return Target(f"anomaly score {float(value(image)):.3g}", layers, value, texture)


def target_of(
    network: nn.Module,
    image: Tensor,
    *,
    state: dict | None = None,
    class_name: str | None = None,
    reference: Tensor | None = None,
    valid: Tensor | None = None,
    texture: Tensor | None = None,
) -> Target:
    """The similarity with a `reference`; without one the likeliest class of a classifier, or `class_name`, a detector's
    score, or the similarity of a backbone's features with those of the image as it is. Arguments as above.

    Raises:
        UserError: class_name of a network that is no classifier, or beside a reference.
    """
    if class_name is not None and (reference is not None or not isinstance(network, Classifier)):
        why = "and reference are two things to explain: remove one" if reference is not None else "is for classifiers"
        raise UserError(f"class_name={class_name} {why}")
    if reference is not None:
        return similarity_target(backbone_of(network), image, reference)
    if isinstance(network, Classifier):
        return class_target(network, image, state, class_name)
    if isinstance(network, Detector):
        return score_target(network, image, valid, texture)
    return similarity_target(network, image)


def backbone_of(network: nn.Module) -> nn.Module:
    """A classifier's or detector's, or the backbone itself."""
    return network.backbone if isinstance(network, Classifier | Detector) else network


def explain(target: Target, image: Tensor) -> Tensor:
    """Grad-CAM of (1, 3, H, W): (h, w). Several layers' maps are brought to the finest one's size and added."""
    with torch.enable_grad():
        layers, value = target.layers(image.detach().clone())
        maps = [heat[0] for heat in grad_cams(layers, value)]
    finest = max((heat.shape for heat in maps), key=lambda shape: shape[0] * shape[1])
    return torch.stack([enlarged(heat, finest) for heat in maps]).sum(0)  # (h, w)


@contextmanager
def last_map(backbone: nn.Module) -> Iterator[list[Tensor]]:
    """A list that holds, once the backbone has run inside, its last map (B, C, h, w), part of the graph.

    Of a CNN what its last layer before pooling gives; of a ViT what the last block's first LayerNorm gives of the
    patches, without class token and registers, as pytorch-grad-cam advises: after that block nothing of the patches
    reaches the class token.
    """
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            seen[:] = [output]

    def keep_size(module: nn.Module, inputs: tuple, output: Tensor) -> None:  # noqa: ARG001
        seen[:] = [output]

    def keep_patches(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:  # noqa: ARG001
        h, w = seen[0].shape[2:]
        first, rest = output[:, : -h * w], output[:, -h * w :]
        seen[:] = [rest.transpose(1, 2).unflatten(2, (h, w))]  # (B, D, h, w)
        return torch.cat([first, seen[0].flatten(2).transpose(1, 2)], dim=1)  # (B, T, D)

    if isinstance(backbone, ViT):
        handles = [backbone.patch_embed["proj"].register_forward_hook(keep_size)]
        handles.append(backbone.blocks[-1].norm1.register_forward_hook(keep_patches))
    else:
        handles = [module.register_forward_hook(keep) for module in backbone.modules() if module is not backbone]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _as_leaves(outputs, seen: list[Tensor]):
    """`outputs`, tensors in lists and tuples, whose maps (B, C, h, w) become leaves of a graph, added to `seen`."""
    if isinstance(outputs, list | tuple):
        return type(outputs)(_as_leaves(part, seen) for part in outputs)
    if outputs.dim() != 4:
        return outputs
    seen.append(outputs.detach().clone().requires_grad_())
    return seen[-1]
