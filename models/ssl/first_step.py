"""What cannot work in pretraining is found before the first step, on one image and without leaving a trace."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from data.normalize import normalization_of, normalize
from models.backbones.split_batch_norm import SplitBatchNorm2d
from models.ssl.method import SSLMethod
from models.ssl.queue import Queue, suitable_length
from runtime.distributed import world_size
from runtime.errors import UserError
from training.rehearsal import batch_norm_needs_more, naming, no_trace, shape_of, words

GRID = "patches"  # the recipe that makes no views of a whole image


def rehearse(
    method: SSLMethod,
    objective: nn.Module,
    augment: Callable[..., list[Tensor]],
    image: Tensor,
    cfg,
    *,
    classes: int,
    n_images: int,
    measured: Tensor | None,
    autocast: Callable[[], AbstractContextManager],
) -> list[str]:
    """Pass one image's views through a pretraining method, and the image through its backbone in eval mode.

    Args:
        method: on its device. objective: the method, or SPD around it.
        augment: makes the views. image: uint8 (3, H, W), as stored at data.size.
        cfg: the config of train_ssl.py.
        classes: of the training set. n_images: images to learn from.
        measured: uint8 (3, h, w), an image as the kNN metric will see it; None: it will not be taken.
        autocast: makes the context of the forward pass.

    Returns:
        Warnings: views larger than the stored images, a queue longer than the training set.

    Raises:
        UserError: views of a number or size that does not do, a batch or a queue too small, no classes to learn from.
    """
    name, device = cfg.method.name, next(method.parameters()).device
    micro_batch = cfg.batch_size // (world_size() * cfg.accumulate)
    if method.needs_defect != (cfg.defect is not None):
        asked = "needs a defect: set defect=cutpaste or another" if method.needs_defect else "has no use for a defect"
        raise UserError(f"method {name} {asked}")
    if method.needs_labels and classes < 2:
        raise UserError(f"{name} learns from classes: data.root needs a folder for each, two at least")
    if (method.takes[2] == GRID) != (cfg.augment.name == GRID):
        raise UserError(f"method={name} cannot learn from augment={cfg.augment.name}: use augment={method.takes[2]}")
    if cfg.batch_size < method.least_images:
        raise UserError(
            f"{name} compares the images of a step with each other: batch_size={cfg.batch_size} must be at least "
            f"{method.least_images}"
        )

    splits = max((m.splits for m in method.modules() if isinstance(m, SplitBatchNorm2d)), default=1)
    rows = min(micro_batch, 2 * splits) if micro_batch % splits == 0 else micro_batch  # few that meet the same errors
    images = image.to(device).repeat(rows, 1, 1, 1)  # (rows, 3, S, S)
    views = augment(images, torch.zeros(rows, dtype=torch.int64), 0)
    sizes = {f"augment.{key}": value for key, value in cfg.augment.options.items() if "size" in key}
    objective.check_views(len(views))
    with naming(sizes), batch_norm_needs_more(cfg.batch_size), no_trace(objective, device, training=True), autocast():
        embeddings = objective.embed(views)
    if measured is not None:
        with naming({"data.size": tuple(measured.shape[1:])}), no_trace(method, device, training=False):
            method.backbone(normalize(measured[None].to(device), normalization_of(method.backbone)))

    stored, made = tuple(image.shape[1:]), {tuple(view.shape[2:]) for view in views}
    warnings = [
        f"{key}={words(size)} is larger than data.size={words(stored)}: views are enlarged from fewer pixels; "
        f"lower {key}, or raise data.size"
        for key, size in sizes.items()
        if any(v > s for v, s in zip(shape_of(size), stored)) and shape_of(size) in made
    ]
    for key, queue in method.named_children():
        if isinstance(queue, Queue):
            length, width = queue.rows.shape
            pushed = cfg.batch_size * embeddings[0][0].numel() // width  # the first are what the method compares
            queue.require_room(pushed)
            if length > n_images:
                warnings.append(
                    f"method.{key}={length} is longer than the training set of {n_images} images, whose own earlier "
                    f"embeddings are in it: set method.{key}={max(suitable_length(n_images), pushed)}"
                )
    return warnings
