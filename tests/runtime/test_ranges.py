"""Ranges of values: what each key refuses and still takes, written down by hand; and that no number lacks a range."""

import dataclasses
import inspect
import math
import typing

import pytest
import yaml

import predict
import train_anomaly
import train_classifier
import train_ssl
from data.augment.mixing import MixConfig
from evaluation.frozen import TaskConfig
from evaluation.tasks import TASKS, module_of
from runtime import config, help
from runtime.errors import UserError
from runtime.schema import hints_of, option_types, section_of
from runtime.values import Few, NonNegativeFloat, PositiveFloat, Range, coerce, rules_of
from tests.attacks.configs import FILES, schema_of
from tests.runtime.test_help import TABLES
from training.optim import OptimConfig
from training.plateau import EarlyStoppingConfig, PlateauConfig
from training.unfreezing import UnfreezeConfig

REFUSED = {  # (section, name): {key: (refused values), (taken values)}
    ("optim", "sgd"): {
        "lr": ("-1 0 -0.0 1e11", "1e-9 2"),
        "backbone_lr": ("-1 0 1e11", "1e-9 none"),
        "momentum": ("-0.1 1.1", "0 1"),
        "weight_decay": ("-1e-9", "0 0.1"),
        "final_weight_decay": ("-1", "0 none"),
        "final_lr": ("-1", "0"),
        "warmup_epochs": ("-1", "0 2.5"),
        "clip": ("0 -1", "1e-3 none"),
        "decay": ("0 1.1", "1"),
        "layer_decay": ("0 -1 1.5", "1 0.5"),
        "bias_lr_scale": ("-1", "0 3"),
        "predictor_lr_scale": ("0 -1", "10"),
        "steps": ("60,80 0 0.5,1", "0.6,0.8"),
    },
    ("optim", "adamw"): {"betas": ("0.9,1 -0.1,0.9", "0,0.999")},
    ("optim", "lars"): {"eta": ("0 -1", "0.02"), "momentum": ("2", "0.9")},
    ("method", "simclr"): {
        "temperature": ("0 -1", "0.1"),
        "gamma": ("-1", "0"),
        "bank": ("-1", "0 5"),
        "hidden": ("-1 9999999999", "0"),
        "out": ("0", "1"),
    },
    ("method", "dino"): {
        "prototypes": ("0 1e18", "1"),
        "layers": ("0 101", "1"),
        "teacher_temperature": ("0", "0.04"),
        "student_temperature": ("-0.1", "0.1"),
        "center_momentum": ("-0.1 1.1", "0 1"),
        "warmup_teacher_epochs": ("-1", "0"),
        "freeze_last_layer": ("-1", "0"),
    },
    ("method", "moco_v2"): {"queue": ("0", "4096"), "splits": ("0", "1")},
    ("method", "psco"): {"shots": ("0", "1"), "iterations": ("0 1000", "3"), "task_temperature": ("0", "1")},
    ("method", "vicreg"): {"variance": ("-1", "0"), "invariance": ("-1", "25"), "covariance": ("-1", "1")},
    ("method", "barlow_twins"): {"weight": ("-1", "0.005")},
    ("method", "triplet"): {"margin": ("-1", "0")},
    ("backbone", "resnet18"): {
        "drop_path": ("1 -0.1", "0 0.99"),
        "num_classes": ("-1", "0"),
        "in_channels": ("0", "1"),
    },
    ("backbone", "mobilenet_v2"): {"width": ("0 -1 1000", "0.25")},
    ("backbone", "mobilenet_v3_small"): {"width": ("0", "0.25"), "bn_eps": ("-1", "1e-5")},
    ("backbone", "efficientnet_b0"): {"bn_eps": ("-1", "1e-3"), "drop_path": ("1", "0.2")},
    ("backbone", "efficientnet_lite0"): {"bn_eps": ("-1", "1e-5"), "drop_path": ("1", "0.2")},
    ("backbone", "convnext_atto"): {"patch": ("0 -1 1e9", "4"), "drop_path": ("1", "0")},
    ("backbone", "vit_tiny"): {"patch": ("0", "16"), "size": ("0", "224"), "registers": ("-1", "0")},
    ("detector", "patchcore"): {
        "coreset": ("0 1.5 -1", "1 0.01"),
        "neighborhood": ("0 -1", "3"),
        "embed_dim": ("0", "8 none"),
        "projection": ("-1", "0 none"),
        "neighbors": ("0", "1 none"),
        "stages": ("0 5 2,9", "2,3"),
        "memory_limit": ("-1", "0.5 none"),
        "seed": ("-1", "0"),
    },
    ("detector", "padim"): {"channels": ("0", "1 none"), "regularization": ("0 -1", "0.01"), "seed": ("-1", "1024")},
    ("detector", "subspace"): {"variance": ("0 1.1", "0.5 1"), "rotations": ("0 101", "1 100")},
    ("detector", "regad"): {"supports": ("0", "2"), "regularization": ("0", "0.01")},
    ("detector", "embedding"): {"k": ("0", "1")},
    ("detector", "cdo"): {"gamma": ("-1 5.1", "0 5")},
    ("detector", "cutpaste"): {"head_layers": ("-1", "0")},
    ("detector", "cflow"): {"blocks": ("0", "1"), "fiber": ("0", "1"), "rotation": ("-1 181", "0 180")},
    ("detector", "nsa"): {
        "patches": ("0", "1"),
        "bounds": ("0.1,0.5 0,0.1 0.3,0.2", "0.1,0.1"),
        "widths": ("0.4,0.3", "0.1,0.3 none"),
        "resize": ("2,1 0,1", "0.7,1.3"),
        "background": ("20,-1 256,0", "20,0 none"),
        "min_object": ("1", "0"),
        "shift": ("-1", "0"),
        "turn": ("-1", "5"),
        "steepness": ("0", "0.3"),
    },
    ("defect", "cutpaste"): {
        "area": ("0.2,0.1 0.2,1.1 0,0.1", "0.02,0.15"),
        "aspect": ("0,1 2,1", "0.3,3.3"),
        "jitter": ("-0.1 0.6", "0 0.5"),
    },
    ("defect", "smooth_blend"): {"softness": ("0", "0.125")},
    ("defect", "scar"): {"rotation": ("100 -1", "0 90"), "width": ("0,3 3,2", "2,16"), "length": ("0,3", "10,10")},
    ("defect", "nsa"): {"offset": ("-1", "0"), "shape": ("0", "2"), "scale": ("0 -1", "0.05"), "patches": ("0", "3")},
    ("defect", "noise"): {"most": ("0 1000", "4"), "enlarged": ("0", "1")},
    ("augment", "simclr"): {
        "size": ("0 -1 1e9", "32"),
        "scale": ("0,1 0.5,0.2 0.5,1.5", "0.08,1"),
        "strength": ("-1 3", "0 0.5"),
        "blur_p": ("-0.1 1.1", "0 1"),
        "flip_p": ("2", "0.5"),
        "views": ("0 1000", "2"),
    },
    ("augment", "byol"): {"blur_p": ("1,1.1", "1,0.1"), "solarize_p": ("-1,0", "0,0.2")},
    ("augment", "dino"): {
        "local_crops": ("-1 1000", "0"),
        "strips": ("-1", "0"),
        "strip_size": ("0,64", "224,64"),
        "local_size": ("0", "96"),
        "global_scale": ("0.5,0.1", "0.4,1"),
        "strip_width": ("0.1,2", "0.1,0.4"),
    },
    ("augment", "patches"): {
        "size": ("10 -1", "11"),
        "gap": ("-1", "0 none"),
        "jitter": ("-1", "0"),
        "downsample_p": ("1.1", "1"),
    },
    ("data", "folder"): {
        "size": ("0 -1 1e9 32,0", "32 32,48 native"),
        "resize": ("0", "256 none"),
        "white": ("", "1023 -40.5 auto"),
        "percentiles": ("-1,50 0,101 99,1", "0,100 2,98"),
        "units": ("5,5 6,5", "-80,2000"),
        "workers": ("-1 100000", "0"),
        "test_fraction": ("1 -0.1", "0 none"),
    },
    ("data", "few_shot"): {"shots": ("0", "1"), "draw": ("-1", "0")},
    ("data", "dimo"): {
        "min_crop_size": ("0 -1", "8 none"),
        "test_fraction": ("1 -0.1", "0 none"),
        "split_seed": ("-1", "0"),
    },
    ("data", "dimo_one_vs_all"): {"normal": ("0", "1"), "min_crop_size": ("0", "1")},
    ("data", "detections"): {
        "context": ("0.9 101", "1 1.5"),
        "min_crop_size": ("0 -1", "1"),
        "validation_fraction": ("1 -0.1", "0 none"),
    },
    ("data", "kolektor_sdd"): {"test_fraction": ("1 -0.1", "0 none")},
    ("data", "magnetic_tile"): {"test_fraction": ("1 -0.1", "0 none")},
    ("data", "mixed"): {"min_per_class": ("0", "1")},
    ("data", "cifar10"): {"per_class": ("0", "1 none")},
    ("augment", "crop"): {"size": ("0", "32"), "scale": ("0,1", "0.5,1"), "jitter": ("-0.1 1.1", "0 1")},
    ("augment", "randaugment"): {"operations": ("-1 101", "0 3"), "cutout": ("-0.1 1.1", "0 0.5")},
    ("head", "linear"): {"dropout": ("1 -0.1", "0")},
    ("head", "mlp"): {"hidden": ("-1", "0"), "dropout": ("1", "0.5")},
    ("loss", "focal"): {"gamma": ("-1", "0 2")},
    ("semi", "fixmatch"): {
        "threshold": ("-0.1 1.1", "0 1"),
        "ratio": ("0 101", "7"),
        "weight": ("-1", "0 2"),
        "warmup_epochs": ("-1", "0"),
        "operations": ("-1 101", "0"),
        "cutout": ("-0.1 1.1", "0"),
    },
    ("semi", "flexmatch"): {"threshold": ("-0.1 1.1", "0 1")},
    ("semi", "freematch"): {"momentum": ("1 -0.1", "0"), "fairness": ("-1", "0"), "most": ("1.1", "0.95 1")},
    ("semi", "dash"): {
        "gamma": ("0.9", "1 1.27"),
        "c": ("0.9", "1"),
        "least": ("0", "0.05"),
        "every": ("0", "1"),
        "temperature": ("0", "0.5"),
    },
    ("semi", "self_training"): {"threshold": ("1.1", "1"), "round_epochs": ("0", "1")},
    ("task", "knn"): {"k": ("0 -1", "1"), "temperature": ("0 -1", "0.07")},
    ("task", "linear"): {"epochs": ("0", "1"), "batch_size": ("0", "1"), "seed": ("-1", "0")},
}
SCRIPTS = {  # those of a script's own
    train_ssl.Config: {
        "epochs": ("0 -1", "1"),
        "batch_size": ("0", "1"),
        "accumulate": ("0", "1"),
        "holdout": ("1 -0.1", "0 0.99"),
        "eval_every": ("0", "1"),
        "log_every": ("0", "1"),
        "overfit": ("-1", "0"),
        "seed": ("-1 4294967296", "0"),
    },
    train_ssl.EMAConfig: {"start": ("-0.1 1.1", "0 1"), "end": ("2", "1")},
    train_ssl.SaveConfig: {"every": ("0", "1"), "keep_last": ("-1", "0")},
    train_anomaly.Config: {
        "epochs": ("-1", "0"),
        "batch_size": ("0", "1"),
        "holdout": ("1 -0.1", "0 none"),
        "false_alarm_rate": ("0 1 -1 2 1e-300", "0.01 1e-6"),
        "log_every": ("0", "1"),
        "save_every": ("0", "1"),
        "seed": ("-1", "0"),
    },
    train_classifier.Config: {
        "epochs": ("0 -1", "1"),
        "batch_size": ("0", "1"),
        "label_smoothing": ("1 -0.1", "0 0.1"),
        "ema": ("1 -0.1", "0 0.999"),
        "labels_per_class": ("0", "4 none"),
        "holdout": ("1 -0.1", "0 none"),
        "log_every": ("0", "1"),
        "save_every": ("0", "1"),
        "seed": ("-1", "0"),
    },
    UnfreezeConfig: {"head_epochs": ("-1", "0"), "layer_epochs": ("-1", "0"), "layers": ("-1", "0 none")},
    PlateauConfig: {"factor": ("0 1", "0.15"), "patience": ("-1", "0"), "threshold": ("-1", "0")},
    EarlyStoppingConfig: {"patience": ("0", "1"), "min_delta": ("-1", "0")},
    MixConfig: {"mixup": ("-1 101", "0"), "cutmix": ("-1", "0"), "p": ("1.1", "0 1")},
    predict.Config: {
        "tile": ("-1", "0"),
        "overlap": ("-1", "0"),
        "batch_size": ("0", "1"),
        "threshold": ("", "-3 none"),
    },
    module_of("defects").Config: {"images": ("0 1000", "6"), "seed": ("-1", "0")},
    module_of("describe").Config: {"size": ("0", "224"), "batch_size": ("0", "16")},
}
TRAINING = [train_ssl.Config, train_anomaly.Config, train_classifier.Config]
CONFIGS = {name: kind for schema in TRAINING for name, kind in hints_of(schema).items()}
CONFIGS["task"] = TaskConfig
ROWS = [
    (section, name, key, refused, taken)
    for (section, name), keys in REFUSED.items()
    for key, (refused, taken) in keys.items()
]
NEEDED = {"root": "x", "size": "8", "category": "x", "shots": "1", "normal": "x", "lr": "1"}


def kind_of(section: str, name: str, key: str):
    options = option_types(TABLES[section][name])
    return options[key][0] if key in options else hints_of(section_of(CONFIGS[section]) or CONFIGS[section])[key]


def assert_range(key: str, kind, refused: str, taken: str) -> None:
    for value in [*refused.split(), "nan", "inf", "-inf", "1e400", "9" * 400]:
        with pytest.raises(UserError) as error:
            coerce(value, kind, key)
        why = str(error.value)
        assert why.startswith(key) and len(why) < 300, why
        if value in refused.split():
            assert any(f"={part} must be " in why for part in (value, *value.split(","))), (value, why)
    for value in taken.split():
        found = coerce(value, kind, key)
        assert ((found is None) == (value == "none") and not isinstance(found, str)) or value in ("native", "auto")


@pytest.mark.parametrize(("section", "name", "key", "refused", "taken"), ROWS, ids=lambda x: x[:12])
def test_an_option_has_its_range(section, name, key, refused, taken):
    assert_range(f"{section}.{key}", kind_of(section, name, key), refused, taken)


@pytest.mark.parametrize("schema", SCRIPTS, ids=lambda schema: f"{schema.__module__}.{schema.__name__}")
def test_a_key_of_a_script_has_its_range(schema):
    for key, (refused, taken) in SCRIPTS[schema].items():
        assert_range(key, hints_of(schema)[key], refused, taken)


def numbers_in(kind) -> bool:
    """Whether a type is, or holds, a number without a range."""
    if typing.get_origin(kind) is typing.Annotated:
        return (
            False if any(isinstance(rule, Range) for rule in typing.get_args(kind)[1:]) else numbers_in(kind.__origin__)
        )
    return kind in (int, float) or any(numbers_in(arg) for arg in typing.get_args(kind))


def owner(schema, key: str) -> str:
    """The class that declares a key, which another may inherit."""
    return next(kind.__name__ for kind in schema.__mro__ if key in inspect.get_annotations(kind))


def test_no_number_of_ours_lacks_a_range():
    """But for what a pixel or a score may be: any finite number."""
    bare = [
        f"{section}={name} {key}"
        for section, table in TABLES.items()
        for name in table
        for key, (kind, _) in option_types(table[name]).items()
        if numbers_in(kind)
    ]
    schemas = [*TRAINING, predict.Config, *(module_of(task).Config for task in TASKS)]
    sections = [section for schema in schemas for section in map(section_of, hints_of(schema).values()) if section]
    for schema in [*schemas, *sections]:
        bare += [f"{owner(schema, key)}.{key}" for key, kind in hints_of(schema).items() if numbers_in(kind)]
    assert {*bare} == {"DataConfig.white", "DataConfig.black", "DataConfig.units", "Config.threshold"}


def test_every_default_is_inside_its_range():
    for section, table in TABLES.items():
        for name in table:
            for key, (kind, default) in option_types(table[name]).items():
                if default is not inspect.Parameter.empty:
                    assert coerce(config.as_dict(default), kind, key) == default, f"{section}={name} {key}"
    for schema in [*SCRIPTS, OptimConfig]:
        for field in dataclasses.fields(schema):
            kind = hints_of(schema)[field.name]
            if field.default is not dataclasses.MISSING and not section_of(kind) and field.name != "name":
                assert coerce(config.as_dict(field.default), kind, field.name) == field.default


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_shipped_file_is_inside_its_ranges(path):
    raw = yaml.load(path.read_text(), yaml.BaseLoader)
    config.load(schema_of(raw), [str(path)])


def test_a_range_says_what_a_number_must_be():
    assert str(Range(least=1)) == "at least 1" and str(Range(above=0, most=1)) == "above 0 and at most 1"
    assert str(Range(least=0, below=2**32)) == "at least 0 and below 4294967296"
    assert 0 not in Range(above=0) and 1 not in Range(below=1) and 0 in Range(least=0) and 1 in Range(most=1)
    assert math.nan not in Range() and math.inf not in Range(least=0) and 5 in Range()


def test_a_message_has_the_key_the_value_and_the_range():
    for value, kind, text in [
        ("-1", PositiveFloat, "optim.lr=-1 must be above 0"),
        (-1, PositiveFloat, "optim.lr=-1 must be above 0"),
        ("-5", Few | typing.Literal["auto"], "optim.lr=-5 must be at least 1 and at most 100"),
        ("0.5,-2", tuple[NonNegativeFloat, NonNegativeFloat] | None, "optim.lr[1]=-2 must be at least 0"),
        ("nothing", Few | typing.Literal["auto"], "optim.lr='nothing' is not a valid whole number or auto"),
    ]:
        with pytest.raises(UserError) as error:
            coerce(value, kind, "optim.lr")
        assert str(error.value) == text


def test_a_users_own_plain_numbers_take_what_is_finite():
    assert coerce("-1", int, "k") == -1 and coerce("-1e30", float, "k") == -1e30 and rules_of(float | None) == []


def test_help_shows_the_range():
    rows = {
        row.split()[0]: row for row in help.keys(train_ssl.Config, {"method": "simclr"}).splitlines() if row.strip()
    }
    assert rows["epochs"].endswith("; at least 1") and "; above 0" in help.keys(train_ssl.Config, {"method": "simclr"})
    assert rows["accumulate"].split()[1] == "integer" and rows["ema.end"].endswith("; at least 0 and at most 1")
