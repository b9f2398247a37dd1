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

from data import build_geometry
from data.images import decode
from data.normalize import normalization_of, normalize
from evaluation.inspect.gradcam import Target, class_target, explain, similarity_target
from evaluation.inspect.saliency import Loaded, Looked, SaliencyConfig, Seen, look, usual_target
from models.anomaly.detector import Detector
from models.classifier import Classifier
from runtime.errors import UserError
from runtime.values import PathText


@dataclass(kw_only=True)
class Config(SaliencyConfig):
    class_name: str | None = None  # of a classifier's; none: each image's likeliest
    reference: PathText | None = None  # an image, the similarity with which is explained


def run(cfg: Config) -> None:
    if cfg.class_name and cfg.reference:
        raise UserError("class_name and reference are two things to explain: remove one")

    def target_of(loaded: Loaded, image: Tensor, seen: Seen) -> Target:
        if cfg.reference:
            pixels = decode(cfg.reference, build_geometry(cfg.data))[None].to(image.device)
            return similarity_target(loaded.backbone, image, normalize(pixels, normalization_of(loaded.network)))
        if cfg.class_name is None:
            return usual_target(loaded, image, seen)
        if not isinstance(loaded.network, Classifier):
            raise UserError(f"class_name={cfg.class_name} needs checkpoint=, a run of train_classifier.py")
        return class_target(loaded.network, image, loaded.state, cfg.class_name)

    def look_at(loaded: Loaded, target: Target, image: Tensor, seen: Seen) -> Looked:
        maps = {"Grad-CAM": explain(target, image)}
        if isinstance(loaded.network, Detector) and not cfg.reference:
            valid = None if seen.valid is None else seen.valid.to(image.device)
            own = loaded.network.examine(image, valid).maps
            maps |= {} if own is None else {"the detector's own map": own[0]}
        return Looked(maps, [])

    look(cfg, "Grad-CAM", look_at, target_of)
