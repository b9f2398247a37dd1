"""SimCLR in one file, to copy and change: images in class folders in, a pretrained ResNet-18 out.

    python -m data.demo datasets/demo                      # draws the demo images
    python -m examples.simclr                              # a copy at the top of the repository: python my_idea.py

It has the loss of `train_ssl.py configs/demo/simclr_demo.yaml holdout=0` at every step, and leaves out what that script
has besides: several processes, mixed precision, checkpoints on the way, the kNN metric, TensorBoard. What it saves is
for `backbone.weights=` of the other scripts.
"""

import runtime.threads  # before torch

import torch
from torch import nn

from data.augment.recipes import simclr
from data.augment.views import Augment
from data.datasets.folder import ClassFolder
from data.loading import Loader
from data.normalize import normalization_of
from losses.nt_xent import nt_xent
from models.backbones.resnet import ResNet18
from models.heads import mlp
from runtime.files import whole_file
from training.schedule import warmup_cosine


def train(
    root: str = "datasets/demo/scavport",
    out: str = "simclr.pth",
    *,
    size: int = 96,  # pixels of the stored images
    crop: int = 64,  # pixels of the views
    epochs: int = 8,
    batch_size: int = 64,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    temperature: float = 0.2,
    seed: int = 0,
) -> list[float]:
    """Returns the loss of every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    # Data: uint8 images, and views that are made of them on the device
    images = ClassFolder("train", size, root=root)
    loader = Loader(images, batch_size, device, shuffle=True, drop_last=True, seed=seed)
    recipe = simclr(size=crop, scale=(0.2, 1.0), strength=0.5, blur_p=0.0, interpolation="bilinear")
    augment = Augment(recipe, seed, images.sizes, normalization=normalization_of(ResNet18))

    # Networks: the head is thrown away after pretraining
    torch.manual_seed(seed)
    backbone = ResNet18()
    features = backbone.num_features
    head = mlp([features, features, 128], bias=True, last_bias=True)
    model = nn.Sequential(backbone, head).to(device, memory_format=torch.channels_last)

    # Weights decay, biases and norms do not
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr)

    losses, total = [], epochs * len(loader)
    for epoch in range(epochs):
        for batch, _, ids in loader.epoch(epoch):
            for group in optimizer.param_groups:  # a warm-up of one epoch
                group["lr"] = warmup_cosine(len(losses), total, start=lr, warmup=len(loader))

            views = augment(batch, ids, epoch)  # V x (B, 3, h, w)
            z = model(torch.cat(views))  # (V B, D): one pass, so that batch norms see all views together
            z = z.unflatten(0, (len(views), -1)).transpose(0, 1)  # (B, V, D)
            loss = nt_xent(z, temperature)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} of {epochs}: loss {losses[-1]:.4f}")
    with whole_file(out, "wb") as file:
        torch.save(backbone.state_dict(), file)
    return losses


if __name__ == "__main__":
    train()
