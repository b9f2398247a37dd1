"""README, docs, configs and layout say what is true: every command is run, every link leads somewhere, every config
loads, every file has its size."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

import eval as evaluate
import predict
import sweep
import train_anomaly
import train_classifier
import train_ssl
from data import build_augment
from data.demo.generate import generate
from evaluation.tasks import export, knn
from models.backbones.build import normalization_from
from models.ssl import SSL_METHODS
from runtime import config
from runtime.errors import UserError
from tests.data.datasets.layouts import write_ad2, write_dimo, write_fiftyone, write_visa
from tests.images import TOP, write_classes, write_mvtec
from tests.processes import script

SMALL = {
    "train_ssl.py": [
        "epochs=1",
        "optim.warmup_epochs=0",
        "batch_size=4",
        "data.size=32",
        "augment.size=32",
        "device=cpu",
        "precision=fp32",
    ],
    "train_anomaly.py": ["data.size=64", "batch_size=4", "device=cpu"],
    "train_classifier.py": [
        "epochs=1",
        "unfreeze.head_epochs=0",
        "batch_size=4",
        "data.size=64",
        "augment.size=64",
        "device=cpu",
        "precision=fp32",
    ],
    "eval.py": ["data.size=32", "device=cpu"],
    "predict.py": ["device=cpu"],
}
FURTHER = {  # what makes a config small beyond that
    "configs/regad_mvtec.yaml": ["epochs=1"],
    "configs/fixmatch_neu.yaml": ["semi.warmup_epochs=0"],
    "configs/dino_scavport.yaml": [
        "sync_bn=false",
        "augment.local_size=16",
        "augment.local_crops=1",
        "method.prototypes=32",
        "method.warmup_teacher_epochs=0",
    ],
    "configs/dino_vit_scavport.yaml": [
        "augment.local_size=16",
        "augment.local_crops=1",
        "method.prototypes=32",
        "method.warmup_teacher_epochs=0",
    ],
}
CONFIGS = sorted((TOP / "configs").rglob("*.yaml"))
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
COMMANDS = [page for page in PAGES if page.stem not in ("python", "extending")]  # those two have tests of their own
RESULTS = sorted((TOP / "docs" / "results").glob("*.md"))
ROOMS = "benchmarks|configs|data|docs|evaluation|examples|losses|models|plots|runtime|search|tests|training"


def name_of(page: Path) -> str:
    return str(page.relative_to(TOP))


def commands(page: Path) -> list[str]:
    """In its code blocks without a language; those of others are matched too, for else their ends would begin one."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for language, block in blocks if not language for line in block.splitlines()]
    return [line for line in lines if re.match(r"(python|torchrun) ", line)]


def test_commands_are_found_around_blocks_of_other_languages(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\npython a.py\n```\n\n```yaml\nb: 1\n```\ntext\npython no.py\n```\nls\ntorchrun c.py\n```\n")
    assert commands(page) == ["python a.py", "torchrun c.py"]


def parts(line: str) -> tuple[str, list[str], int]:
    """The script of a command, its words, and how many processes the test starts it in."""
    launcher, *words = shlex.split(line)
    if launcher == "torchrun":
        return words[1], words[2:], 2
    return words[0], words[1:], 1


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("readme")
    write_classes(place / "images")
    for category in ("bottle", "tile"):
        write_mvtec(place / "mvtec", category=category, size=64)
    write_visa(place / "VisA_20220922")
    write_ad2(place / "mvtec_ad2/can", size=64)
    write_dimo(place / "dimo", scenes=8)
    for i, path in enumerate(sorted((place / "images/train").glob("*/*"))):
        (place / "classes" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / "classes" / path.parent.name / f"ship{i % 3}_{path.name}")
    shutil.copytree(place / "mvtec/bottle/train/good", place / "parts/good")
    shutil.copytree(place / "mvtec/bottle/train/good", place / "parts/bad")
    write_fiftyone(place / "detections", [(i, i % 2, [4.0, 4.0, 20.0, 20.0]) for i in range(1, 41)], 40)
    for name in ("mobilenet_v2", "resnet18"):
        torch.save(getattr(torchvision.models, name)().state_dict(), place / f"{name}.pth")
    return place


def run(line: str, place: Path, out: Path) -> None:
    """A command as it is written, at small size, with its data in `place` and what it writes in `out`."""
    for written, here in (
        ("/path/to", place),
        ("=IMAGENET1K_V1", f"={place}/resnet18.pth"),
        ("runs/", f"{out}/runs/"),
        (" out=", f" out={out}/"),
        ("submission=", f"submission={out}/"),
    ):
        line = line.replace(written, str(here))
    name, words, processes = parts(line)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            MAINS[name].main(words)
        return
    if name == "predict.py":
        words += SMALL[name]
    elif "task=landscape" in words:
        words = config.overlay(words, ["points=3", "draws=1", "device=cpu"])
    elif "task=describe" in words:
        words += ["batch_size=1", "device=cpu", f"runs={out}/runs"]
    elif not {"task=compare", "task=export"} & {*words}:
        further = [] if "epochs=0" in words else FURTHER.get(words[0], [])
        # a detector takes images as its run did
        small = ["device=cpu"] if "task=robustness checkpoint=" in line else SMALL[name]
        words = config.overlay(words, small, further, [f"runs={out}/runs"])
    if processes > 1:
        script([name, *words], processes=processes)
    else:
        MAINS[name].main(words)


def test_the_quick_commands_of_the_readme_run_at_small_size(place, tmp_path, monkeypatch):
    monkeypatch.chdir(TOP)
    quick = [line for line in commands(TOP / "README.md") if line.startswith("python ")]
    assert quick
    for line in quick:
        run(line, place, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("page", COMMANDS, ids=name_of)
def test_every_command_runs_at_small_size(page, place, tmp_path, monkeypatch):
    """In the order of the page, for a later one needs the checkpoint of an earlier one on that page."""
    monkeypatch.chdir(TOP)
    for line in commands(page):
        if parts(line)[0] != "sweep.py":  # `make demo` runs it as it stands, tests/scripts/ a small one
            run(line, place, tmp_path)


def test_docs_have_commands_of_every_script():
    scripts = [parts(line)[0] for page in COMMANDS for line in commands(page)]
    assert set(scripts) >= MAINS.keys() | {"sweep.py"}


@pytest.mark.parametrize("page", [*COMMANDS, *RESULTS], ids=name_of)
def test_every_command_is_understood(page, monkeypatch):
    """Its config can be built, at full size, and every cell's of a sweep."""
    monkeypatch.chdir(TOP)
    for line in commands(page):
        name, words, _ = parts(line)
        if "--help" in words:
            with pytest.raises(SystemExit, match="0"):
                MAINS[name].main(words)
        elif name == "-m":
            module, *words = words
            assert (TOP / f"{module.replace('.', '/')}.py").exists(), line
            assert module == "benchmarks.false_alarms" and config.load(train_anomaly.Config, words), line
        elif name == "predict.py":
            config.load(predict.Config, [f"run={words[0]}", f"images={words[1]}", *words[2:]])
        elif name == "eval.py":
            if "task=export" in words:
                config.load(export.Config, words)
                continue
            if any(word.startswith("checkpoint=") for word in words):  # data and backbone are that run's
                words = [word for word in words if not word.startswith("checkpoint=")]
                words += ["data.name=folder", "data.root=/path/to/images", "data.size=32", "backbone.name=resnet18"]
            config.load(evaluate.schema(words), words)
        elif name == "sweep.py":
            assert sweep.check(sweep.plan(sweep.load(words))[1])
        else:
            parts_are_no_longer_than_the_run(config.load(SCHEMAS[name], words))


def test_the_loop_of_the_readme_runs_and_leaves_a_backbone(place, tmp_path, monkeypatch):
    (code,) = re.findall(r"^```python\n(.*?)^```", (TOP / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    small = {"datasets/demo/scavport": f"{place}/images", "dataset, 64,": "dataset, 8,", "range(8)": "range(2)"}
    for written, here in small.items():
        assert written in code
        code = code.replace(written, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    monkeypatch.chdir(TOP)
    words = ["configs/eval_folder.yaml", "task=knn", f"data.root={place}/images", "backbone.name=resnet18"]
    evaluate.main([*words, f"backbone.weights={tmp_path}/backbone.pth", f"runs={tmp_path}", *SMALL["eval.py"]])


def test_the_readme_is_short():
    assert len((TOP / "README.md").read_bytes()) <= 8192


@pytest.mark.parametrize("page", [*PAGES, *RESULTS, TOP / "CONTRIBUTING.md"], ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            path, _, heading = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not heading or heading in headings(target), link


def headings(page: Path) -> list[str]:
    """The anchors that GitHub gives the headings of a page."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("page", [*COMMANDS, *RESULTS, TOP / "CONTRIBUTING.md"], ids=name_of)
def test_every_path_that_is_named_exists(page):
    """Those of our folders and scripts; `<method>` and `*` stand for anything."""
    for path in re.findall(rf"(?<![\w/.>])((?:{ROOMS})/[\w/.*<>-]+|\w+\.py\b)", page.read_text()):
        assert list(TOP.glob(re.sub(r"<\w+>", "*", path).rstrip("."))), path


@pytest.mark.parametrize("page", [page for page in RESULTS if page.stem not in ("README", "speed")], ids=name_of)
def test_every_table_says_where_it_comes_from(page):
    said = re.findall(r"^\| ([\w ]+) \| \S", page.read_text(), re.MULTILINE)
    assert {"command", "commit", "machine", "seeds", "chosen on"} <= set(said)
    assert f"({page.name})" in (page.parent / "README.md").read_text()


SCHEMAS = {"train_ssl.py": train_ssl.Config, "train_anomaly.py": train_anomaly.Config, "eval.py": knn.Config,
           "train_classifier.py": train_classifier.Config, "sweep.py": sweep.Config}  # fmt: skip
MAINS = {"train_ssl.py": train_ssl, "train_anomaly.py": train_anomaly, "train_classifier.py": train_classifier,
         "eval.py": evaluate, "predict.py": predict}  # fmt: skip


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_its_command_and_expectation(path):
    first, second = path.read_text().splitlines()[:2]
    name = re.search(r"\w+\.py", first)[0]
    assert f"{path.relative_to(TOP)}" in first and second.startswith("# Expected: ")
    cfg = config.load(SCHEMAS[name], [str(path)])
    assert cfg.run_name in (path.stem, yaml.safe_load(path.read_text()).get("run_name"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_of_every_config_is_understood(path, monkeypatch):
    """Its first line's keys, and of a sweep every cell's, whose backbone is the one that its pretraining leaves."""
    monkeypatch.chdir(TOP)
    name, *words = shlex.split(re.search(r"\w+\.py .*", path.read_text().splitlines()[0])[0])
    cfg, backbones = config.load(SCHEMAS[name], words), {}
    parts_are_no_longer_than_the_run(cfg)
    if name == "train_ssl.py":
        pretraining_gets_its_views(cfg)
    for cell in sweep.plan(sweep.load(words))[1] if name == "sweep.py" else ():
        script_name, *its_words = cell.words
        its = config.load(SCHEMAS[script_name], its_words)
        backbones[cell.name] = its.backbone.name
        assert cell.needs is None or backbones[cell.name] == backbones[cell.needs], cell
        parts_are_no_longer_than_the_run(its)
        if script_name == "train_ssl.py":
            pretraining_gets_its_views(its)
    if name == "sweep.py":
        assert sweep.check(sweep.plan(sweep.load(words))[1]).keys() == backbones.keys()


def parts_are_no_longer_than_the_run(cfg) -> None:
    if getattr(cfg, "optim", None) and cfg.epochs:  # epochs=0: a detector's weights are tested as they are
        assert cfg.optim.warmup_epochs <= cfg.epochs
    if isinstance(cfg, train_ssl.Config):
        assert all(cfg.method.options[key] <= cfg.epochs for key in SSL_METHODS[cfg.method.name].in_epochs)


def pretraining_gets_its_views(cfg: train_ssl.Config) -> None:
    side = cfg.data.size[0]
    augment = build_augment(cfg.augment, 0, torch.full((2, 2), side), normalization_from(cfg.backbone))
    views = augment(torch.zeros(2, 3, side, side, dtype=torch.uint8), torch.arange(2), 0)
    least, most, _ = SSL_METHODS[cfg.method.name].takes
    assert least <= len(views) + (cfg.defect is not None) <= most


def test_the_demo_sweep_names_configs_and_folders_that_exist(tmp_path):
    generate(tmp_path / "demo", scale=0.02, workers=0)
    cfg = config.load(sweep.Config, [str(TOP / "configs" / "sweeps" / "demo.yaml")])
    _, plan = sweep.plan(cfg)
    assert len(plan) == 2 + len(cfg.detectors) * len(cfg.pretraining) * len(cfg.tasks)
    for name, *words in (cell.words for cell in plan):
        full = config.load(SCHEMAS[name], words)
        root = Path(full.data.options["root"].replace("datasets/demo", str(tmp_path / "demo")))
        assert (root / full.data.options.get("category", "train")).is_dir()


def test_no_file_is_long_or_named_after_nothing():
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=TOP, capture_output=True, text=True, check=True
    ).stdout.split()
    assert files
    for file in files:
        assert len((TOP / file).read_text().splitlines()) <= 500, file
        assert Path(file).stem not in ("utils", "common", "misc", "helpers", "base", "core"), file


def test_scripts_know_no_method_by_name():
    for name in SCHEMAS:
        text = (TOP / name).read_text()
        assert not re.search(r"(method|detector|backbone)\.name ==|isinstance\((method|detector)", text), name


def test_a_script_without_arguments_says_what_is_missing():
    with pytest.raises(UserError, match=r"missing key 'data.name'"):
        train_ssl.main([])
