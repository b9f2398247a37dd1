"""What all detectors share: a frozen backbone, scoring without gradients, fitted state that loads at any size."""

import torch
from torch import Tensor, nn

from training.distributed import all_reduce_sum, gather_rows, world_size
from training.errors import UserError


class Detector(nn.Module):
    """An anomaly detector on a frozen backbone; a method subclasses it and writes `measure` and `fit` or `forward`.

    `measure(outputs, size)` returns maps (B, *size), or None, and scores (B,) from what `networks` returned.

    The given backbone loses its gradients and stays in eval mode, also after `.train()`: neither its weights nor its
    BatchNorm statistics ever move. Fitted state lives in buffers registered empty in the constructor.

    Args:
        backbone: has `forward_stages(images) -> [(B, C_i, H_i, W_i)] * 4`.
        stages: the stages the method reads, 1 (the finest) to 4.

    Raises:
        UserError: `stages` is empty, repeats a stage or names one that does not exist.
    """

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...]):
        super().__init__()
        if not stages or len(set(stages)) < len(stages) or not set(stages) <= {1, 2, 3, 4}:
            raise UserError(f"stages={list(stages)}: name different stages from 1 (the finest) to 4 (the coarsest)")
        self.backbone = backbone.requires_grad_(False).eval()
        self.stages = tuple(stages)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """The chosen stages of (B, 3, S, S) normalised images in float32, [(B, C_i, H_i, W_i)], without gradients."""
        outputs = self.backbone.forward_stages(images)
        return [outputs[stage - 1].float() for stage in self.stages]

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """How anomalous each pixel and each image is; in eval mode and without gradients, whatever mode it is in.

        The networks run in the precision of the caller's autocast, distances and maps always in full precision.

        Args:
            images: (B, 3, S, S) normalised.
        Returns:
            maps (B, S, S) float32, or None when the method has none, and scores (B,).
        """
        was_training = self.training
        self.eval()
        outputs = self.networks(images)
        with torch.autocast(images.device.type, enabled=False):
            maps, scores = self.measure(outputs, images.shape[-2:])
        self.train(was_training)
        return maps, scores

    def networks(self, images: Tensor) -> list[Tensor]:
        """What the score is computed from; a method with networks of its own adds their outputs."""
        return self.features(images)

    def require_fitted(self, state: Tensor) -> None:
        if len(state) == 0:
            raise UserError(f"{type(self).__name__} is not fitted: fit it, or load a checkpoint of a fitted one")

    def gather_images(self, parts: list[Tensor]) -> Tensor:
        """All processes' images in the order one process would have seen them: [(B, ...)] per batch -> (N, ...).

        Processes hold contiguous shares of every global batch (data/loading.py), so the order is by batch number,
        then rank, then position. A process may have fewer batches than another, but not none.
        """
        device = next(self.backbone.parameters()).device
        if all_reduce_sum(torch.tensor(int(len(parts) > 0), device=device)) < world_size():
            raise UserError("fewer training pictures than processes: give more pictures or start fewer processes")
        images = torch.cat(parts)  # (N_r, ...)
        if world_size() == 1:
            return images
        batch_numbers = torch.repeat_interleave(
            torch.arange(len(parts), device=device), torch.tensor([len(part) for part in parts], device=device)
        )
        return gather_rows(images)[gather_rows(batch_numbers).argsort(stable=True)]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Give fitted buffers the shape found in the checkpoint: a fresh detector does not know its bank's size."""
        for name, buffer in self._buffers.items():
            if prefix + name in state_dict:
                self._buffers[name] = buffer.new_empty(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
