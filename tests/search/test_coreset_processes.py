"""greedy_coreset with its points spread over processes: the picks of one process, with one exchange a pass."""

import pytest
import torch
import torch.distributed as dist

from search.coreset import greedy_coreset
from tests.processes import run_processes
from tests.search.test_coreset import CASES, plain_search

NAMES = ("gaussian", "clusters", "duplicates", "grid", "identical")
SETUP = 4  # exchanges: how many points, their extent, the start's features (how many rows, and these)


def shards(name, world_size):
    """Features and each process's ids: interleaved and uneven; of three processes the second has none."""
    torch.manual_seed(0)
    features = CASES[name]()[:1000]
    owner = torch.randint(0, 4, (len(features),)).clamp(max=1) * (world_size - 1)
    return features, [(owner == r).nonzero().squeeze(1) for r in range(world_size)]


def from_one(features):
    """Squared distances to a place that is no point, and a radius that a part of the points is within."""
    least = (features.double() - 1).square().sum(1)
    return least, 0.7 * float(least.max()) ** 0.5


def in_processes(rank, world_size):
    exchanges, all_gather, results = [], dist.all_gather, []

    def counted(parts, x):
        exchanges.append(len(x))
        all_gather(parts, x)

    dist.all_gather = counted
    for name in NAMES:
        features, ids = shards(name, world_size)
        own, found = ids[rank], {}
        for pool, n_picks in ((7, 30), (60, 150), (4096, 150)):
            steps, before = [], len(exchanges)
            found[pool] = greedy_coreset(features[own], n_picks, start=7, ids=own, pool=pool, progress=steps.append)
            found[f"passes {pool}"] = len(steps) - 1, len(exchanges) - before - SETUP
        least, radius = from_one(features)
        found["radius"] = greedy_coreset(features[own], 10**6, least=least[own], ids=own, radius=radius)
        found["least"] = greedy_coreset(features[own], 3, least=least[own], ids=own)
        found["nothing"] = greedy_coreset(features[own][:0], 3, least=least[own][:0], ids=own[:0])
        found["everything"] = greedy_coreset(features[own], len(features), start=0, ids=own)
        results.append(found)
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_pick_what_one_does_with_one_exchange_a_pass(world_size):
    everyone = run_processes(in_processes, world_size)
    for case, name in enumerate(NAMES):
        features, ids = shards(name, world_size)
        assert sorted(torch.cat(ids).tolist()) == list(range(len(features)))
        assert world_size == 2 or len(ids[1]) == 0
        least, radius = from_one(features)
        expected = {
            7: plain_search(features, 30, start=7),
            60: plain_search(features, 150, start=7),
            4096: plain_search(features, 150, start=7),
            "radius": plain_search(features, len(features), least=least, radius=radius),
            "least": plain_search(features, 3, least=least),
            "nothing": (torch.empty(0, dtype=torch.int64), 0.0),
            "everything": plain_search(features, len(features), start=0),
        }
        for found in (results[case] for results in everyone):
            for key, (picks, left) in expected.items():
                assert torch.equal(found[key].picks, picks) and found[key].radius == left, f"{name}, {key}"
            for pool in (7, 60, 4096):
                passes, exchanges = found[f"passes {pool}"]
                assert passes <= exchanges <= passes + 1, f"{name}, pool {pool}"  # one more when the radius needs it


def refused(rank, world_size):  # noqa: ARG001
    messages = []
    for options in (
        {"start": 0},
        {"start": 0, "ids": torch.arange(5) + 5 * rank},
        {"start": 99, "ids": torch.arange(5)},
    ):
        with pytest.raises(ValueError) as caught:
            greedy_coreset(torch.zeros(5, 2), 11 if options["start"] == 0 else 2, **options)
        messages.append(str(caught.value))
    return messages


def test_wrong_arguments_are_named_on_every_process():
    for missing, many, start in run_processes(refused, 2):
        assert "several processes need ids" in missing and "11 picks do not fit 10 points" in many
        assert "0 points have the id of start, 99" in start
