"""Collapse metrics against plain float64 loops and NumPy's SVD, closed forms, limits; and the warnings in words."""

import math

import numpy as np
import pytest
import torch

from evaluation import collapse
from evaluation.collapse import collapse_warning, embedding_health

NAMES = ("std", "effective_rank", "alignment", "uniformity", "positive_cosine", "negative_cosine")


def health_of(z):
    """Without the common prefix."""
    return {name.removeprefix("embedding/"): value for name, value in embedding_health(z).items()}


def random_embeddings(batch, views, dim, seed=0):
    """Views of an image are nearer to each other than to other images, and all share a direction."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, 1, dim), (batch, views, dim))
    image, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return image + 0.5 * noise + torch.linspace(-1, 1, dim, dtype=torch.float64)


def loop_health(z):
    """Each metric by its definition, one pair at a time."""
    batch, views, dim = z.shape
    z = [[[float(x) for x in row] for row in image] for image in z]
    z = [[[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in image] for image in z]
    std = []
    for v in range(views):
        for d in range(dim):
            column = [z[i][v][d] for i in range(batch)]
            mean = sum(column) / batch
            std.append(math.sqrt(sum((x - mean) ** 2 for x in column) / (batch - 1)))
    of = {"positive": ([], []), "negative": ([], [])}
    for i, v in np.ndindex(batch, views):
        for j, w in np.ndindex(batch, views):
            if (i, v) != (j, w):
                squares, cosines = of["positive" if i == j else "negative"]
                squares.append(sum((x - y) ** 2 for x, y in zip(z[i][v], z[j][w])))
                cosines.append(sum(x * y for x, y in zip(z[i][v], z[j][w])))
    s = np.linalg.svd(np.array(z).reshape(batch * views, dim), compute_uv=False)
    p = s / s.sum()
    return {
        "std": math.sqrt(dim) * sum(std) / len(std),
        "effective_rank": math.exp(-sum(x * math.log(x) for x in p if x > 0)),
        "alignment": np.mean(of["positive"][0]),
        "uniformity": math.log(np.mean([math.exp(-2 * x) for x in of["negative"][0]])),
        "positive_cosine": np.mean(of["positive"][1]),
        "negative_cosine": np.mean(of["negative"][1]),
    }


@pytest.mark.parametrize(
    ("batch", "views", "dim"),
    [(7, 2, 5), (7, 2, 14), (7, 2, 13), (7, 2, 15), (3, 5, 40), (2, 2, 1), (12, 3, 2)],  # B V above, at, below D
)
def test_equals_the_loop(batch, views, dim):
    z = random_embeddings(batch, views, dim)
    health, expected = health_of(z), loop_health(z)
    assert set(health) == set(expected) == set(NAMES)
    for name in NAMES:
        assert health[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    for name, value in health_of(z.float()).items():
        assert value == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


def test_long_rows_are_multiplied_in_parts(monkeypatch):
    z = random_embeddings(5, 2, 33)
    whole = embedding_health(z)
    monkeypatch.setattr(collapse, "COLUMNS_AT_ONCE", 4)
    assert embedding_health(z) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("dim", [8, 40])  # (D, D) and (B V, B V) products
def test_orthonormal_rows_have_full_rank(dim):
    generator = torch.Generator().manual_seed(0)
    rows = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q[:8]
    health = health_of(rows[:, None])
    assert health["effective_rank"] == pytest.approx(8, rel=1e-9)
    assert health["negative_cosine"] == pytest.approx(0, abs=1e-9)
    assert health["uniformity"] == pytest.approx(-4, rel=1e-9)  # squared distances 2
    twice = health_of(rows[:, None].repeat(1, 2, 1))  # equal views add no direction
    assert twice["effective_rank"] == pytest.approx(8, rel=1e-6)
    assert twice["alignment"] == pytest.approx(0, abs=1e-9) and twice["positive_cosine"] == pytest.approx(1)


@pytest.mark.parametrize("dim", [16, 1500])
def test_one_embedding_for_all(dim):
    """Of different lengths, in float32: the rounding of 512 rows must not look like directions."""
    generator = torch.Generator().manual_seed(0)
    row, length = torch.randn(dim, generator=generator), torch.rand(256, 2, 1, generator=generator) + 0.1
    health = health_of(row * length)
    assert health["effective_rank"] == pytest.approx(1, abs=1e-3)
    for name, value in (("std", 0), ("alignment", 0), ("uniformity", 0), ("positive_cosine", 1)):
        assert health[name] == pytest.approx(value, abs=1e-5), name
    assert health["negative_cosine"] == pytest.approx(1, abs=1e-5)


def test_points_of_a_line_and_of_a_circle():
    """Both are spread like healthy ones by their std; the rank tells."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(32, 2, dtype=torch.float64, generator=generator)).Q.T  # (2, 32)
    ends = torch.tensor([1.0, -1.0] * 20, dtype=torch.float64)[:, None] * frame[0]
    assert health_of(ends[:, None])["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert health_of(ends[:, None])["std"] > 0.5
    beside = frame[1] + torch.randn(40, 1, dtype=torch.float64, generator=generator) * frame[0]  # past the origin
    assert 1.5 < health_of(beside[:, None])["effective_rank"] < 2
    angle = torch.arange(40, dtype=torch.float64)[:, None] * 2 * math.pi / 40
    circle = angle.cos() * frame[0] + angle.sin() * frame[1]
    assert health_of(circle[:, None])["effective_rank"] == pytest.approx(2, abs=1e-4)


def test_random_embeddings_are_healthy():
    z = torch.randn(256, 2, 128, generator=torch.Generator().manual_seed(0))
    health = health_of(z)
    assert health["std"] == pytest.approx(1, abs=0.02) and 110 < health["effective_rank"] < 128
    assert health["uniformity"] == pytest.approx(-4, abs=0.1)


def test_a_view_that_only_shows_its_size_is_no_spread():
    """Constant in each view, other from view to view, as large and small crops can be."""
    z = torch.randn(1, 2, 16, generator=torch.Generator().manual_seed(0)).expand(9, 2, 16)
    assert health_of(z)["std"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dim", [6, 40])
def test_rotation_and_length_of_rows_change_nothing(dim):
    z = random_embeddings(9, 2, dim)
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    rotated, health = health_of(z @ rotation), health_of(z)
    for name in set(NAMES) - {"std"}:  # a mean over dimensions of roots depends on the axes
        assert rotated[name] == pytest.approx(health[name], rel=1e-9, abs=1e-12), name
    lengths = torch.logspace(-150, 150, 18, dtype=torch.float64).view(9, 2, 1)
    assert health_of(z * lengths) == pytest.approx(health, rel=1e-9)
    for scale in (1e-42, 1e-30, 1e30):  # the first is subnormal, squares of the others under- and overflow
        assert health_of(z.float() * scale) == pytest.approx(health, rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    z = random_embeddings(20, 2, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        health = embedding_health(z)
    assert health == embedding_health(z.float())
    assert all(isinstance(value, float) for value in health.values())
    large = torch.full((4, 2, 8), 60000.0, dtype=torch.float16)  # its square is infinite in float16
    assert health_of(large)["positive_cosine"] == pytest.approx(1)


def test_zeros_are_one_point_and_not_nan():
    health = health_of(torch.zeros(4, 2, 8))
    zero = {"std": 0, "alignment": 0, "uniformity": 0, "positive_cosine": 0, "negative_cosine": 0}
    assert health == zero | {"effective_rank": 1}
    one = random_embeddings(4, 2, 8)
    one[2, 1] = 0
    assert all(math.isfinite(value) for value in embedding_health(one).values())


def test_one_view_and_one_image():
    z = random_embeddings(6, 2, 8)
    one_view = health_of(z[:, :1])
    assert set(one_view) == {"std", "effective_rank", "uniformity", "negative_cosine"}
    one_image = health_of(z[:1])
    assert set(one_image) == {"effective_rank", "alignment", "positive_cosine"}
    assert one_image["alignment"] == pytest.approx(2 - 2 * one_image["positive_cosine"])
    assert health_of(z[:1, :1]) == {"effective_rank": pytest.approx(1)}
    for wrong in (z[0], z[:0], z[None]):
        with pytest.raises(ValueError, match=r"\(B, V, D\)"):
            embedding_health(wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_and_does_not_stop(value):
    z = random_embeddings(6, 2, 8)
    z[3, 1, 2] = value
    assert all(math.isnan(x) for x in embedding_health(z).values())


@pytest.mark.parametrize(("views", "used"), [(1, 512), (2, 256), (10, 51), (300, 2)])
def test_only_the_first_images_are_used(views, used):
    z = random_embeddings(used + 1, views, 3)
    assert embedding_health(z) == embedding_health(z[:used])
    z[used - 1] *= -1
    assert embedding_health(z) != embedding_health(random_embeddings(used + 1, views, 3))


def test_no_gradient():
    assert embedding_health(torch.randn(4, 2, 8, requires_grad=True))  # tolist() of a graph's tensor would raise


# Warnings -------------------------------------------------------------------------------------------------------------

LN_K = math.log(4096)
HEALTHY = {"embedding/std": 0.9, "embedding/effective_rank": 40.0, "embedding/alignment": 0.3}


def warning(loss=5.0, health=HEALTHY, **changes):
    options = {"chance": LN_K, "advice": "lower the teacher's temperature", "epochs": 3.0, "distinct": 64}
    return collapse_warning(loss, health, **options | changes)


def test_a_healthy_run_gets_no_warning():
    assert warning() is None and warning(chance=None) is None and warning(health={}) is None


def test_loss_at_chance():
    for loss in (LN_K, LN_K * 1.0009, LN_K * 0.9991):
        assert warning(loss) == (
            f"the loss {loss:.4g} is that of constant embeddings, 8.318: collapsed or not "
            "learning; lower the teacher's temperature"
        )
    assert warning(LN_K * 1.0011) is None and warning(LN_K * 0.9989) is None
    assert warning(LN_K, chance=None) is None
    assert "constant embeddings, -1:" in warning(-1.0, chance=-1.0) and warning(-0.9, chance=-1.0) is None


def test_point():
    assert "embedding/std 0.049 is below 0.05" in warning(health=HEALTHY | {"embedding/std": 0.049})
    assert warning(health=HEALTHY | {"embedding/std": 0.05}) is None


def test_line():
    line = HEALTHY | {"embedding/effective_rank": 1.9}
    assert "embedding/effective_rank 1.9 is below 2" in warning(health=line, distinct=8)
    assert warning(health=line, distinct=7) is None  # as few images, or classes of SupCon, need no more
    assert warning(health=HEALTHY | {"embedding/effective_rank": 2.0}) is None


def test_early_or_nan():
    for changes in ({"loss": LN_K}, {"health": HEALTHY | {"embedding/std": 0.0, "embedding/effective_rank": 1.0}}):
        assert warning(**changes, epochs=0.99) is None
        text = warning(**changes, epochs=1.0)
        assert text and "\n" not in text
    assert warning(math.nan, HEALTHY | {"embedding/std": 0.0}) is None
    assert warning(LN_K, HEALTHY | {"embedding/alignment": math.nan}) is None


def test_what_gradient_descent_makes_of_a_loss():
    """Attraction alone ends in a point and is named; with repulsion the same steps end healthy."""
    generator = torch.Generator().manual_seed(0)
    images, noise, start = (torch.randn(shape, generator=generator) for shape in ((32, 1, 20), (32, 2, 20), (20, 16)))
    views, texts = 1 + images + noise, []
    for repulsion in (0, 1):
        weight = start.clone().requires_grad_()
        for _ in range(60):
            z = torch.nn.functional.normalize(views @ weight, dim=2)
            loss = (z[:, 0] - z[:, 1]).square().sum(1).mean()
            loss = loss + repulsion * (z.flatten(0, 1) @ z.flatten(0, 1).T).exp().mean().log()
            loss.backward()
            with torch.no_grad():
                weight.sub_(weight.grad).div_(weight.norm())
            weight.grad = None
        texts.append(warning(loss.item(), embedding_health(z.detach()), chance=None))
    assert "collapse to a point" in texts[0] and texts[1] is None
