"""Directions against plain loops in float64; the grid's positions; the walk over it in one process, after a kill, and
in two processes whose losses gather."""

import math

import pytest
import torch
from torch import nn

from evaluation.inspect import landscape
from evaluation.inspect.landscape import COLUMNS
from losses.nt_xent import nt_xent
from models.heads import WeightNormLinear
from tests.networks import FourStages
from tests.processes import run_processes


def network(seed: int = 0) -> nn.Sequential:
    """With a convolution, batch norms that have seen something, biases, lengths of two axes, and a frozen layer."""
    torch.manual_seed(seed)
    layers = [FourStages(), nn.Linear(64, 6), WeightNormLinear(6, 3), nn.Linear(3, 2)]
    layers[-1].requires_grad_(False)
    made = nn.Sequential(*layers)
    made(torch.randn(8, 3, 32, 32))
    return made.to(memory_format=torch.channels_last).eval()


def rows(points: int) -> torch.Tensor:
    return torch.full((points, COLUMNS), torch.nan, dtype=torch.float64)


def test_each_filter_of_a_direction_is_as_long_as_the_networks():
    made = network()
    weights = landscape.learned(made)
    direction = landscape.random_direction(weights, 3)
    moving = {name for name, weight in weights.items() if weight.dim() > 1 and not name.endswith("weight_g")}
    assert direction.keys() == moving and "3.weight" not in weights and "1.bias" in weights
    assert len(moving) == 4 + 1 + 1
    total = 0.0
    for name in moving:
        for drawn, weight in zip(direction[name], weights[name]):
            length = math.sqrt(sum(float(value) ** 2 for value in weight.flatten()))
            assert math.sqrt(sum(float(value) ** 2 for value in drawn.flatten())) == pytest.approx(length, rel=1e-6)
            total += length**2
    assert landscape.filter_norm(weights) == pytest.approx(math.sqrt(total), rel=1e-6)


def test_directions_are_drawn_by_seed_and_for_networks_of_one_shape_alike():
    one, other = (landscape.learned(network(seed)) for seed in (0, 1))
    first, again, second = (landscape.random_direction(one, seed) for seed in (3, 3, 4))
    theirs = landscape.random_direction(other, 3)
    for name, drawn in first.items():
        assert torch.equal(drawn, again[name]) and not torch.equal(drawn, second[name])
        units = [part.flatten(1) / part.flatten(1).norm(dim=1, keepdim=True) for part in (drawn, theirs[name])]
        torch.testing.assert_close(*units)
        assert not torch.allclose(drawn, theirs[name])


def test_a_filter_of_zeros_does_not_move():
    weights = {"w": torch.zeros(3, 4), "one": torch.ones(1, 4), "number": torch.ones(())}
    direction = landscape.random_direction(weights, 0)
    assert direction.keys() == {"w", "one"} and not direction["w"].any()
    assert float(direction["one"].norm()) == pytest.approx(2)


def test_the_center_is_the_network_bit_for_bit_and_so_is_what_is_restored():
    made = network()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    directions = [landscape.random_direction(landscape.learned(made), seed) for seed in (0, 1)]
    with pytest.raises(ZeroDivisionError), landscape.restored(made) as start:
        landscape.move(made, start, directions, [0.3, -0.7])
        for name, tensor in made.state_dict().items():
            expected = before[name].double()
            for x, direction in zip((0.3, -0.7), directions):
                expected = expected + x * direction.get(name, torch.zeros(())).double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)
            assert (name in directions[0]) != torch.equal(tensor, before[name])
        landscape.move(made, start, directions, [0.0, 0.0])
        assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())
        landscape.move(made, start, directions, [1.0, 1.0])
        made[0].layer1[1].num_batches_tracked += 5
        raise ZeroDivisionError
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.state_dict().items())


def test_other_networks_are_where_the_marks_say():
    own, first, second = (network(seed) for seed in range(3))
    states = [made.state_dict() for made in (own, first, second)]
    ways = [landscape.between(states[0], state) for state in states[1:]]
    assert "0.layer1.1.running_var" in ways[0] and "0.layer1.1.num_batches_tracked" not in ways[0]
    weights = landscape.learned(own)
    up, x = landscape.plane(*ways, weights)
    assert sum(float((ways[0][name] * up[name]).sum()) for name in weights) == pytest.approx(0, abs=1e-3)
    for position, state in (((1.0, 0.0), states[1]), ((x, 1.0), states[2])):
        with landscape.restored(own) as start:
            landscape.move(own, start, [ways[0], up], list(position))
            for name, tensor in own.state_dict().items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)
    with landscape.restored(own) as start:
        landscape.move(own, start, ways[:1], [-1000.0])
        assert min(float(t.min()) for name, t in own.state_dict().items() if name.endswith("running_var")) == 0


@pytest.mark.parametrize("points", [3, 5, 15, 51, 101, 999])
def test_axes_hold_the_networks_exactly(points):
    for extent in (0.1, 0.3, 1.0, 7.0):
        axis = landscape.symmetric_axis(points, extent)
        assert float(axis[points // 2]) == 0 and float(axis[0]) == -extent and float(axis[-1]) == extent
        torch.testing.assert_close(axis, torch.linspace(-extent, extent, points, dtype=torch.float64))
    for extent in (0.5, 0.7, 1.0, 2.0):
        axis = landscape.axis_between(points, extent)
        assert len(axis) == points and {0.0, 1.0} <= {*axis.tolist()}
        assert (axis.diff() > 0).all() and axis.diff().std() < 1e-12
        step = float(axis[1] - axis[0])
        assert abs(float(axis[0] + axis[-1]) - 1) <= step + 1e-12  # symmetric about the middle, up to a step
    with pytest.raises(ValueError, match="do not hold"):
        landscape.axis_between(points, 0.2)


def test_the_first_axis_is_the_fast_one():
    x, y = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 6.0])
    assert landscape.grid_of(x, y).tolist() == [[0, 5], [1, 5], [2, 5], [0, 6], [1, 6], [2, 6]]
    assert landscape.grid_of(x).tolist() == [[0], [1], [2]]


class Killed(Exception):
    pass


def test_a_killed_walk_resumes_to_the_same_rows_and_measures_nothing_twice():
    place, met, saved = {}, [], []

    def go(point):
        met.append(point)
        place["at"] = point

    def value():
        return place["at"] ** 0.5, float("nan")

    whole = rows(30)
    landscape.walk(whole, go, value, lambda: saved.append(int((~whole[:, -1].isnan()).sum())), torch.device("cpu"), "")
    assert met == [*range(30)] and saved[0] == 1 and saved[-1] == 30  # the first is saved at once
    assert whole[:, 0].tolist() == [point**0.5 for point in range(30)] and whole[:, 1].isnan().all()
    assert (whole[:, 2] >= 0).all()

    killed, met[:] = rows(30), []

    def stop_at_seven(point):
        if point == 7:
            raise Killed
        go(point)

    kept = killed.clone()
    killed[[3, 4]] = whole[[3, 4]]
    with pytest.raises(Killed):
        landscape.walk(killed, stop_at_seven, value, lambda: kept.copy_(killed), torch.device("cpu"), "")
    assert met == [0, 1, 2, 5, 6] and int(kept[:, -1].isnan().sum()) == 27
    landscape.walk(kept, go, value, lambda: None, torch.device("cpu"), "")
    assert torch.equal(kept[:, 0], whole[:, 0]) and met[5:] == [*range(1, 3), *range(5, 30)]


def test_points_between_two_savings_follow_the_time_they_take(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(landscape.time, "perf_counter", lambda: clock["now"])

    def value():
        clock["now"] += 0.3
        return 0.0, 0.0

    found, saved = rows(20), []
    landscape.walk(found, lambda _: None, value, lambda: saved.append(clock["now"]), torch.device("cpu"), "")
    assert saved == pytest.approx([0.3, 2.1, 3.9, 5.7, 6.0])


def contrastive_walk(_rank: int, _world: int, points: int) -> torch.Tensor:
    """Losses that gather over processes, of embeddings that every point has its own."""
    where, found, counts = {}, rows(points), []

    def place(point):
        where["z"] = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(point))

    def value():
        return float(nt_xent(where["z"], 0.5)), float(where["z"].sum())

    landscape.walk(found, place, value, lambda: counts.append(1), torch.device("cpu"), "")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("points", [1, 7])
def test_two_processes_have_the_rows_of_one(points):
    expected = contrastive_walk(0, 1, points)
    for found in run_processes(contrastive_walk, 2, points):
        assert torch.equal(found[:, :2], expected[:, :2]) and not found.isnan().any()


def test_sharpness_is_the_mean_rise_over_directions():
    around = torch.tensor([[1.0, 3.0, 2.0, 2.0, 5.0, 1.0]]).T.double().expand(-1, COLUMNS)
    found = landscape.sharpness(0.5, around)
    rises = [1.5, 1.5, 2.5]
    deviation = math.sqrt(sum((rise - sum(rises) / 3) ** 2 for rise in rises) / 2)
    assert found == pytest.approx({"rise": sum(rises) / 3, "rise_error": deviation / math.sqrt(3)})
    one = landscape.sharpness(0.5, around[:2])
    assert one["rise"] == 1.5 and math.isnan(one["rise_error"])
