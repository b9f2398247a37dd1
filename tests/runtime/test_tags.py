"""What a person sees on opening TensorBoard, as read back by TensorBoard's own reader."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.mesh import metadata as mesh_metadata
from tensorboard.util import tensor_util

from models.ssl import SSL_METHODS
from runtime.config import choice
from runtime.log import Log
from runtime.tags import CHARTS, FAMILIES, TAGS, tag_of
from tests.models.anomaly import test_by_gradient as detectors
from tests.models.ssl import test_methods as methods


def read(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def metadata_of(folder) -> dict:
    """{tag: SummaryMetadata} of every value in the run's files, as TensorBoard converts them."""
    found = {}
    for path in sorted(folder.glob("events.out*")):
        for event in EventFileLoader(str(path)).Load():
            found |= {value.tag: value.metadata for value in event.summary.value if value.tag not in found}
    return found


def test_the_order_of_groups_is_what_matters_first(tmp_path):
    log = Log(tmp_path, {})
    keys = ["lr", "speed/images_per_second", "embedding/std", "stats/prototypes_used", "knn20_top1", "loss"]
    log.scalars(1, dict.fromkeys([*keys, "stats/chance_loss", "own/value"], 1.0))
    log.writer.close()
    assert sorted(read(tmp_path).Tags()["scalars"]) == [
        "1_loss/loss",
        "1_loss/loss_at_chance",
        "2_knn/knn20_top1",
        "3_health/embedding_std",
        "4_method/prototypes_used",
        "5_optimizer/lr",
        "6_speed/images_per_second",
        "9_other/own/value",
    ]
    assert list(json.loads((tmp_path / "metrics.jsonl").read_text()))[1:] == [*keys, "stats/chance_loss", "own/value"]


def test_every_tag_has_its_description(tmp_path):
    log = Log(tmp_path, {"a": 1})
    log.scalars(1, {"loss": 2.0, "own": 1.0, "stats/new": 0.0})
    log.image("heatmaps/1 of 2", torch.zeros(3, 8, 8))
    log.histogram("scores/good", torch.rand(9))
    log.precision_recall("precision_recall", torch.tensor([0, 1]), torch.tensor([0.2, 0.7]))
    log.text("per defect", "| a |")
    log.results({"x": 1.0})
    found = {tag: about for tag, about in metadata_of(tmp_path).items() if "hparams" not in tag and "custom" not in tag}
    assert {tag: about.summary_description for tag, about in found.items()} == {
        "config/text_summary": TAGS["config"][1],
        "1_loss/loss": TAGS["loss"][1],
        "9_other/own": FAMILIES[""][1],
        "4_method/new": FAMILIES["stats/"][1],
        "2_test/heatmaps 1 of 2": TAGS["heatmaps"][1],
        "8_scores/good": FAMILIES["scores/"][1],
        "2_test/precision_recall": TAGS["precision_recall"][1],
        "per defect/text_summary": TAGS["per defect"][1],
    }
    kinds = {tag: about.plugin_data.plugin_name for tag, about in found.items()}
    assert kinds["1_loss/loss"] == "scalars" and kinds["2_test/heatmaps 1 of 2"] == "images"
    assert kinds["8_scores/good"] == "histograms" and kinds["2_test/precision_recall"] == "pr_curves"


def test_a_surface_is_three_tensors_of_one_name(tmp_path):
    log = Log(tmp_path, {})
    corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    log.mesh("landscape/surface/run", corners, torch.full((3, 3), 7, dtype=torch.uint8), torch.tensor([[0, 1, 2]]))
    log.writer.close()
    found = {tag: about for tag, about in metadata_of(tmp_path).items() if about.plugin_data.plugin_name == "mesh"}
    names = {mesh_metadata.parse_plugin_metadata(about.plugin_data.content).name for about in found.values()}
    assert len(found) == 3 and names == {"2_landscape/run"}
    assert {about.summary_description for about in found.values()} == {FAMILIES["landscape/surface/"][1]}
    assert mesh_values(tmp_path) == [corners.tolist(), [[0, 1, 2]], [[7, 7, 7]] * 3]


def mesh_values(folder) -> list:
    """In the order of TensorBoard's kinds: vertices, triangles, colors."""
    kinds = {}
    for path in folder.glob("events.out*"):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "mesh":
                    kind = mesh_metadata.parse_plugin_metadata(value.metadata.plugin_data.content).content_type
                    kinds[kind] = tensor_util.make_ndarray(value.tensor)[0].tolist()
    return [kinds[kind] for kind in sorted(kinds, key=[1, 2, 3].index)]


def test_loss_and_chance_loss_share_a_chart(tmp_path):
    log = Log(tmp_path, {})
    log.scalars(1, {"loss": 2.0, "stats/chance_loss": 3.0})
    log.scalars(2, {"loss": 2.0, "stats/chance_loss": 3.0})
    log.writer.close()
    (event,) = read(tmp_path).Tensors("custom_scalars__config__")
    first = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0]).category[0]
    assert list(first.chart[0].multiline.tag) == ["^1_loss/loss$", "^1_loss/loss_at_chance$"]
    assert all(key in TAGS for charts in CHARTS.values() for keys in charts.values() for key in keys)


@dataclass(kw_only=True)
class Inner:
    start: float = 0.9
    end: float = 1.0


def build_thing(*, depth: int, scale: tuple[float, ...] = (0.1, 1.0), norm: bool = True) -> None:
    """A stand-in for what a name chooses."""


@dataclass(kw_only=True)
class Thing:
    name: str = choice({"thing": build_thing})
    extra: str | None = None
    options: dict = field(default_factory=dict)


@dataclass(kw_only=True)
class Schema:
    thing: Thing
    inner: Inner = field(default_factory=Inner)
    other: Inner | None = None
    another: Inner | None = None
    epochs: int
    batch_size: int = 16
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    device: str | None = "auto"
    run_name: str = "r"


def session(folder) -> dict:
    content = metadata_of(folder)[metadata.SESSION_START_INFO_TAG].plugin_data.content
    values = metadata.parse_session_start_info_plugin_data(content).hparams
    return {key: getattr(value, value.WhichOneof("kind")) for key, value in values.items()}


def test_hparams_are_what_differs_from_the_defaults_and_the_results(tmp_path):
    thing = Thing(name="thing", options={"depth": 3, "scale": (0.1, 1.0), "norm": False})
    cfg = Schema(thing=thing, inner=Inner(end=0.5), other=Inner(), epochs=1, sizes=[2], device=None, run_name="mine")
    log = Log(tmp_path, cfg)
    assert log.config["thing"]["scale"] == [0.1, 1.0] and log.config["batch_size"] == 16  # all of it, as ever
    log.scalars(1, {"loss": 1.0})
    log.results({"image_auroc": 0.5, "seconds": 2.0, "name": "x", "per_defect": {"a": 1}, "none": None})
    assert session(tmp_path) == {
        "thing.name": "thing",
        "thing.depth": 3,
        "thing.norm": "False",
        "inner.end": 0.5,
        "other": "True",
        "epochs": 1,
        "sizes": "[2]",
        "device": "None",
        "1_final/image_auroc": 0.5,
        "final/seconds": 2.0,
    }
    assert read(tmp_path).Tags()["scalars"] == ["1_loss/loss"]  # no card of one dot
    assert metadata.EXPERIMENT_TAG not in metadata_of(tmp_path)  # it would hide what only other runs have
    assert metadata.SESSION_END_INFO_TAG in metadata_of(tmp_path)


def described(stats: dict) -> bool:
    generic = {FAMILIES["stats/"][1], FAMILIES[""][1]}
    return all(tag_of(f"stats/{name}")[1] not in generic for name in stats if name != "embeddings")


@pytest.mark.parametrize("name", SSL_METHODS)
def test_what_pretraining_methods_report_is_described(name):
    _, stats = methods.build(name)(methods.views(name), methods.LABELS)
    assert described(stats), sorted(stats)


@pytest.mark.parametrize("name", detectors.NAMES)
def test_what_detectors_report_is_described(name):
    detector = detectors.build(name).train()
    _, stats = detector(*next(iter(detectors.steps(name, detector))))
    assert described(stats), sorted(stats)
