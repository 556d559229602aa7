"""The gallery's pictures."""

import numpy as np
from PIL import Image

from simulation import gallery
from simulation.objects import CONTAINERS, GRASPABLES


def test_gallery_is_drawn_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gallery", str(tmp_path / "images"), "--side", "50"])
    gallery.main()
    sizes = {path.name: Image.open(path).size for path in (tmp_path / "images").iterdir()}
    across, down = 50 + gallery.GAP_PX, 50 + gallery.CAPTION_PX + gallery.GAP_PX
    for name, rows in (("easy", 1), ("default", 3), ("geometry", 3)):
        assert sizes.pop(f"gallery_{name}.png") == (3 * across - gallery.GAP_PX, rows * down - gallery.GAP_PX)
    assert set(sizes) == {"gallery_episode.png", "gallery_objects.png"}  # nothing else, no temporary file
    picture = np.asarray(Image.open(tmp_path / "images" / "gallery_default.png"))
    assert picture.std() > 20
    assert -(-len(GRASPABLES + CONTAINERS) // 7) * (30 + gallery.CAPTION_PX) < sizes["gallery_objects.png"][1] + 1


def test_an_object_is_cut_out_around_its_middle():
    sheet = np.asarray(gallery.draw_objects(40)).astype(int)
    for index, kind in enumerate(GRASPABLES + CONTAINERS):
        top, left = index // 7 * (44 + gallery.CAPTION_PX), index % 7 * 44
        cell = sheet[top + gallery.CAPTION_PX :][:40, left : left + 40]
        saturated = np.ptp(cell, axis=-1) > 60
        rows, columns = np.nonzero(saturated)
        assert saturated.sum() > 8, kind
        assert abs(columns.mean() - 20) < 8 and abs(rows.mean() - 20) < 9, kind
