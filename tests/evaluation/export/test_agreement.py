"""What counts as agreement: scores, maps and decisions of every image, at every batch size. The networks are faked."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torchvision.io import write_png

from data.geometry import Geometry
from evaluation.anomaly.prediction import LoadedImage
from evaluation.export.agreement import TOLERANCE, Answer, compare, difference, images_of
from runtime.errors import UserError

IMAGES = [LoadedImage(f"{i}.png", (4, 4), Geometry(4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8)) for i in range(5)]
SIZES = [1, 2, 4]


def ask(network, images, state, batch_size):
    """Score i + 1 and a map of it, as `network` changes them."""
    answers = []
    for item in images:
        i = int(item.path[0])
        score, heat = torch.tensor([i + 1.0]), torch.full((2, 2), i + 1.0)
        score, heat = network(i, score, heat, batch_size)
        verdict = "anomalous" if float(score) > state["threshold"] else "normal"
        answers.append(Answer(item.path, {"score": score, "map": heat}, verdict, (i,)))
    return answers


def same(i, score, heat, batch_size):  # noqa: ARG001
    return score, heat


def compared(network, threshold=3.5):
    subject = SimpleNamespace(live=same, state={"threshold": 3.5}, ask=ask)
    program = SimpleNamespace(state={"threshold": threshold})
    subject.ask = lambda asked, *rest: ask(network if asked is program else asked, *rest)
    return compare(subject, program, IMAGES, SIZES)


def test_equal_answers_agree():
    found = compared(same)
    assert found.largest == {"score": 0, "map": 0} and (found.decisions, found.moved) == (15, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("value", "at"), [("score", (0,)), ("map", (1, 0))])
def test_one_number_of_one_image_at_one_batch_size_is_found(value, at, size):
    def network(i, score, heat, batch_size):
        for name, part in (("score", score), ("map", heat)):
            if (i, batch_size, name) == (3, size, value):
                part[at] *= 1 + 3 * TOLERANCE
        return score, heat

    message = rf"program's {value} of 3.png at batch size {size} differs from the run's by 3.0e-04 of its size"
    with pytest.raises(UserError, match=message):
        compared(network)


def test_rounding_passes_and_is_reported():
    def network(i, score, heat, batch_size):  # noqa: ARG001
        return score * (1 + 5e-5), heat

    found = compared(network)
    assert found.largest["score"] == pytest.approx(5e-5, rel=1e-2) and found.largest["map"] == 0


def test_small_scores_are_measured_by_the_usual_ones():
    """Of a copy of a training image the score is 0 but for rounding."""

    def network(i, score, heat, batch_size):  # noqa: ARG001
        return score + (2e-4 if i == 0 else 0), heat  # of 1, beside a mean of 3

    assert compared(network).largest["score"] == pytest.approx(2e-4 / 3, rel=1e-2)


def test_zeros_agree_with_zeros_alone():
    assert compared(lambda i, score, heat, batch_size: (score, heat)).largest["map"] == 0  # noqa: ARG005
    zero = torch.zeros(4, 4)
    assert difference(zero, zero, torch.tensor(0.0)) == 0 and not difference(zero, zero + 1, torch.tensor(0.0)) <= 1e9


def test_another_threshold_is_another_decision():
    with pytest.raises(UserError, match=r"decision of 3.png at batch size 4 is normal, the run's anomalous"):
        compared(same, threshold=4.5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_does_not_agree(wrong):
    with pytest.raises(UserError, match=r"score of 0.png"):
        compared(lambda i, score, heat, batch_size: (score * wrong, heat))  # noqa: ARG005


def test_maps_of_another_size_do_not_agree():
    with pytest.raises(UserError, match=r"map of 0.png"):
        compared(lambda i, score, heat, batch_size: (score, heat[:1]))  # noqa: ARG005


def test_images_are_spread_over_a_folder(tmp_path: Path):
    for i in range(9):
        write_png(torch.full((3, 6, 6), i, dtype=torch.uint8), str(tmp_path / f"{i}.png"))
    subject = SimpleNamespace(geometry=Geometry(4, 4), state={})
    subject.size = subject.geometry
    found = images_of(subject, str(tmp_path), 3)
    assert [Path(item.path).name for item in found] == ["0.png", "4.png", "8.png"]
    assert [int(item.image.max()) for item in found] == [0, 4, 8] and found[0].image.shape == (3, 4, 4)
    (only,) = images_of(subject, str(tmp_path / "7.png"), 3)
    assert only.size == (6, 6)
    subject.size = subject.geometry.whole((2, 2))  # tiles, of whole images
    assert images_of(subject, str(tmp_path), 1)[0].image.shape == (3, 6, 6)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="there are no images in"):
        images_of(subject, str(tmp_path / "none"), 3)
    (tmp_path / "7.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"7.png"):
        images_of(subject, str(tmp_path / "7.png"), 3)
