"""What a loss landscape becomes: rows of results, a table, a CSV, images and surfaces."""

import math
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from evaluation.inspect.landscape import grid_of, sharpness
from evaluation.tables import csv_table, markdown_table
from plots.heatmaps import save
from plots.landscape import Landscape, Scale, contour_image, curve_image, surface
from runtime import distributed
from runtime.files import whole_file
from runtime.log import Log


@dataclass(kw_only=True)
class Measured:
    """A landscape of one run."""

    name: str
    loss: float  # of the run as it is
    accuracy: float  # likewise; NaN without classes
    grid: Tensor  # (P, COLUMNS), in the order of `grid_of`
    around: Tensor  # (2 K, COLUMNS), of `sharpness`
    radius: float  # of these
    eigenvalues: list[float]  # of the Hessian, descending
    marks: list[tuple[float, float, str]]  # x, y and name of networks on the grid

    def row(self) -> dict:
        """For results.json."""
        row = {"run": self.name, "loss": self.loss}
        row["accuracy"] = None if math.isnan(self.accuracy) else self.accuracy
        if len(self.around):
            row |= {"radius": self.radius} | sharpness(self.loss, self.around)
        if self.eigenvalues:
            row["eigenvalues"] = self.eigenvalues
        lowest = float(self.grid[:, 0].nan_to_num(math.inf).min())
        return row | {"lowest": lowest, "seconds_per_point": float(self.grid[:, -1].mean())}


def write(log: Log, measured: list[Measured], axes: list[Tensor], names: tuple[str, str]) -> list[dict]:
    """Everything but results.json, whose rows it returns.

    Args:
        axes: one or two, float64 (X,), (Y,). names: of them.
    """
    shape, drawn, rows = [len(axis) for axis in axes[::-1]], [], [each.row() for each in measured]
    for each, row in zip(measured, rows):
        about = {"name": each.name, "note": note(row), "marks": each.marks}
        y = axes[1] if len(axes) == 2 else None
        drawn.append(Landscape(x=axes[0], y=y, loss=each.grid[:, 0].view(shape), **about))  # (Y, X)
    if len(axes) == 2:
        image, file, key = contour_image(drawn, *names), "contours.png", "landscape"
        scale = Scale([each.loss for each in drawn])
        for each in drawn:
            log.mesh(f"landscape/surface/{each.name}", *surface(each, scale))
    else:
        image, file, key = curve_image(drawn, names[0]), "curves.png", "landscape/curves"
    log.image(key, pil_to_tensor(image))
    table = markdown_table(*described(rows))
    log.text("landscape/table", table)
    log.say(table)
    cells = [
        {"run": each.name, **dict(zip("xy", at)), "loss": loss, "accuracy": None if math.isnan(accuracy) else accuracy}
        for each in measured
        for at, (loss, accuracy, _) in zip(grid_of(*axes).tolist(), each.grid.tolist())
    ]
    if distributed.is_main():
        save(image, log.folder / file)
        with whole_file(log.folder / "landscape.csv") as csv:
            csv.write(csv_table(cells))
    return rows


def note(row: dict) -> str:
    """A run's numbers in one line, for the images."""
    parts = [f"loss {row['loss']:.3g}"]
    parts += [] if row["accuracy"] is None else [f"accuracy {row['accuracy']:.3f}"]
    parts += [f"rise at {row['radius']:g}: {row['rise']:.2g}"] if "rise" in row else []
    parts += [f"eigenvalue {row['eigenvalues'][0]:.3g}"] if "eigenvalues" in row else []
    return ", ".join(parts)


def described(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for people."""
    header = ["run", "loss", "accuracy", "lowest on the grid", "mean rise (radius)", "largest eigenvalues"]
    body = []
    for row in rows:
        rise = "-"
        if "rise" in row:
            error = "" if math.isnan(row["rise_error"]) else f" ± {row['rise_error']:.2g}"
            rise = f"{row['rise']:.4g}{error} ({row['radius']:g})"
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
        values = ", ".join(f"{value:.4g}" for value in row.get("eigenvalues", [])) or "-"
        body.append([row["run"], f"{row['loss']:.5g}", accuracy, f"{row['lowest']:.5g}", rise, values])
    return header, body
