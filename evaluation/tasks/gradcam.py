"""Where in an image a class, a similarity or an anomaly score comes from: Grad-CAM.

    python eval.py task=gradcam checkpoint=runs/classifier_own
    python eval.py task=gradcam checkpoint=runs/classifier_own class_name=scratches images=photo.jpg
    python eval.py task=gradcam checkpoint=runs/simclr_scavport reference=part.jpg
    python eval.py task=gradcam checkpoint=runs/patchcore_own

Of the data set's test images, of a folder or of one image, for CNNs and vision transformers. What is explained is, of a
run of train_classifier.py, the likeliest class or `class_name`; of one of train_anomaly.py the anomaly score, its own
map beside it; of any other backbone the similarity of its features with those of `reference`, or of the image as it is.
Beside each map stands how far it is faithful (evaluation/inspect/faithfulness.py), which is measured of a random map
and of a Gaussian in the middle, too; where masks of defects are known, also the share of the map within them and
whether its peak is there. Writes gradcam.png, gradcam.csv, results.json and TensorBoard events to eval_gradcam/ in the
run's folder (without one: in runs/<run_name>/).
"""

from dataclasses import dataclass

from torch import Tensor

from evaluation.inspect.gradcam import Target, explain
from evaluation.inspect.saliency import Loaded, Looked, SaliencyConfig, Seen, look
from runtime.values import PathText


@dataclass(kw_only=True)
class Config(SaliencyConfig):
    class_name: str | None = None  # of a classifier's; none: each image's likeliest
    reference: PathText | None = None  # an image, the similarity with which is explained


def run(cfg: Config) -> None:
    def look_at(loaded: Loaded, target: Target, image: Tensor, seen: Seen) -> Looked:
        maps = {"Grad-CAM": explain(target, image)}
        if loaded.normals is not None and cfg.reference is None:
            own = loaded.network.examine(image, seen.valid).maps
            maps |= {} if own is None else {"the detector's own map": own[0]}
        return Looked(maps, [])

    look(cfg, "Grad-CAM", look_at, cfg.class_name, cfg.reference)
