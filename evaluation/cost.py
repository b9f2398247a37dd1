"""What a backbone costs: parameters, operations, the maps that it gives, images per second."""

import statistics
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

TURNS = 5  # of which the median is the time


@torch.no_grad()
def describe(backbone: nn.Module, size: int, *, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict:
    """Metrics of one backbone for images of size x size pixels, in eval mode.

    parameters: trainable numbers. gflops: of one image, 10^9 multiplications and additions, each counted, of
    convolutions and matrix products (torch's FlopCounterMode); papers often give multiply-adds, half as many.
    features: (D,). stages: [(C, H, W)]. images_per_second: of `forward` under autocast to `dtype` (float32: none), the
    median of 5 turns, on batches that are on the device.
    """
    backbone = backbone.to(device, memory_format=torch.channels_last).eval()
    images = torch.randn(batch_size, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # other kernels' are not all counted
        features = backbone(images[:1])
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        stages = backbone.forward_stages(images[:1])
        seconds = []
        for _ in range(1 + TURNS):  # the first warms up
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            backbone(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return {
        "parameters": sum(p.numel() for p in backbone.parameters()),
        "gflops": counter.get_total_flops() / 1e9,
        "features": features.shape[1],
        "stages": [list(stage.shape[1:]) for stage in stages],
        "images_per_second": batch_size / statistics.median(seconds[1:]),
    }


def description_table(described: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Column names and rows for `markdown_table`."""
    columns = ["backbone", "parameters", "GFLOPs", "features", "stages: channels x height x width", "images/s"]
    rows = []
    for name, d in described.items():
        stages = ", ".join("x".join(map(str, stage)) for stage in d["stages"])
        metrics = [f"{d['parameters']:,}", f"{d['gflops']:.2f}", str(d["features"]), stages]
        rows.append([name, *metrics, f"{d['images_per_second']:.1f}"])
    return columns, rows
