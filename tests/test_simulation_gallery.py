"""The gallery picture."""

import sys

import numpy as np
import pytest
from PIL import Image

from simulation import gallery


def test_gallery_is_drawn_whole(tmp_path, monkeypatch):
    output = tmp_path / "images" / "world.png"
    arguments = ["--seeds", "1", "2", "--ranges", "small", "large", "--steps", "0", "2", "--side", "64"]
    monkeypatch.setattr(sys, "argv", ["gallery", str(output), *arguments])
    gallery.main()
    picture = np.asarray(Image.open(output))
    assert picture.shape == (gallery.CAPTION_PX + 2 * 64, 2 * 64, 3)
    assert picture[gallery.CAPTION_PX :].std() > 20
    assert [file.name for file in output.parent.iterdir()] == ["world.png"]


def test_columns_must_agree(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gallery", str(tmp_path / "world.png"), "--seeds", "1"])
    with pytest.raises(SystemExit):
        gallery.main()
    assert "same number of values" in capsys.readouterr().err
