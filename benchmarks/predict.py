"""Seconds an image that predict.py takes: PatchCore with a bank of about 16,000 patches.

    python -m benchmarks.predict [--write]                 # --write: results/predict.md
    python -m benchmarks.predict --device cuda --turns 10 --precision bf16

Weights are random and images are drawn, which changes no step of the work but how many distances the exact search
has to evaluate again. `examine` is the detector alone on batches that lie on the device: backbone, search, map. The
last two columns are the whole script on JPEGs of 800 x 600, with decoding, heat maps and the table, in batches of 16:
images as they are fitted into the input, and each in tiles of the input's size rounded up to a multiple of 32.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

import predict
from benchmarks.machine import processor
from data import DataConfig
from data.normalize import normalize
from models.anomaly import DETECTORS, DetectorConfig
from models.anomaly.detector import Batch, Detector
from models.backbones.build import BackboneConfig, build_backbone
from runtime import checkpoint, config
from runtime.precision import PRECISIONS
from runtime.version import commit

CASES = [("wide_resnet50_2", 224), ("wide_resnet50_2", 256), ("mobilenet_v2", 224), ("mobilenet_v2", 256)]
PATCHES = 16_000  # at least so many in the bank, which holds every patch of enough images


def drawn(height: int, width: int, seed: int) -> Tensor:
    """Blobs with noise: uint8 (3, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 24, width // 24, generator=generator)
    blobs = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]
    return (255 * (blobs + 0.1 * torch.randn(3, height, width, generator=generator))).clamp(0, 255).to(torch.uint8)


def fitted(backbone: str, size: int, device: torch.device) -> tuple[Detector, dict]:
    """A detector with its bank, and the sections of the config that made it."""
    torch.manual_seed(0)
    parts = {
        "data": config.build(DataConfig, {"name": "folder", "root": "none", "size": size}),
        "backbone": config.build(BackboneConfig, {"name": backbone}),
        "detector": config.build(DetectorConfig, {"name": "patchcore", "coreset": 1.0}),
    }
    detector = DETECTORS["patchcore"](build_backbone(parts["backbone"])[0], **parts["detector"].options)
    detector.to(device, memory_format=torch.channels_last)
    n = -(-PATCHES // (size // 8) ** 2)
    numbers = torch.arange(n, device=device)
    images = [normalize(drawn(size, size, i)[None], detector.normalization).to(device) for i in range(n)]
    detector.fit([Batch(image, None, number[None]) for image, number in zip(images, numbers)], n)
    return detector, {name: config.as_dict(part) for name, part in parts.items()}


def examine_seconds(detector: Detector, size: int, batch: int, turns: int, device: torch.device, dtype) -> float:
    """Seconds an image, of the fastest turn."""
    pixels = torch.stack([drawn(size, size, 1000 + i) for i in range(batch)])  # (B, 3, S, S)
    images = normalize(pixels, detector.normalization).to(device)
    seconds = []
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for _ in range(turns + 1):  # the first warms up
            start = time.perf_counter()
            detector.examine(images).scores.cpu()
            seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / batch


def script_seconds(detector: Detector, sections: dict, n_images: int, *words: str) -> float:
    """Seconds an image of predict.py, without reading the checkpoint."""
    scale = {"threshold": 1.0, "pixel_threshold": 1.0, "low": 0.0, "high": 1.0}
    with tempfile.TemporaryDirectory() as place:
        top = Path(place)
        (top / "run").mkdir()
        (top / "images").mkdir()
        about = {"config": sections | {"precision": "fp32"}, "calibration": scale, "step": 1}
        names = [str(i) for i in range(100)]
        checkpoint.save(top / "run" / checkpoint.LAST, {"model": detector}, names=names, **about)
        for i in range(n_images):
            pixels = drawn(600, 800, 2000 + i).permute(1, 2, 0).contiguous().numpy()  # (600, 800, 3)
            Image.fromarray(pixels).save(top / "images" / f"{i}.jpg", quality=92)
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            predict.main([str(top / "run"), str(top / "images"), f"out={top / 'out'}", *words])
        return 1 / json.loads(said.getvalue().splitlines()[-1])["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="fp32")
    parser.add_argument("--turns", type=int, default=3, help="runs of `examine`, the fastest counts")
    parser.add_argument("--images", type=int, default=32, help="images for the whole script; a quarter for tiles")
    parser.add_argument("--only", choices=sorted({name for name, _ in CASES}), help="one of the backbones")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/predict.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else processor()
    lines = [
        "# predict.py: seconds per image, PatchCore",
        "",
        f"`python -m benchmarks.predict`, {options.precision}, fastest of {options.turns} turns (the script: one), on "
        f"{machine}, {torch.get_num_threads()} CPU threads; torch {torch.__version__}; commit {commit()}. Random "
        "weights; the script reads JPEGs of 800 x 600 and writes heat maps of that size.",
        "",
        "| backbone | input | bank | examine, batch 1 | examine, batch 16 | script | script, tiles |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    words = [f"device={options.device}", f"precision={options.precision}"]
    for name, size in CASES:
        if options.only not in (None, name):
            continue
        detector, sections = fitted(name, size, device)
        dtype = PRECISIONS[options.precision]
        one, many = (examine_seconds(detector, size, batch, options.turns, device, dtype) for batch in (1, 16))
        script = script_seconds(detector, sections, options.images, *words)
        tile = -(-size // 32) * 32
        tiles = script_seconds(detector, sections, max(1, options.images // 4), *words, f"tile={tile}", "overlap=64")
        bank = " x ".join(f"{n:,}" for n in detector.bank.entries.shape)
        lines.append(f"| {name} | {size} | {bank} | {one:.3f} | {many:.3f} | {script:.3f} | {tiles:.2f} |")
        print(lines[-1], flush=True)
    if options.write:
        (Path(__file__).parent / "results" / "predict.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
