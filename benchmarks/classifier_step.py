"""Images per second of a step of train_classifier.py, against its network's bare passes over ready tensors.

    python -m benchmarks.classifier_step [--write]      # --write: benchmarks/results/classifier_step.md

The step is what train_classifier.py does with uint8 images on the device: views, mixing, forward, loss, backward,
optimizer; it neither reads images nor logs. Each row leaves so many layers of the backbone to learn, from the top.
"Bare" is the forward of the same network over float tensors of the same size, and the backward of its sum, with the
same layers frozen. The two take turns, and medians count; the clocks are those of `benchmarks.train_step`.
"""

import argparse
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from statistics import median

import torch

import train_classifier
from benchmarks.machine import processor
from benchmarks.train_step import Step, timed
from data import build_augment
from data.augment.mixing import Mix
from losses.supervised import LOSSES, soft_targets
from models.classifier import build_classifier
from runtime import config, distributed
from runtime.version import commit
from training.optim import apply_gradients, build_optimizer, mixed_precision, set_rates
from training.unfreezing import Layers

CLASSES, RATE = 10, 1e-3


def steps_of(cfg: train_classifier.Config, device: torch.device, count: int) -> tuple[Step, Step]:
    """The step in three parts (views; forward and backward; optimizer), and the bare one."""
    batch, side = cfg.batch_size, cfg.data.size[0]
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    labels, ids = torch.arange(batch, device=device) % CLASSES, torch.arange(batch)
    model, _ = build_classifier(cfg.backbone, cfg.head, CLASSES)
    augment = build_augment(cfg.augment, cfg.seed, None, model.normalization)
    mix = cfg.mix and Mix(cfg.mix, cfg.seed)
    model.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg.optim, model)
    Layers(model, model.backbone).train(count)
    autocast, scaler = mixed_precision(cfg.precision, device)
    ready = torch.randn(batch, 3, *([cfg.augment.options["size"]] * 2), device=device)

    def step(number: int) -> Iterator[None]:
        set_rates(optimizer, RATE, cfg.optim.weight_decay, RATE)
        (views,) = augment(images, ids, number)
        targets = soft_targets(labels, CLASSES, cfg.label_smoothing)
        if mix:
            views, targets = mix(views, targets, ids, number)
        yield
        with autocast():
            loss = LOSSES[cfg.loss.name](model(views), targets, **cfg.loss.options)
        scaler.scale(loss).backward()
        yield
        apply_gradients(optimizer, scaler, model.parameters(), cfg.optim)
        yield

    def bare(_: int) -> Iterator[None]:
        with autocast():
            logits = model(ready)
        logits.sum().backward()
        model.zero_grad(set_to_none=True)
        yield

    return step, bare


def measure(cfg: train_classifier.Config, device: torch.device, count: int, turns: int) -> list[str]:
    """A row of the table."""
    torch.manual_seed(0)
    step, bare_step = steps_of(cfg, device, count)
    seconds = [(timed(step, device, turn), timed(bare_step, device, turn)) for turn in range(1 + turns)][1:]  # warm
    (views, _, rest, whole), (_, bare) = (map(median, zip(*chain(*column))) for column in zip(*seconds))
    row = [cfg.backbone.name, f"{count}", f"{cfg.augment.options['size']}"]
    row += [f"{cfg.batch_size / each:,.1f}" for each in (whole, bare)]
    return [*row, *(f"{each / whole:.1%}" for each in (bare, views, rest))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--turns", type=int, default=5, help="of a step and bare passes each")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/classifier_step.md (_cuda)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = distributed.setup(options.device)
    on_cuda = device.type == "cuda"
    machine = torch.cuda.get_device_name() if on_cuda else f"{processor()}, one CPU thread"
    lines = [
        "# A step of train_classifier.py and its network's bare passes: images per second\n",
        f"`python -m benchmarks.classifier_step`, configs/classifier_neu.yaml with mixup and CutMix, batch "
        f"{options.batch}, median {'events' if on_cuda else 'CPU seconds'} of {options.turns} turns, on {machine}; "
        f"torch {torch.__version__}; commit {commit()}.\n",
        "| backbone | layers that learn | pixels | step, images/s | bare, images/s | step / bare | share of views | "
        "share of optimizer |",
        "|---" * 8 + "|",
    ]
    print("\n".join(lines), flush=True)
    words = ["configs/classifier_neu.yaml", f"batch_size={options.batch}", "mix.mixup=0.8", "mix.cutmix=1"]
    for backbone, counts in (("mobilenet_v2", (0, 8, 19)), ("resnet18", (0, 1, 5))):
        for count in counts:
            cfg = config.load(train_classifier.Config, [*words, f"backbone={backbone}"])
            lines.append(f"| {' | '.join(measure(cfg, device, count, options.turns))} |")
            print(lines[-1], flush=True)
    if options.write:
        file = f"classifier_step{'_cuda' * on_cuda}.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
