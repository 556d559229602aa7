"""Places in the picture and bins in one code of fixed waves: where a visual token is, and what a bin says.

Not in the papers: an option (off in the `full` preset). Visual tokens carry no place of their own but the language
model's rotary embedding, which values do not have; and untrained bins and numbers are hundreds of words that know
nothing of each other, of which each is met in a few answers. In one code, an answer is near right as soon as the
attended place is handed on, and a pixel that is read says where to look.
"""

import torch


def waves(places: torch.Tensor, width: int, grid: int) -> torch.Tensor:
    """Sines and cosines (n, width) of places (n, 2) in [-1, 1], of the first coordinate, then of the second; from waves
    of twice the range, whose sine is nearly linear, to waves of two of the `grid` tokens of a side. 0 in the last
    `width` % 4 entries.
    """
    count = width // 4
    powers = torch.arange(count, device=places.device, dtype=places.dtype) / max(1, count - 1)
    angles = places[..., None] * (torch.pi / 2 * grid**powers)  # (n, 2, count)
    code = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return torch.nn.functional.pad(code, (0, width - 4 * count))


def code_of_grid(grid: int, like: torch.Tensor) -> torch.Tensor:
    """The code (grid * grid, width) of the centres of the visual tokens; `like` (..., width)."""
    cells = (torch.arange(grid, device=like.device, dtype=torch.float32) + 0.5) * 2 / grid - 1
    v, u = torch.meshgrid(cells, cells, indexing="ij")
    return waves(torch.stack([u, v], dim=-1).flatten(0, 1), like.shape[-1], grid).to(like.dtype)


@torch.no_grad()
def write_bins(weight: torch.Tensor, first: int, num_bins: int, grid: int) -> None:
    """Gives the rows of `num_bins` bins in an embedding (vocabulary, width), of which `first` is the id of the last,
    the code of what they say, in both coordinates, at the size that the rows have.
    """
    # bin b is the id first + num_bins - b
    _write(weight, torch.arange(first, first + num_bins), torch.linspace(1, -1, num_bins), grid)


@torch.no_grad()
def write_hundredths(weight: torch.Tensor, first: int, grid: int) -> None:
    """Gives the rows of ".00" to ".99", of which `first` is the first id, the code of places from side to side."""
    _write(weight, torch.arange(first, first + 100), torch.arange(100) / 50 - 0.99, grid)


@torch.no_grad()
def write_pixels(weight: torch.Tensor, pixels: dict[int, int], image_size: int, grid: int) -> None:
    """Gives the rows of numbers in an embedding (vocabulary, width) the code of the pixels that they name, in both
    coordinates, at the size that the rows have; `pixels`: id -> px.
    """
    places = (torch.tensor(list(pixels.values())) + 0.5) * 2 / image_size - 1
    _write(weight, torch.tensor(list(pixels)), places, grid)


def _write(weight: torch.Tensor, ids: torch.Tensor, places: torch.Tensor, grid: int) -> None:
    rows, ids = weight[ids].float(), ids.to(weight.device)
    code = waves(places.to(weight.device)[:, None].expand(-1, 2), weight.shape[1], grid)
    weight[ids] = (code * (rows.square().mean() / code.square().mean()).sqrt()).to(weight.dtype)
