"""What a vision transformer attends to: heads of the last block and attention rollout.

    python eval.py task=attention checkpoint=runs/dino_vit_scavport/last.pt
    python eval.py task=attention checkpoint=runs/dino_vit_scavport/last.pt images=photo.jpg data.size=480

Of the data set's test images, of a folder or of one image: the class token's attention to the patches in each head of
the last block, the patches that hold 60 % of it outlined (official DINO's visualize_attention), their mean, and
attention rollout (Abnar and Zuidema 2020). Beside the mean and rollout stands how far they are faithful to what the
network makes of the image (evaluation/inspect/faithfulness.py), which is measured of a random map and of a Gaussian in
the middle, too. `data.size` may be any that the patch divides. Writes attention.png, attention.csv, results.json and
TensorBoard events to eval_attention/ in the run's folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

from torch import Tensor

from evaluation.inspect.attention import MASS, attention, mass_mask
from evaluation.inspect.gradcam import Target, backbone_of
from evaluation.inspect.saliency import Loaded, Looked, SaliencyConfig, Seen, look
from plots.saliency import Panel
from runtime.values import PositiveShare


@dataclass(kw_only=True)
class Config(SaliencyConfig):
    mass: PositiveShare = MASS  # share of a head's attention that the outlined patches hold


def run(cfg: Config) -> None:
    def look_at(loaded: Loaded, target: Target, image: Tensor, seen: Seen) -> Looked:  # noqa: ARG001
        found = attention(backbone_of(loaded.network), image)
        heads = [Panel(heat, mass_mask(heat, cfg.mass), [f"head {i}"]) for i, heat in enumerate(found.heads[0], 1)]
        return Looked({"mean of the heads": found.heads[0].mean(0), "rollout": found.rollout[0]}, heads)

    look(cfg, f"Attention of the class token; {100 * cfg.mass:.0f} % of each head's is outlined", look_at)
