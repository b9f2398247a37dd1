"""A sheet of synthetic defects on training images, spread evenly over the set.

    python eval.py task=defects data.name=mvtec data.root=/mvtec data.category=tile data.size=256

Draws all kinds of defects, or one with its options (`defect=nsa defect.patches=1`). Writes defects.png, results.json
and TensorBoard events to runs/<run_name>/eval_defects/.
"""

from dataclasses import dataclass

import torch
from torchvision.transforms.functional import pil_to_tensor

from data import DataConfig, DefectConfig, build_dataset, settled
from data.defects import DEFECTS
from plots.heatmaps import save
from plots.sheets import defect_sheet
from runtime import checkpoint, config, distributed
from runtime.log import Log
from runtime.values import Few, PathText, Seed


@dataclass(kw_only=True)
class Config:
    task: str  # this one
    data: DataConfig  # the images
    defect: DefectConfig | None = None  # None: all kinds, as they are by default
    images: Few = 6  # columns of the sheet
    seed: Seed = 0  # of the defects
    device: str = "auto"  # auto, cpu, cuda or cuda:1; auto: CUDA where there is one
    runs: PathText = "runs"  # folder of all runs
    run_name: str = "eval"  # folder below it


def run(cfg: Config) -> None:
    folder = config.run_folder(cfg) / "eval_defects"
    device = distributed.setup(cfg.device)
    cfg.data = settled(cfg.data)
    dataset = build_dataset(cfg.data, "train")
    ids = torch.linspace(0, len(dataset) - 1, min(cfg.images, len(dataset))).round().long()
    images = torch.stack([dataset[i][0] for i in ids.tolist()]).to(device)
    chosen = {cfg.defect.name: cfg.defect.options} if cfg.defect else {name: {} for name in DEFECTS}
    made = {name: DEFECTS[name](**options)(images, ids, 0, seed=cfg.seed) for name, options in chosen.items()}

    checkpoint.open_run(folder, config.as_dict(cfg))
    log = Log(folder, cfg)
    image = defect_sheet(images, made, f"Synthetic defects on training images, seed {cfg.seed}")
    save(image, folder / "defects.png")
    log.image("defects", pil_to_tensor(image))
    shares = {name: {"masked": float(masks.float().mean())} for name, (_, masks) in made.items()}
    log.results({"task": "defects", "sheet": str(folder / "defects.png"), "kinds": shares})
    distributed.cleanup()
