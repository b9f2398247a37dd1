"""PatchCore beyond its memory limit, its covering radius in every mode, and on a GPU."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.anomaly.padim import PaDiM
from models.anomaly.patchcore import PatchCore
from models.backbones.resnet import ResNet18
from tests.images import TOP, batches
from tests.models.anomaly.test_patchcore import distances, textures

WATCHED = """
import threading, time, torch
from torch import nn
from models.anomaly.detector import Batch
from models.anomaly.patchcore import PatchCore

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024

class Wide(nn.Module):  # 1024 channels at stride 2: 4 MiB an image of 64 x 64
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 1024, 1)
    def forward_stages(self, x, last=4):
        return [self.mix(nn.functional.avg_pool2d(x, 2))]

torch.manual_seed(0)
torch.set_num_threads(1)
model = PatchCore(Wide(), stages=(1,), coreset={coreset}, memory_limit={limit}, neighborhood=1)
images = (Batch(torch.randn(2, 3, 64, 64), None, torch.tensor([2 * i, 2 * i + 1])) for i in range(40))
model.patches(model.features(torch.randn(2, 3, 64, 64)))
before, most, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.005):
        most[0] = max(most[0], anonymous())
thread = threading.Thread(target=watch)
thread.start()
model.fit(images, 80)
maps, scores = model.score(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
done.set()
thread.join()
print(most[0] - before, len(model.bank), float(scores), model.bank.entries.double().sum().item())
"""


def watched(**options) -> list[float]:
    """[MiB of anonymous memory at most while fitting and scoring, bank, a score, the bank's sum]."""
    text = WATCHED.replace("{coreset}", str(options["coreset"])).replace("{limit}", str(options["limit"]))
    done = subprocess.run([sys.executable, "-c", text], cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own memory, in /proc")
def test_a_bank_of_all_patches_does_not_need_to_fit_into_memory():
    """320 MiB of patches, all kept: two copies of them in RAM; within a limit of 10 MiB neither, only what a search
    works in. Both are sampled, and a busy machine misses a part of the peak."""
    small, large = watched(coreset=1.0, limit=0.01), watched(coreset=1.0, limit=8)
    assert small[1:] == large[1:] and small[1] == 80 * 32 * 32
    assert small[0] < 0.65 * large[0]


@pytest.mark.parametrize("mode", ["paper", "amazon", "anomalib"])
@pytest.mark.parametrize("coreset", [0.004, 0.02, 0.2])
def test_the_covering_radius_is_that_of_the_bank(mode, coreset):
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), mode=mode, coreset=coreset)
    images = textures(4)
    model.fit(batches(images, 2), 4)
    points = model._narrow(model.patches(model.features(images)).flatten(0, 2)).double().numpy()
    bank = model._narrow(model.bank.entries).double().numpy()
    assert model.facts()["covering_radius"] == pytest.approx(distances(points, bank).min(1).max(), rel=1e-4)


def test_adding_an_image_never_changes_the_projection():
    """anomalib's width grows with the number of patches: here none is needed to fit, and one would be to add."""
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), mode="anomalib", stages=(2,))
    model.fit(batches(textures(5), 5), 5)
    assert model.directions.numel() == 0
    before = model.bank.entries.clone()
    model.add(batches(textures(1, seed=3), 1, first=5), 1)
    assert model.directions.numel() == 0 and torch.equal(model.bank.entries[: len(before)], before)


@pytest.mark.parametrize(("coreset", "added"), [(0.5, 0), (1.0, 64)])
def test_adding_a_copy_adds_nothing_unless_all_is_kept(coreset, added):
    torch.manual_seed(1)
    model = PatchCore(ResNet18(), coreset=coreset)
    images = textures(1).expand(3, -1, -1, -1)
    model.fit(batches(images, 1), 3)
    before = len(model.bank)
    model.add(batches(images[:1], 1, first=3), 1)
    assert len(model.bank) == before + added


def test_a_state_without_a_bank_says_what_is_missing():
    model = PatchCore(ResNet18())
    state = {name: value for name, value in model.state_dict().items() if "bank" not in name}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*bank\.entries"):
        model.load_state_dict(state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("build", [lambda net: PatchCore(net, coreset=0.2), lambda net: PaDiM(net, channels=50)])
def test_a_gpu_finds_what_a_cpu_finds(build):
    found = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = build(ResNet18()).to(device)
        train = [batch._replace(images=batch.images.to(device), indices=batch.indices.to(device))
                 for batch in batches(textures(5), 2)]  # fmt: skip
        model.fit(train, 5)
        if isinstance(model, PatchCore):
            model.keep(torch.tensor([0, -1, 1, 2, 3], device=device))
            more = batches(textures(1, seed=2), 1, first=4)[0]
            model.add([more._replace(images=more.images.to(device), indices=more.indices.to(device))], 1)
        test = textures(2, seed=1).to(device)
        model.examine(train[0].images, None, train[0].indices)
        found.append(model.examine(test))
    for a, b in zip(*found):
        if a is not None:
            np.testing.assert_allclose(b.cpu().numpy(), a.numpy(), rtol=1e-3, atol=1e-3)
