"""A classifier: a backbone and a head. What train_classifier.py trains, and what loads it again."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Answers
from data.normalize import normalization_of, normalize
from losses.supervised import probabilities
from models.backbones.build import BackboneConfig, build_backbone
from models.heads import mlp
from runtime import checkpoint, config
from runtime.errors import UserError
from runtime.integrity import faults, first_two
from runtime.precision import PRECISIONS, at_least_float32
from runtime.schema import choice
from runtime.values import BelowOne, WidthOrZero
from search.nearest import Prepared, nearest, prepare


def linear_head(features: int, classes: int, *, dropout: BelowOne = 0.0) -> nn.Sequential:
    """One linear layer: (B, features) -> logits (B, classes).

    Args:
        dropout: share of the features that a step leaves out.
    """
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(features, classes))


def mlp_head(features: int, classes: int, *, hidden: WidthOrZero = 0, dropout: BelowOne = 0.0) -> nn.Sequential:
    """Two linear layers with a ReLU between them: (B, features) -> logits (B, classes).

    Args:
        hidden: width between them; 0: that of the features.
        dropout: share of the features that a step leaves out.
    """
    widths = [features, hidden or features, classes]
    return nn.Sequential(nn.Dropout(dropout), *mlp(widths, batch_norm=False, bias=True, last_bias=True))


HEADS: dict[str, Callable[..., nn.Sequential]] = {"linear": linear_head, "mlp": mlp_head}


@dataclass(kw_only=True)
class HeadConfig:
    """`head.*`: its name and its keyword-only arguments."""

    name: str = choice(HEADS)
    options: dict = field(default_factory=dict)


class Classifier(nn.Module):
    """Images (B, 3, H, W), normalized, -> logits (B, C)."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head, self.normalization = backbone, head, normalization_of(backbone)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def answering(self, state: dict, device: torch.device, precision: str) -> Callable[[Tensor], Answers]:
        """What answers to images uint8 (B, 3, H, W) on `device`, on the CPU.

        Args:
            state: loss, temperature and bank of `evaluation.classify.load_classifier_run`.
        """
        bank, temperature = state["bank"], state["calibration"]["temperature"] or 1.0
        both = WithNovelty(self, None if bank is None else bank.to(device))
        dtype, loss = PRECISIONS[precision], state["config"]["loss"]["name"]

        def answer(pixels: Tensor) -> Answers:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                rows = both(normalize(pixels, self.normalization)).cpu()  # (B, C + 1)
            logits, scores = rows[:, :-1], rows[:, -1]  # (B, C), (B,)
            return Answers(logits, probabilities(logits, loss, temperature), scores)

        return answer


@at_least_float32
def novelty(features: Tensor, bank: Tensor, prepared: Prepared | None = None) -> Tensor:
    """How little images look like the training images: the Euclidean distance of their normalized features (B, D) to
    the nearest row of `bank` (M, D), normalized features of training images; float32 (B,).

    Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", section 3, with k = 1. Logits and
    probabilities see only what tells the known classes apart; the features also have what does not.
    """
    return nearest(F.normalize(features), bank, prepared=prepared)[0][:, 0]


class WithNovelty(nn.Module):
    """Images (B, 3, H, W), normalized, -> float32 (B, C + 1): the logits, and last the `novelty`.

    Args:
        bank: (M, D) on the classifier's device; None: there is none yet, and the novelty is inf.
    """

    def __init__(self, classifier: Classifier, bank: Tensor | None):
        super().__init__()
        self.classifier, self.bank, self.normalization = classifier, bank, classifier.normalization
        self.prepared = None if bank is None else prepare(bank)

    def forward(self, x: Tensor) -> Tensor:
        features = self.classifier.backbone(x)
        logits = self.classifier.head(features).float()
        far = logits.new_full((logits.shape[0],), torch.inf)
        distances = far if self.bank is None else novelty(features, self.bank, self.prepared)
        return torch.cat([logits, distances[:, None]], 1)  # (B, C + 1)


def build_classifier(backbone: BackboneConfig, head: HeadConfig, n_classes: int) -> tuple[Classifier, str]:
    """The classifier, its backbone with its weights, and one line on where these come from.

    Raises:
        UserError: the backbone has a classifier of its own, or its weights do not fit.
    """
    if backbone.options.get("num_classes"):
        raise UserError(
            f"backbone.num_classes={backbone.options['num_classes']}: head makes the classes of the images; remove it"
        )
    network, weights = build_backbone(backbone)
    return Classifier(network, HEADS[head.name](network.num_features, n_classes, **head.options)), weights


def load_trained(path: str | Path, state: dict | None = None) -> tuple[Classifier, dict]:
    """The classifier of a run of train_classifier.py in eval mode on the CPU, and the checkpoint's other values, with
    the names of its `classes`.

    Args:
        path: a checkpoint, or a run folder, whose last.pt is meant.
        state: what it holds, if it has been read.

    Raises:
        UserError: it is no such checkpoint, or was edited.
    """
    state, file = state or checkpoint.load(path), checkpoint.file_of(path)
    if "head" not in state["config"]:
        raise UserError(f"{file} holds no classifier: name a run folder of train_classifier.py")
    sections = {name: checkpoint.section(state, name, file) for name in ("backbone", "head", "loss")}
    if not (isinstance(state.get("classes"), list) and len(state["classes"]) > 1):
        raise UserError(f"{file} was edited: it has no names of classes")
    try:
        backbone = config.build(BackboneConfig, sections["backbone"] | {"weights": None}, "backbone.")  # all in "model"
        head = config.build(HeadConfig, sections["head"], "head.")
        model, _ = build_classifier(backbone, head, len(state["classes"]))
    except UserError as error:
        raise UserError(f"the config in {file}: {error}") from None
    weights = state.pop("model", None)
    if wrong := list(faults(model.state_dict(), weights, "model")):
        raise UserError(f"{file} does not fit its own config: {first_two(wrong)}; {checkpoint.advice_on(file)}")
    model.load_state_dict(weights)
    return model.to(memory_format=torch.channels_last).eval(), state
