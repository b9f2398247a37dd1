"""Do thresholds from left-out normals keep their promise? Cross-validation over normal training images alone.

    python -m benchmarks.false_alarms configs/patchcore_mvtec.yaml data.root=/mvtec data.category=tile

Each fold is held out in turn: the detector is fitted on the rest, the thresholds come from leaving its images out one
by one, and the fold's images are counted that lie above. No test image is read. The config is train_anomaly.py's.
"""

import sys
import tempfile

import torch

import train_anomaly
from data import build_dataset, settled
from data.loading import Loader
from evaluation.anomaly.detection import batches_of, examine_set, region_maps
from evaluation.anomaly.thresholds import binomial_interval, normal_threshold, pixel_threshold
from evaluation.tables import markdown_table
from models.anomaly import DETECTORS
from models.backbones.build import build_backbone
from runtime import config, errors

FOLDS = 5
RATES = (0.01, 0.05, 0.1)


def main(argv: list[str]) -> None:
    cfg = config.load(train_anomaly.Config, [*argv, f"runs={tempfile.gettempdir()}"])
    train_set = build_dataset(settled(cfg.data), "train")
    backbone, _ = build_backbone(cfg.backbone)
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(cfg.seed))
    alarms, shares = dict.fromkeys(RATES, 0), {rate: [] for rate in RATES}
    for fold in order.tensor_split(FOLDS):
        held = fold.sort().values
        rest = torch.tensor(sorted({*range(len(train_set))} - {*held.tolist()}))
        detector = DETECTORS[cfg.detector.name](backbone, **cfg.detector.options)
        learn, ask = (Loader(train_set, cfg.batch_size, "cpu", indices=i) for i in (rest, held))
        detector.fit(batches_of(learn, "features", detector.normalization), len(rest))
        left, new = examine_set(detector, learn, "left out", leave_out=True), examine_set(detector, ask, "held out")
        for rate in RATES:
            alarms[rate] += int((new.scores > normal_threshold(left.scores, false_alarm_rate=rate)).sum())
            if left.maps is not None:
                limit = pixel_threshold(region_maps(left.maps, train_set, indices=rest), rate)
                found = region_maps(new.maps, train_set, indices=held)
                shares[rate] += [float((heat > limit).float().mean()) for heat in found]
    n, rows = len(train_set), []
    for rate in RATES:
        low, high = binomial_interval(alarms[rate], n)
        pixels = f"{sum(shares[rate]) / n:.4f}" if shares[rate] else "-"
        held = "yes" if low <= rate <= high else "fewer" if high < rate else "NO, more"
        rows.append(
            [str(rate), f"{alarms[rate]} of {n}", f"{alarms[rate] / n:.3f}", f"{low:.3f} to {high:.3f}", held, pixels]
        )
    header = ["promised", "false alarms", "observed", "95 % interval", "promise inside it", "pixels above theirs"]
    print(markdown_table(header, rows))


if __name__ == "__main__":
    errors.run(lambda argv: main(argv or sys.exit(__doc__)))
