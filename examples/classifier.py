"""A classifier in one file, to copy and change: images in class folders in, a fine-tuned ResNet-18 out.

    python -m data.demo datasets/demo                      # draws the demo images
    python -m examples.classifier                          # a copy at the top of the repository: python my_idea.py

It has the loss of `train_classifier.py configs/demo/classifier_demo.yaml holdout=0` at every step, and the accuracy at
its end, and leaves out what that script has besides: several processes, mixed precision, checkpoints, validation
images, mixup, unfreezing layer by layer, TensorBoard. `weights` is any file that `backbone.weights=` of the scripts
takes.
"""

import runtime.threads  # before torch

import torch
from torch import nn

from data.augment.recipes import crop
from data.augment.views import Augment
from data.datasets.folder import ClassFolder
from data.loading import Loader
from data.normalize import normalization_of
from evaluation.features import extract
from losses.supervised import cross_entropy, soft_targets
from models.backbones.resnet import ResNet18
from models.weights.load import load_weights
from training.schedule import warmup_cosine


def train(
    root: str = "datasets/demo/scavport",
    out: str = "classifier.pth",
    weights: str | None = None,
    *,
    size: int = 96,  # pixels of the stored images and of the views
    epochs: int = 8,
    head_epochs: int = 1,  # in which the classifier learns and the backbone does not
    batch_size: int = 32,
    lr: float = 2e-2,  # of the classifier
    backbone_lr: float = 1e-2,
    seed: int = 0,
) -> tuple[list[float], float]:
    """Returns the loss of every step, and the share of test images that are classified correctly."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # Data: uint8 images, and views that are made of them on the device
    images, tested = (ClassFolder(split, size, root=root) for split in ("train", "test"))
    loader = Loader(images, batch_size, device, shuffle=True, drop_last=True, seed=seed)
    augment = Augment(crop(size=size, scale=(0.5, 1.0)), seed, images.sizes, normalization=normalization_of(ResNet18))

    # Networks: the classifier is new
    torch.manual_seed(seed)
    backbone = ResNet18()
    if weights:
        print(load_weights(backbone, weights))
    head = nn.Linear(backbone.num_features, len(images.classes))
    model = nn.Sequential(backbone, head).to(device, memory_format=torch.channels_last)

    groups = [{"params": backbone.parameters(), "peak": backbone_lr}, {"params": head.parameters(), "peak": lr}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)

    losses, total = [], epochs * len(loader)
    for epoch in range(epochs):
        learns = epoch >= head_epochs
        backbone.train(learns).requires_grad_(learns)  # frozen, BatchNorm keeps its statistics too
        for batch, labels, ids in loader.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(len(losses), total, start=group["peak"])

            (views,) = augment(batch, ids, epoch)  # (B, 3, h, w)
            loss = cross_entropy(model(views), soft_targets(labels, len(images.classes)))

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {losses[-1]:.4f}")

    logits, labels = extract(model, Loader(tested, batch_size, device))  # in eval mode: (N, C), (N,)
    accuracy = float((logits.argmax(1) == labels).double().mean())
    print(f"{accuracy:.1%} of {len(tested)} test images are classified correctly")
    torch.save(backbone.state_dict(), out)
    return losses, accuracy


if __name__ == "__main__":
    train()
