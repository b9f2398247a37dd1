"""greedy_coreset against the plain loop in float64: the same picks in the same order, ties to the lowest index."""

import pytest
import torch

from runtime.errors import UserError
from runtime.memory import Workspace
from search import coreset
from search.bounds import pair_distances
from search.coreset import farthest_points, greedy_coreset


def plain_search(features, n_picks, start=None, least=None, radius=0.0, dtype=torch.float64):
    """The definition: argmax (torch's is the first of equal maxima), distance to the newest pick, minimum."""
    x, picks = features.to(dtype).contiguous(), []  # strides would change the order of sums
    least = torch.full((len(x),), torch.inf, dtype=dtype) if least is None else least.clone()
    while len(picks) < n_picks and (start is not None or radius == 0 or least.max() > radius**2):
        picks.append(int(least.argmax()) if start is None else start)
        start = None
        least = torch.minimum(least, (x - x[picks[-1]]).square().sum(1))
        least[picks] = -torch.inf
    return torch.tensor(picks, dtype=torch.int64), max(float(least.max()), 0.0) ** 0.5


def plain_loop(features, n_picks, start=0, dtype=torch.float64):
    return plain_search(features, n_picks, start, dtype=dtype)[0]


def picks_of(features, n_picks, start=0, **options):
    return greedy_coreset(features, n_picks, start=start, **options).picks


def gaussian(n=400, d=24):
    return torch.randn(n, d)


def relu():
    """Low intrinsic dimension, like the patch features of a network."""
    hidden = (torch.randn(400, 6) @ torch.randn(6, 64) + torch.randn(64)).relu()
    return hidden @ torch.randn(64, 24)


def clusters():
    """So tight that float32 norms and products say nothing about the distances inside: needs the float64 bounds."""
    return 10 * torch.randn(5, 24)[torch.randint(0, 5, (400,))] + 1e-4 * torch.randn(400, 24)


def duplicates():
    return torch.randn(30, 24)[torch.randint(0, 30, (400,))]


def grid():
    """1,728 places for 3,000 points, spacing 0.1, which float32 cannot represent: thousands of exact and near ties."""
    return torch.randint(0, 12, (3000, 3)).float() / 10


def bits():
    return torch.randint(0, 2, (1500, 32)).float()


def permuted():
    """Points whose distances to the first agree but for the rounding of the sums: one vector, its entries shuffled."""
    return torch.cat([torch.zeros(1, 24), torch.randn(24).expand(400, 24).gather(1, torch.rand(400, 24).argsort(1))])


def near_ties():
    """Corners of a cube with every entry moved by a few units in the last place: float32 distances pick wrongly."""
    corners = 8 + 2.0 * torch.randint(0, 2, (600, 24)) - 1
    return corners + torch.randint(-3, 4, (600, 24)) * 2**-20


def mixed_scales():
    return torch.randn(400, 24) * 10 ** (12 * torch.rand(400, 1) - 6)


CASES = {
    "gaussian": gaussian,
    "relu": relu,
    "clusters": clusters,
    "duplicates": duplicates,
    "grid": grid,
    "bits": bits,
    "permuted": permuted,
    "near ties": near_ties,
    "mixed scales": mixed_scales,
    "identical": lambda: torch.full((300, 5), 0.1),
    "offset": lambda: gaussian() + 1000,
    "tiny": lambda: gaussian() * 1e-4,
    "below float32 squares": lambda: gaussian() * 1e-25,
    "above float32 squares": lambda: gaussian() * 1e30,
    "one column": lambda: torch.randn(400, 1),
    "not contiguous": lambda: torch.randn(24, 800).T[::2],
    "half precision": lambda: gaussian().bfloat16(),
}


@pytest.mark.parametrize("case", CASES)
def test_same_picks_in_the_same_order_as_the_plain_loop(case):
    features = CASES[case]()
    expected = plain_loop(features, 150, start=7)
    assert len(expected.unique()) == 150
    for pool in (1, 7, 64, 5000):
        assert torch.equal(picks_of(features, 150, start=7, pool=pool), expected), f"pool {pool}"
    for chunk in (len(features) * 8, 12345, 10**7):
        assert torch.equal(picks_of(features, 150, start=7, chunk=chunk), expected), f"chunk {chunk}"


@pytest.mark.parametrize("case", ["gaussian", "duplicates", "clusters", "identical"])
def test_all_points_can_be_picked(case):
    features = CASES[case]()
    n = len(features)
    picks = picks_of(features, n, start=n - 1)
    assert torch.equal(picks, plain_loop(features, n, start=n - 1))
    assert torch.equal(picks.sort().values, torch.arange(n))


def test_near_ties_do_fool_float32():
    features = near_ties()
    assert not torch.equal(plain_loop(features, 150, dtype=torch.float32), plain_loop(features, 150))


def test_copies_of_picks_come_last_in_the_order_of_their_index():
    features = torch.tensor([[0.0], [5.0], [0.0], [5.0], [1.0], [5.0]])
    assert picks_of(features, 6, start=3).tolist() == [3, 0, 4, 1, 2, 5]


def test_the_pool_takes_the_lowest_indices_among_ties():
    least = torch.tensor([1.0, 3.0, 2.0, 2.0, -torch.inf, 2.0], dtype=torch.float64)
    assert [farthest_points(least, n).tolist() for n in (1, 2, 3, 5)] == [[1], [1, 2], [1, 2, 3], [0, 1, 2, 3, 5]]


def test_several_pools_with_the_growing_size():
    features = torch.randn(6000, 8)
    assert torch.equal(picks_of(features, 900, pool=600), plain_loop(features, 900))


def test_few_distances_are_evaluated(monkeypatch):
    """Those of points that come into a pool: 0.2 per point here, where evaluating all that become less takes 3.7."""
    evaluated = []

    def counted(a, i, b, j):
        evaluated.append(len(i))
        return pair_distances(a, i, b, j)

    monkeypatch.setattr(coreset, "pair_distances", counted)
    features = torch.randn(12_000, 16)
    assert torch.equal(picks_of(features, 300), plain_loop(features, 300))
    assert sum(evaluated) < len(features)


def test_smallest_inputs():
    assert picks_of(torch.randn(1, 3), 1).tolist() == [0]
    assert picks_of(torch.randn(9, 3), 1, start=4).tolist() == [4]
    assert picks_of(torch.tensor([[0.0], [0.0]]), 2, start=1).tolist() == [1, 0]


def test_threads_autocast_and_matmul_precision_change_nothing():
    features = 10 * torch.randn(5, 24)[torch.randint(0, 5, (400,))] + torch.randn(400, 24)  # bfloat16 would not do
    expected = plain_loop(features, 200)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    before = features.clone()
    try:
        torch.set_float32_matmul_precision("medium")
        for n in (1, 2):
            torch.set_num_threads(n)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(picks_of(features, 200), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(features, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_cuda_picks_the_same(case):
    features = CASES[case]()
    assert torch.equal(picks_of(features.cuda(), 150), plain_loop(features, 150))


def test_progress_adds_up():
    for features in (gaussian(), duplicates()):
        steps = []
        picks_of(features, 150, pool=32, progress=steps.append)
        assert sum(steps) == 150 and min(steps) >= 1


def test_features_with_gradients():
    features = gaussian()
    picks = picks_of(features.clone().requires_grad_(), 5)
    assert torch.equal(picks, picks_of(features, 5)) and picks.dtype == torch.int64


@pytest.mark.parametrize("case", CASES)
def test_the_radius_is_that_of_the_plain_loop(case):
    features = CASES[case]()
    for n_picks in (1, 40, 150, 399 if len(features) >= 399 else len(features)):
        picks, radius = plain_search(features, n_picks, start=3)
        for pool in (16, 4096):
            found = greedy_coreset(features, n_picks, start=3, pool=pool)
            assert torch.equal(found.picks, picks) and found.radius == radius


@pytest.mark.parametrize("case", ["gaussian", "clusters", "duplicates", "grid", "identical"])
def test_from_given_distances_until_a_radius(case):
    features = CASES[case]()
    n = len(features)
    far = (features.double() - features[:1].double() - 1).square().sum(1)
    for least in (far, torch.full_like(far, 0.5), far.where(torch.arange(n) % 3 > 0, 0)):
        before = least.clone()
        for radius in (0.0, 0.3 * float(far.max()) ** 0.5, 0.9 * float(far.max()) ** 0.5, 2 * float(far.max()) ** 0.5):
            for n_picks in (1, 100, 10 * n if radius else n):
                expected = plain_search(features, n_picks=min(n_picks, n), least=least, radius=radius)
                found = greedy_coreset(features, n_picks, least=least, radius=radius, pool=64)
                assert torch.equal(found.picks, expected[0]) and found.radius == expected[1]
                assert radius == 0 or found.radius <= radius or len(found.picks) == n_picks
        assert torch.equal(least, before)


def test_a_start_within_a_radius():
    features = gaussian()
    picks, radius = plain_search(features, 400, start=5, radius=5.0)
    assert 1 < len(picks) < 400 and radius <= 5
    found = greedy_coreset(features, 400, start=5, radius=5.0)
    assert torch.equal(found.picks, picks) and found.radius == radius
    assert greedy_coreset(features, 400, start=5, radius=1e3).picks.tolist() == [5]


def test_ids_stand_for_indices():
    features, ids = duplicates(), torch.randperm(5000)[:400].sort().values
    expected = plain_loop(features, 150, start=17)
    assert torch.equal(picks_of(features, 150, start=int(ids[17]), ids=ids), ids[expected])


def test_the_large_copy_lies_where_it_should():
    features, made = clusters(), []

    def empty(*shape, dtype):
        made.append((shape, dtype))
        return torch.empty(shape, dtype=dtype)

    expected = plain_loop(features, 150)
    assert torch.equal(picks_of(features, 150, pool=64, empty=empty), expected)
    assert made == [((400, 28), torch.float32), ((400, 28), torch.float64)]  # so tight that float32 bounds say nothing
    work = Workspace(0)
    mapped = work.empty(*features.shape).copy_(features)
    assert torch.equal(picks_of(mapped, 150, empty=work.empty), expected) and work.used == 0


@pytest.mark.parametrize(
    "features, n_picks, options",
    [
        (torch.randn(5, 2), 0, {}),
        (torch.randn(5, 2), 6, {}),
        (torch.randn(5, 2), 2, {"start": 5}),
        (torch.randn(5, 2), 2, {"start": -1}),
        (torch.randn(5, 2), 2, {"start": 0, "ids": torch.arange(1, 6)}),
        (torch.randn(5, 2), 2, {"start": None}),
        (torch.randn(5, 2), 2, {"least": torch.ones(5, dtype=torch.float64)}),
        (torch.randn(5, 2), 2, {"start": None, "least": torch.ones(5)}),
        (torch.randn(5, 2), 2, {"start": None, "least": torch.ones(4, dtype=torch.float64)}),
        (torch.randn(5, 2), 2, {"start": None, "least": torch.full((5,), torch.nan, dtype=torch.float64)}),
        (torch.randn(5, 2), 2, {"ids": torch.arange(4)}),
        (torch.randn(5, 2), 2, {"ids": torch.zeros(5, dtype=torch.int64)}),
        (torch.randn(5, 2), 2, {"ids": torch.arange(5.0)}),
        (torch.randn(5, 2), 2, {"radius": -1.0}),
        (torch.randn(5, 2), 2, {"radius": torch.nan}),
        (torch.randn(5, 2), 2, {"pool": 0}),
        (torch.randn(5, 2), 2, {"chunk": 0}),
        (torch.randn(5), 2, {}),
        (torch.randn(0, 2), 1, {}),
        (torch.randn(5, 0), 1, {}),
        (torch.ones(5, 2, dtype=torch.int64), 2, {}),
    ],
)
def test_wrong_arguments_are_named(features, n_picks, options):
    with pytest.raises(ValueError, match=r"greedy_coreset: "):
        greedy_coreset(features, n_picks, **{"start": 0, **options})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_bad_features_are_named(value):
    features = gaussian()
    features[3, 2] = features[17, 1] = value
    with pytest.raises(UserError, match=r"features: row 3 of 400 holds NaN or inf"):
        picks_of(features, 5)
