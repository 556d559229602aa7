"""The gallery's pictures."""

import sys

import numpy as np
import pytest
from PIL import Image

from stereovla.simulation import gallery
from stereovla.simulation.objects import CONTAINERS, GRASPABLES

SIDE = 60


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """{file name: uint8 (H, W, 3)} of the whole gallery, drawn small."""
    folder = tmp_path_factory.mktemp("docs") / "images"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gallery", str(folder), "--side", str(SIDE)])
        gallery.main()
    return {path.name: np.asarray(Image.open(path).convert("RGB")) for path in folder.iterdir()}


def test_gallery_is_drawn_whole(pictures):
    across, down = SIDE + gallery.GAP_PX, SIDE + gallery.CAPTION_PX + gallery.GAP_PX
    for name, rows in (("easy", 1), ("default", 3), ("geometry", 3)):
        picture = pictures[f"gallery_{name}.png"]
        assert picture.shape == (rows * down - gallery.GAP_PX, 3 * across - gallery.GAP_PX, 3)
        assert picture.std() > 20
    assert pictures["gallery_robots.png"].shape == (2 * down - gallery.GAP_PX, 3 * across - gallery.GAP_PX, 3)
    names = [f"gallery_{name}.png" for name in ("default", "easy", "episode", "geometry", "objects", "robots")]
    assert sorted(pictures) == names  # and no temporary file


def test_every_object_is_in_the_middle_of_its_picture(pictures):
    sheet, side = pictures["gallery_objects.png"].astype(int), SIDE * 3 // 5
    across, down = side + gallery.GAP_PX, side + gallery.CAPTION_PX + gallery.GAP_PX
    for index, kind in enumerate(GRASPABLES + CONTAINERS):
        top, left = index // 7 * down + gallery.CAPTION_PX, index % 7 * across
        cell = sheet[top : top + side, left : left + side]
        rows, columns = np.nonzero(np.ptp(cell, axis=-1) > 60)  # saturated
        assert len(rows) > 8, kind
        assert max(abs(rows.mean() - side / 2), abs(columns.mean() - side / 2)) < 0.22 * side, kind
