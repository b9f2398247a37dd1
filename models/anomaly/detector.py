"""What all detectors share: a frozen backbone, scoring without gradients, fitted state that loads at any size."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor, nn

from data.batches import Batch as Batch
from data.batches import Findings, TrainingBatch
from data.normalize import Normalization, normalization_of, normalize
from models.anomaly.maps import blank
from runtime.distributed import all_reduce_sum, gather_rows, world_size
from runtime.errors import LOST, UserError, cut
from runtime.integrity import faults_of_part, first_two
from runtime.values import Range
from training.rehearsal import batch_norm_needs_more, naming, no_trace

Stage = Annotated[int, Range(least=1, most=4)]  # of a backbone, 1 the finest


class Detector(nn.Module):
    """An anomaly detector on a backbone; a method subclasses it and writes `measure` and `fit`, `forward` or both.

    What it can do is declared below as class attributes, for the scripts ask nothing else:
    `fits`: `fit(batches, n_images)` learns from an iterable of `Batch` of this process, n_images over all processes.
    `by_gradient`: `forward(*arguments) -> (loss, stats)` is the loss of one optimizer step, on what `steps` makes of a
    batch. A detector with both is trained first, then fitted.
    `updates`: `add(batches, n_images)` learns further images, and `keep(numbers)` renumbers those learned, numbers[old]
    = new, and forgets those at -1.
    `measure(outputs, size, valid, leave_out)` returns `Findings` from what `networks` returned; size is (H, W), `valid`
    bool (B, H, W) is False in padding (None: none), `leave_out` is as in `examine`.

    The given backbone loses its gradients and stays in eval mode, also after `.train()`: neither its weights nor its
    BatchNorm statistics ever move, unless the method sets `frozen` to False. Fitted state lives in buffers registered
    empty in the constructor.

    Args:
        backbone: has `forward_stages(images, last) -> [(B, C_i, H_i, W_i)] * last`.
        stages: the stages the method reads, 1 (the finest) to 4.

    Raises:
        UserError: `stages` is empty, repeats a stage or names one that does not exist.
    """

    fits = False  # it has `fit`: one pass over the normal images
    by_gradient = False  # it has `forward`: an optimizer trains it
    updates = False  # it has `add` and `keep`: its training images can change after `fit`
    leaves_out = False  # `examine` can leave out training images; whether also of so few, `can_leave_out` says
    frozen = True  # its backbone stays as it is
    positional = False  # its fitted state belongs to positions, so images of other sizes make no sense
    learns_from = "train"  # split of the data set whose images an optimizer trains it on
    by_label = False  # all images of a batch that an optimizer trains it on have one label
    partial = False  # an optimizer step leaves some of its parameters without gradient
    fitted_on = "train"  # split that `fit` gets: the normal images, or "test", where a score depends on all of them
    fit: Callable[..., None]  # only of a detector that `fits`
    trained_with: tuple[str, ...] = ()  # options that its trained weights need again, though no shape shows them

    def __init__(self, backbone: nn.Module, stages: tuple[int, ...]):
        super().__init__()
        if not stages or len(set(stages)) < len(stages) or not set(stages) <= {1, 2, 3, 4}:
            raise UserError(f"stages={list(stages)}: name different stages from 1 (the finest) to 4 (the coarsest)")
        self.backbone = backbone.requires_grad_(False).eval() if self.frozen else backbone
        self.stages = tuple(stages)

    @property
    def normalization(self) -> Normalization:
        """Of the images that it takes: its backbone's."""
        return normalization_of(self.backbone)

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def steps(self, batch: TrainingBatch) -> Iterator[tuple]:
        """The arguments of `forward` that the loop makes optimizer steps of, one after the other: most have one.

        It is called within the loop's autocast, but a generator's body runs outside: what networks have to do first
        belongs before `return self.a_generator(...)`.
        """
        yield (normalize(batch.images, self.normalization),)

    @torch.no_grad()
    def features(self, images: Tensor) -> list[Tensor]:
        """The chosen stages of (B, 3, H, W) normalized images in float32, [(B, C_i, H_i, W_i)], without gradients."""
        outputs = self.backbone.forward_stages(images, last=max(self.stages))
        return [outputs[stage - 1].float() for stage in self.stages]

    @torch.no_grad()
    def examine(self, images: Tensor, valid: Tensor | None = None, leave_out: Tensor | None = None) -> Findings:
        """Everything the detector finds, in eval mode and without gradients, whatever mode it is in.

        The networks run in the precision of the caller's autocast, distances and maps always in full precision. Where
        state is spread over processes this is a collective: all call it equally often, with B = 0 if need be.

        Args:
            images: (B, 3, H, W) normalized. valid: bool (B, H, W), False in padding; maps are 0 there.
            leave_out: (B,) int64, numbers of training images: each result is as if that image had not been fitted;
                the method's file says how exactly.
        """
        if leave_out is not None and not self.leaves_out:
            raise ValueError(f"{type(self).__name__} cannot leave out an image that it was fitted on")
        was_training = self.training
        self.eval()
        try:
            outputs = self.networks(images)
            with torch.autocast(images.device.type, enabled=False):
                findings = self.measure(outputs, images.shape[-2:], valid, leave_out)
        finally:
            self.train(was_training)
        return findings if findings.maps is None else findings._replace(maps=blank(findings.maps, valid))

    def examine_pixels(self, pixels: Tensor, valid: Tensor | None = None) -> Findings:
        """`examine` of images uint8 (B, 3, H, W), as files hold them."""
        return self.examine(normalize(pixels, self.normalization), valid)

    def prepare_export(self) -> None:
        """Find out, once fitted, what `examine` only looks up while torch.export traces it: the shapes in a program
        cannot depend on values (`torch.compiler.is_exporting()`)."""

    def score(
        self, images: Tensor, valid: Tensor | None = None, leave_out: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """`examine`'s maps (B, H, W) float32, or None when the method has none, and scores (B,)."""
        findings = self.examine(images, valid, leave_out)
        return findings.maps, findings.scores

    def rehearse(self, image: Tensor, *, batch_size: int, training: bool, seed: int) -> None:
        """Find out before the first step whether it can be made: pass an image uint8 (3, H, W) through the networks
        and, if a process's batches are of one image, through a training step, whose batch norms may need more.

        Raises:
            UserError: data.size or batch_size does not do.
        """
        images, device = image[None], image.device
        with naming({"data.size": tuple(image.shape[1:])}), no_trace(self, device, training=False):
            self.networks(normalize(images, self.normalization))
        if training and batch_size == 1:
            nothing = torch.zeros(1, dtype=torch.int64)
            with batch_norm_needs_more(batch_size), no_trace(self, device, training=True):
                self(*next(iter(self.steps(TrainingBatch(images, nothing.to(device), nothing, 0, seed)))))

    def networks(self, images: Tensor) -> list[Tensor]:
        """What the score is computed from; a method with networks of its own adds their outputs."""
        return self.features(images)

    def load_trained(self, state: dict, path: str) -> list[str]:
        """Load the state_dict of a run of this detector from `path`, backbone and all, but not what `fit` had fitted.

        Returns:
            Names of an official checkpoint's tensors that its code does not use either.

        Raises:
            UserError: it does not fit, or the detector is none that is trained.
        """
        if not self.by_gradient:
            raise UserError(f"detector.weights={path}: {type(self).__name__} has nothing to train, remove the key")
        fitted = dict(self.named_buffers(recurse=False))
        state = {name: value for name, value in state.items() if "." in str(name)} | fitted
        if found := faults_of_part(self, state, ""):
            raise UserError(
                f"detector.weights={path} does not fit {type(self).__name__} with this backbone and these options: "
                f"{first_two(found)}"
            )
        self.load_state_dict(state)
        return []

    def load_fitted(self, state, path: str | Path, size: tuple[int, int]) -> None:
        """Load a whole state_dict from the checkpoint at `path`, and find out whether its parts fit one another: pass a
        gray image of `size` (H, W).

        Raises:
            UserError: they do not, or it is no state_dict of this detector.
        """
        if found := faults_of_part(self, state, "model"):
            raise UserError(f"{path} does not fit its own config: {first_two(found)}")
        self.load_state_dict(state)
        self.try_out(path, size)

    def try_out(self, path: str | Path, size: tuple[int, int]) -> None:
        """Pass a gray image of `size` (H, W) through a fitted detector, which tells whether the tensors that it has
        fitted, of any shape, fit one another.

        Raises:
            UserError: it cannot be examined, or its score is not finite.
        """
        device = next(self.backbone.parameters()).device
        try:
            with no_trace(self, device, training=False):
                scores = self.examine(torch.zeros(1, 3, *size, device=device)).scores
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever wrong shapes and numbers raise
            if LOST.search(str(error)):  # another process was lost
                raise
            why = " ".join(str(error).split())
            raise UserError(f"{path} holds a {type(self).__name__} that examines nothing: {cut(why, 120)}") from None
        if not scores.isfinite().all():
            raise UserError(f"{path} holds a {type(self).__name__} whose scores are not finite: the run has diverged")

    def check_count(self, n_images: int) -> None:
        """Raise `UserError` where `fit` needs more training images, over all processes; asked before the training."""

    def facts(self) -> dict[str, int | float | str]:
        """What results.json gets about the fitted state."""
        return {}

    def can_leave_out(self, count: int) -> bool:
        """Whether each of the `count` images that it was fitted on can be left out, one at a time."""
        return self.leaves_out and count > 1

    def require_fitted(self, state: Tensor) -> None:
        if len(state) == 0:
            raise UserError(f"{type(self).__name__} is not fitted: fit it, or load a checkpoint of a fitted one")

    def in_order(self, rows: list[Tensor], indices: list[Tensor]) -> tuple[Tensor, Tensor]:
        """All processes' images by ascending number: [(B, ...)] and [(B,)] per batch -> (N, ...) and (N,).

        Raises:
            UserError: there is no image, or a process has none.
        """
        self.require_images(len(rows) > 0)
        numbers, order = gather_rows(torch.cat(indices)).sort()
        return gather_rows(torch.cat(rows))[order], numbers

    def require_images(self, some: bool) -> None:
        """Raise `UserError` on every process when one of them has no training image (`some` False)."""
        device = next(self.backbone.parameters()).device
        if all_reduce_sum(torch.tensor(int(some), device=device)) < world_size():
            raise UserError(
                "fewer training images than processes: give more images, a smaller holdout or fewer processes"
                if world_size() > 1
                else "there is no training image to learn from: check data.root and holdout"
            )

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Give fitted buffers the shape found in the checkpoint: a fresh detector does not know its bank's size."""
        for name, buffer in self._buffers.items():
            if prefix + name in state_dict:
                self._buffers[name] = buffer.new_empty(state_dict[prefix + name].shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
