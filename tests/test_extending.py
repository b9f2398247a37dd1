"""docs/extending.md, followed to the letter in a copy of the repository: its files, rows and commands, the tests that
find what is new by themselves, and what the examples compute."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy import stats
from sklearn.metrics import average_precision_score

from data.augment.random_numbers import KINDS
from data.augment.views import View
from data.datasets.folder import ClassFolder
from data.datasets.mvtec import MVTec
from models.anomaly.detector import TrainingBatch
from models.backbones.resnet import ResNet18
from runtime import config
from runtime.errors import UserError
from tests.images import TOP, write_classes, write_mvtec
from tests.processes import script, start_script

PAGE = TOP / "docs" / "extending.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
COMMANDS = [line for kind, text in BLOCKS if not kind for line in text.splitlines() if line.startswith("python ")]

PRETRAINING = ["epochs=1", "optim.warmup_epochs=0", "batch_size=8", "data.size=32", "augment.size=32", "precision=fp32"]
SMALL = {
    "train_ssl.py": PRETRAINING,
    "train_average.py": PRETRAINING,
    "train_anomaly.py": ["data.size=64", "data.fit=squash", "data.resize=null", "batch_size=4"],
    "eval.py": ["batch_size=1"],
}
FURTHER = {  # what makes a config small beyond that
    "configs/swav_cifar10.yaml": ["method.freeze_prototypes=0", "method.hidden=16", "method.prototypes=30"],
    "configs/simplenet_mvtec.yaml": ["backbone=resnet18", "epochs=1", "detector.width=16", "detector.hidden=16"],
}
# A new row's tests are named after it; these files have tests of whole tables beside them
NEW = "swav or simplenet or mnasnet"
TABLES = "test_random_numbers or test_every_option_has_its_line or shares_is_the_same_network or knows_no"


def follow(top: Path) -> None:
    """What the page tells to do in the folder `top`, up to its end, but for running anything of Python."""
    for kind, text in BLOCKS:
        first, _, rest = text.partition("\n")
        if kind == "python":
            (top / first.removeprefix("# ")).write_text(rest)
        elif kind == "yaml":
            (top / re.search(r"configs/\w+\.yaml", first)[0]).write_text(text)
        elif kind == "diff":
            change(top / first.removeprefix("# "), rest)
        else:
            for line in text.splitlines():
                if line.startswith("cp "):
                    subprocess.run(shlex.split(line), cwd=top, check=True)


def change(path: Path, diff: str) -> None:
    """Apply a diff without line numbers: what it keeps and removes stands in the file exactly once."""
    text = "\n" + path.read_text()
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines()
        old, new = ("\n" + "".join(f"{line[1:]}\n" for line in lines if line[:1] != sign) for sign in "+-")
        assert text.count(old) == 1, f"{path} has this {text.count(old)} times:{old}"
        text = text.replace(old, new)
    path.write_text(text[1:])


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository in which the page was followed."""
    top = tmp_path_factory.mktemp("copy")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=TOP, capture_output=True, text=True, check=True).stdout.split("\0")
    for file in filter(None, files):
        if (TOP / file).is_file():
            (top / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(TOP / file, top / file)
    follow(top)
    return top


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """What the commands call /path/to."""
    place = tmp_path_factory.mktemp("place")
    write_classes(place / "images")
    write_mvtec(place / "mvtec", category="bottle", size=64)
    for name, found in (("classes", place / "images"), ("defects", place / "mvtec" / "bottle")):
        shutil.copytree(found, place / name)
        write_table(place / name)
    torch.save(torchvision.models.resnet18().state_dict(), place / "resnet18.pth")
    return place


def write_table(root: Path) -> None:
    """images.csv of <root>/<split>/<label>/*.png, with a column `mask` where there is a ground_truth/."""
    masked, rows = (root / "ground_truth").is_dir(), []
    for file in sorted(path.relative_to(root) for path in root.glob("t*/*/*.png")):
        split, label, name = file.parts
        mask = f"ground_truth/{label}/{Path(name).stem}_mask.png" if label != "good" else ""
        rows.append([split, str(file), label] + ([mask] if masked else []))
    header = ["split", "file", "label"] + (["mask"] if masked else [])
    (root / "images.csv").write_text("\n".join(map(",".join, [header, *rows])) + "\n")


def module_of(copy: Path, file: str, monkeypatch):
    """A module of the copy beside the repository's own ones."""
    name = file.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, copy / file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def words_of(line: str, place: Path) -> list[str]:
    """A command of the page at small size, with its data in `place`: the script and its words."""
    line = line.replace("/path/to", str(place)).replace("=IMAGENET1K_V1", f"={place}/resnet18.pth")
    _, name, *words = shlex.split(line)
    return [name, *config.overlay(words, SMALL[name], FURTHER.get(words[0], []), ["device=cpu"])]


@pytest.mark.slow
def test_every_command_runs_at_small_size(copy, place, tmp_path):
    """In the order of the page, for a later one needs the checkpoint of an earlier one."""
    assert {shlex.split(line)[1] for line in COMMANDS} == {*SMALL}
    for line in COMMANDS:
        if "--help" in line:
            process = start_script(shlex.split(line)[1:], tmp_path / "help", top=copy)
            process.join()
            assert process.exitcode == 0 and "method.freeze_prototypes" in (tmp_path / "help").read_text()
        else:
            assert script(words_of(line, place), top=copy)


def generic_tests(copy: Path, *words: str) -> str:
    """What pytest prints of the tests of the copy that concern what is new; they are green."""
    command = [sys.executable, "-m", "pytest", "-q", "--ignore=tests/test_extending.py", *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


@pytest.mark.slow
def test_the_tests_of_every_method_detector_and_backbone_pass(copy):
    """The quickest ones that each is in."""
    files = ["models/ssl/test_methods.py", "models/anomaly/test_by_gradient.py", "models/backbones/test_backbones.py"]
    files += ["data/augment/test_recipes.py", "data/augment/test_random_numbers.py", "runtime/test_help.py"]
    files += ["models/weights/test_names.py", "models/weights/test_sources.py", "runtime/test_tags.py"]
    files += ["test_readme.py"]
    chosen = f"({NEW} or {TABLES}) and not channels_last and not pretraining_changes"  # which take long
    printed = generic_tests(copy, "-m", "not slow", "-k", chosen, *(f"tests/{file}" for file in files))
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 40


@pytest.mark.slow
def test_all_tests_that_concern_what_is_new_pass(copy):
    generic_tests(copy, "-k", NEW, "tests")


def test_it_would_pass_make_lint(copy):
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_a_table_is_what_it_names(copy, place, monkeypatch):
    table = module_of(copy, "data/datasets/csv_table.py", monkeypatch).CSVTable
    for split in ("train", "test"):
        ours, theirs = table(split, 24, root=f"{place}/classes"), ClassFolder(split, 24, root=f"{place}/images")
        assert ours.classes == theirs.classes and len(ours) == len(theirs) > 0 and ours.defects is None
        assert all(torch.equal(a, b) for a, b in zip(ours[1][:1], theirs[1][:1]))
        assert torch.equal(ours.labels, theirs.labels)
        ours, theirs = (
            table(split, 24, root=f"{place}/defects"),
            MVTec(split, 24, root=f"{place}/mvtec", category="bottle"),
        )
        assert (ours.classes, ours.defects, len(ours)) == (theirs.classes, theirs.defects, len(theirs))
        for a, b in zip(ours, theirs):
            assert len(a) == len(b) and all(torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b))
    with pytest.raises(UserError, match=r"there is no .*/other\.csv; set data\.table"):
        table("train", 24, root=f"{place}/classes", table="other.csv")


def test_mnasnet_is_torchvisions(copy, monkeypatch):
    ours = module_of(copy, "models/backbones/mnasnet.py", monkeypatch).MNASNet(num_classes=10)
    theirs = torchvision.models.mnasnet1_0(num_classes=10)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    began = {name: tensor.std().item() for name, tensor in ours.state_dict().items() if tensor.ndim > 1}
    assert began == pytest.approx({name: theirs.state_dict()[name].std().item() for name in began}, rel=0.25)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_the_views_of_swav_are_the_official_ones(copy, monkeypatch):
    views = module_of(copy, "data/augment/recipes.py", monkeypatch).RECIPES["swav"]()
    common = {"jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8, "gray_p": 0.2, "blur_p": 0.5, "blur_kernel": 17}
    common |= {"flip_p": 0.5, "blur_sigma": (0.1, 2.0), "interpolation": "bilinear"}
    assert views == [View(224, (0.14, 1.0), **common)] * 2 + [View(96, (0.05, 0.14), **common)] * 6


def test_the_loss_of_swav_is_the_official_one(copy, monkeypatch):
    """main_swav.py's loop in float64; the first two of five views have codes."""
    scores = torch.randn(6, 5, 4, dtype=torch.float64).clamp(-1, 1)
    batch, views, prototypes = scores.shape
    expected = 0.0
    for i in (0, 1):
        q = np.exp(scores[:, i].numpy() / 0.05).T  # (K, B)
        q /= q.sum()
        for _ in range(3):
            q *= (1 / prototypes / q.sum(1))[:, None]
            q *= (1 / batch / q.sum(0))[None]
        q = (q / q.sum(0, keepdims=True)).T  # (B, K)
        for v in set(range(views)) - {i}:
            p = np.exp(scores[:, v].numpy() / 0.1)
            p /= p.sum(1, keepdims=True)
            expected -= (q * np.log(p)).sum(1).mean() / (views - 1) / 2
    swapped_prediction = module_of(copy, "losses/swav.py", monkeypatch).swapped_prediction
    assert swapped_prediction(scores, 0.1).item() == pytest.approx(expected, rel=1e-10)
    scores.requires_grad_()
    swapped_prediction(scores, 0.1).backward()
    half = scores.detach().half().requires_grad_()
    swapped_prediction(half, 0.1).backward()
    assert half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad.double(), scores.grad, rtol=0.1, atol=0.02)


def test_prototypes_stay_of_unit_length_and_are_frozen_at_first(copy, monkeypatch):
    module_of(copy, "losses/swav.py", monkeypatch)
    method = module_of(copy, "models/ssl/swav.py", monkeypatch).SwAV(ResNet18(), prototypes=5, hidden=8, out=4)
    prototypes = method.online.head.prototypes.weight
    assert list(method.frozen()) == [prototypes]
    method.set_epoch(1)
    assert list(method.frozen()) == []
    with torch.no_grad():
        prototypes.mul_(3)
    method.after_step(1.0)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(5))


@pytest.fixture
def simplenet(copy, monkeypatch):
    monkeypatch.setitem(KINDS, "simplenet", (7,))
    return module_of(copy, "models/anomaly/simplenet.py", monkeypatch)


def test_simplenet_learns_from_noise_of_its_own_for_each_image(simplenet):
    detector = simplenet.SimpleNet(ResNet18(), width=48, hidden=8, noise=0.3, margin=0.7)
    raw_images, ids = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8), torch.arange(4)
    labels = torch.zeros(4, dtype=torch.int64)
    [(patches, noise)] = detector.steps(TrainingBatch(raw_images, labels, ids, 2, 5))
    assert patches.shape == noise.shape == (4, 8, 8, 48) and stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    [(_, alone)] = detector.steps(TrainingBatch(raw_images[2:3], labels[:1], ids[2:3], 2, 5))
    [(_, later)] = detector.steps(TrainingBatch(raw_images, labels, ids, 3, 5))
    assert torch.equal(alone[0], noise[2]) and (later - noise).std() > 1.2

    loss, told = detector.train()(patches, noise)
    good = patches.reshape(-1, 48) @ detector.adaptor.weight.T + detector.adaptor.bias
    rows = torch.cat([good, good + 0.3 * noise.reshape(-1, 48)])
    first, norm, _, last = detector.discriminator
    hidden = F.linear(rows, first.weight, first.bias)
    hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + norm.eps).sqrt()
    good, noisy = (torch.where(hidden > 0, hidden, 0.2 * hidden) @ last.weight.T).chunk(2)
    expected = (0.7 - good).clamp(min=0).mean() + (0.7 + noisy).clamp(min=0).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert told["told_apart"].item() == pytest.approx(((good > 0).sum() + (noisy < 0).sum()).item() / len(rows))


def test_simplenet_scores_the_worst_patch_and_finds_it_beside_padding(simplenet):
    detector, grid = simplenet.SimpleNet(ResNet18(), width=8, hidden=8), torch.full((2, 8, 8), -0.5)
    grid[0, 2, 5], grid[1, 6, 1], grid[1, 0, 7] = 0.3, -0.1, 2.0
    valid = torch.ones(2, 64, 64, dtype=torch.bool)
    valid[1, :, 48:] = False  # scores in the padding do not count
    found = detector.measure(grid, (64, 64), valid)
    assert found.scores.tolist() == pytest.approx([0.3, -0.1])
    assert (found.peaks - torch.tensor([[20.0, 44.0], [52.0, 12.0]])).abs().max() < 4


def test_retrieval_is_scikit_learns(copy, monkeypatch):
    retrieval = module_of(copy, "evaluation/tasks/retrieval.py", monkeypatch).retrieval
    features, labels = torch.randn(20, 3), torch.arange(20) % 4
    labels[0] = 9  # alone
    cosines = F.cosine_similarity(features[:, None], features[None], dim=2)
    precisions, first = [], []
    for i in range(1, 20):
        others = [j for j in range(20) if j != i]
        precisions.append(average_precision_score(labels[others] == labels[i], cosines[i, others]))
        first.append(labels[others][cosines[i, others].argmax()] == labels[i])
    found = retrieval(features, labels)
    assert found["mean_average_precision"] == pytest.approx(np.mean(precisions))
    assert found["recall_at_1"] == pytest.approx(np.mean(first))


@pytest.mark.slow
def test_an_average_of_momentum_0_is_the_network(copy, place, tmp_path):
    """The changed loop is that of train_ssl.py, and evaluates what it says."""
    about = ["configs/simclr_neu.yaml", f"data.root={place}/images", f"runs={tmp_path}", "backbone=mobilenet_v2"]
    about = config.overlay(about, PRETRAINING, ["backbone.width=0.25", "device=cpu", "epochs=2", "holdout=0.3"])
    plain = script(["train_ssl.py", *about, "run_name=plain"])
    for momentum in (0, 0.9):
        changed = script(
            ["train_average.py", *about, f"average={momentum}", "run_name=changed", "resume=never"], top=copy
        )
        assert changed["loss"] == plain["loss"]
        saved = torch.load(tmp_path / "changed" / "last.pt", weights_only=True)
        same = [torch.equal(saved["average"][name], tensor) for name, tensor in saved["model"].items()]
        if momentum == 0:
            assert all(same) and changed["knn20_top1"] == plain["knn20_top1"]
            assert changed["features/std"] == plain["features/std"]
        else:
            assert not all(same) and changed["features/std"] != plain["features/std"]
