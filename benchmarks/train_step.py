"""Images per second of each pretraining method's step, against its network's bare passes over ready tensors.

    python -m benchmarks.train_step [--write]      # --write: benchmarks/results/train_step.md (train_step_cuda.md)
    python -m benchmarks.train_step --device cuda --batch 512 --methods dino byol

The step is what train_ssl.py does with uint8 images on the device: views, forward, loss, backward, clipping,
optimizer, `after_step`; it neither reads images nor logs. Views, options and optimizer are those of
configs/<method>_cifar10.yaml (RevD has none: configs/revd_neu.yaml at 32 pixels); network, batch and precision are one
for all rows, and images are noise. "Passes": how many views of an image the network sees with a gradient, and its
moving average without. "Bare" are the same passes over float tensors of the same sizes, forward and, with a gradient,
backward: no head, loss or optimizer. RevD, which stops after stage 3, is compared to all four stages.

The two take turns, and medians count. A turn is on a CPU one step, in CPU seconds of one thread, which other programs
change little, or in wall seconds of several; on CUDA ten in a queue, between events in the stream. "Host waits" are
what torch.cuda.set_sync_debug_mode warns of in one step: .item(), nonzero, blocking copies, but not asynchronous copies
of memory that is not pinned. "Peak" is torch.cuda.max_memory_allocated.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import train_ssl
from benchmarks.machine import processor
from data import build_augment
from models.backbones.build import build_backbone, normalization_from
from models.ssl import SSL_METHODS
from models.ssl.gradient import backward
from runtime import config, distributed
from runtime.precision import PRECISIONS
from runtime.version import commit
from training.optim import apply_gradients, build_optimizer, mixed_precision, set_rates

CONFIGS = {"revd": ["configs/revd_neu.yaml", "data.size=32", "augment.size=32"]}
CLASSES, RATE = 10, 1e-3  # of labels; of learning, whatever the schedule
QUEUED = {"cpu": 1, "cuda": 10}  # steps of a turn
Step = Callable[[int], Iterator[None]]  # does step number n and yields at the end of each of its parts


def mark(device: torch.device):
    """Now: an event, or seconds."""
    if device.type == "cuda":
        return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(step: Step, device: torch.device, turn: int) -> list[list[float]]:
    """Seconds of each part and, last, of all of each step of a turn."""
    first = turn * QUEUED[device.type]
    marks = [[mark(device), *(mark(device) for _ in step(first + n))] for n in range(QUEUED[device.type])]
    if device.type == "cuda":
        torch.cuda.synchronize()
        marks = [[each[0].elapsed_time(m) / 1000 for m in each] for each in marks]
    return [[b - a for a, b in [*pairwise(each), (each[0], each[-1])]] for each in marks]


def train_step(cfg: train_ssl.Config, device: torch.device) -> Step:
    """The step of train_ssl.py in three parts: views; forward and backward; what follows."""
    batch, side = cfg.batch_size, cfg.data.size[0]
    images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
    labels, ids = torch.arange(batch, device=device) % CLASSES, torch.arange(batch)
    about = torch.full((batch, 2), side), normalization_from(cfg.backbone)
    augment = train_ssl.with_defects(cfg, build_augment(cfg.augment, cfg.seed, *about))
    method = SSL_METHODS[cfg.method.name](build_backbone(cfg.backbone)[0], **cfg.method.options)
    method.to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer(cfg.optim, method)
    autocast, scaler = mixed_precision(cfg.precision, device)

    def step(number: int) -> Iterator[None]:
        method.train()
        method.set_epoch(number)  # each step is of another epoch, so that views differ and DINO's last layer moves
        set_rates(optimizer, RATE, cfg.optim.weight_decay, RATE)
        views = augment(images, ids, number)
        yield
        backward(method, method, [(images, labels, ids)], lambda *_: views, scaler, autocast, number)
        yield
        apply_gradients(optimizer, scaler, method.parameters(), cfg.optim, frozen=method.frozen())
        method.after_step(cfg.ema.start)
        yield

    return step


def passes_of(step: Step) -> list[tuple[torch.Size, bool]]:
    """What a step passes through backbones: the shape of each batch, and whether with a gradient."""
    passes = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.Conv2d) and module.in_channels == 3:  # the first, for RevD calls no backbone's forward
            passes.append((inputs[0].shape, torch.is_grad_enabled()))

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    list(step(0))
    hook.remove()
    return passes


def host_waits(step: Step) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(step(1))
    torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def measure(cfg: train_ssl.Config, device: torch.device, turns: int) -> list[str]:
    """A row of the table."""
    torch.manual_seed(0)
    on_cuda = device.type == "cuda"
    autocast, _ = mixed_precision(cfg.precision, device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    step = train_step(cfg, device)
    passes = passes_of(step)
    on_device = [f"{host_waits(step)}", f"{torch.cuda.max_memory_allocated() / 2**20:,.0f}"] if on_cuda else ["-", "-"]
    network = build_backbone(cfg.backbone)[0].to(device, memory_format=torch.channels_last)
    batches = [(torch.randn(shape, device=device), gradient) for shape, gradient in passes]

    def bare_step(_: int) -> Iterator[None]:
        for batch, gradient in batches:
            with autocast(), torch.set_grad_enabled(gradient):
                features = network(batch)
            if gradient:
                features.sum().backward()
        network.zero_grad(set_to_none=True)
        yield

    seconds = [(timed(step, device, turn), timed(bare_step, device, turn)) for turn in range(1 + turns)][1:]  # warm
    (views, _, rest, whole), (_, bare) = (map(median, zip(*chain(*column))) for column in zip(*seconds))
    seen = [sum(len(x) for x, gradient in batches if gradient is wanted) / cfg.batch_size for wanted in (True, False)]
    row = [cfg.method.name, f"{seen[0]:g} + {seen[1]:g}", f"{passes[0][0][-1]}"]
    row += [f"{cfg.batch_size / seconds:,.1f}" for seconds in (whole, bare)]
    return [*row, *(f"{seconds / whole:.1%}" for seconds in (bare, views, rest)), *on_device]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=SSL_METHODS, default=list(SSL_METHODS), metavar="METHOD")
    parser.add_argument("--backbone", nargs="+", metavar=("NAME", "KEY=VALUE"), default=["resnet18", "stem=cifar"])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--turns", type=int, default=5, help="of a step and bare passes each")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/train_step.md (_cuda.md)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = distributed.setup(options.device)
    on_cuda = device.type == "cuda"
    same = [f"batch_size={options.batch}", f"precision={options.precision}", f"backbone={options.backbone[0]}"]
    same += [f"backbone.{key}" for key in options.backbone[1:]]
    clock = "events" if on_cuda else "CPU seconds" if options.threads == 1 else "wall seconds"
    machine = torch.cuda.get_device_name() if on_cuda else f"{processor()}, CPU threads: {options.threads}"
    lines = [
        "# A training step and its network's bare passes: images per second\n",
        f"`python -m benchmarks.train_step`, {' '.join(options.backbone)}, batch {options.batch}, {options.precision}, "
        f"median {clock} of {options.turns} turns, on {machine}; torch {torch.__version__}; commit {commit()}.\n",
        "| method | passes | pixels | step, images/s | bare, images/s | step / bare | share of views | share of "
        "optimizer, average, update | host waits | peak, MiB |",
        "|---" * 10 + "|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.methods:
        cfg = config.load(train_ssl.Config, [*CONFIGS.get(name, [f"configs/{name}_cifar10.yaml"]), *same])
        lines.append(f"| {' | '.join(measure(cfg, device, options.turns))} |")
        print(lines[-1], flush=True)
    if options.write:
        file = "train_step_cuda.md" if on_cuda else "train_step.md"
        Path(__file__).with_name("results").joinpath(file).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
