"""DINO in one file, to copy and change: images in class folders in, a pretrained ResNet-18 out.

    python -m data.demo datasets/demo                      # draws the demo images
    python -m examples.dino                                # a copy at the top of the repository: python my_idea.py

It has the loss of `train_ssl.py configs/demo/dino_demo.yaml augment.local_crops=2 holdout=0` at every step, and leaves
out what that script has besides: several processes, mixed precision, checkpoints on the way, the kNN metric,
TensorBoard. What it saves, the teacher, is for `backbone.weights=` of the other scripts.
"""

import runtime.threads  # before torch

import torch

from data.augment.recipes import dino
from data.augment.views import Augment
from data.datasets.folder import ClassFolder
from data.loading import Loader
from data.normalize import normalization_of
from losses.dino import DINOLoss
from models.backbones.resnet import ResNet18
from models.heads import DINOHead
from models.ssl.method import Encoder, frozen_copy, multi_crop
from runtime.files import whole_file
from training.ema import ema_update
from training.schedule import warmup_cosine


def train(
    root: str = "datasets/demo/scavport",
    out: str = "dino.pth",
    *,
    size: int = 96,  # pixels of the stored images
    crop: int = 48,  # pixels of the two global views
    local_crop: int = 32,  # pixels of the two local views
    epochs: int = 4,
    batch_size: int = 32,
    lr: float = 0.1,
    weight_decay: float = 5e-4,
    prototypes: int = 256,
    momentum: float = 0.99,  # of the teacher; a cosine takes it to 1
    temperature: float = 0.04,  # of the teacher's outputs
    seed: int = 0,
) -> list[float]:
    """Returns the loss of every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # Data: uint8 images, and views that are made of them on the device
    images = ClassFolder("train", size, root=root)
    loader = Loader(images, batch_size, device, shuffle=True, drop_last=True, seed=seed)
    sizes = {"size": crop, "local_size": local_crop, "local_crops": 2, "interpolation": "bilinear"}
    recipe = dino(**sizes, global_scale=(0.25, 1.0), local_scale=(0.05, 0.4), blur=False)
    augment = Augment(recipe, seed, images.sizes, normalization=normalization_of(ResNet18))

    # Networks: the heads are thrown away after pretraining
    torch.manual_seed(seed)
    backbone = ResNet18()
    head = DINOHead(backbone.num_features, prototypes, hidden=512, bottleneck=128, use_bn=True)
    student = Encoder(backbone, head)
    teacher = frozen_copy(student)  # no gradients; in train mode, with batch statistics of its own
    criterion = DINOLoss(prototypes, student_temperature=0.1, center_momentum=0.9)
    for module in (student, teacher, criterion):
        module.to(device, memory_format=torch.channels_last)

    # Weights decay, biases and norms do not
    trained = [p for p in student.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)

    losses, total = [], epochs * len(loader)
    for epoch in range(epochs):
        for batch, _, ids in loader.epoch(epoch):
            step = len(losses)
            for group in optimizer.param_groups:  # a warm-up of one epoch
                group["lr"] = warmup_cosine(step, total, start=lr, warmup=len(loader))

            views = augment(batch, ids, epoch)  # V x (B, 3, h, w), the two global ones first
            with torch.no_grad():
                targets = multi_crop(teacher, views[:2])  # (B, 2, K)
            loss, _ = criterion(multi_crop(student, views), targets, temperature)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, warmup_cosine(step, total, start=momentum, end=1.0))
            criterion.update()  # the center
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {losses[-1]:.4f}")
    with whole_file(out, "wb") as file:
        torch.save(teacher.backbone.state_dict(), file)
    return losses


if __name__ == "__main__":
    train()
