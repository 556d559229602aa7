"""Rectification: imports and `check` judge the stored views alike, beyond what a dataset says of its misalignment."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from command_lines import data as main
from lerobot_folder import AS_THEY_ARE, import_config, import_folder, rewrite_shard, write_lerobot

from stereovla.dataset_builder.dataset import shards
from stereovla.dataset_builder.formats.import_checks import check_episode
from stereovla.dataset_builder.formats.lerobot_source import open_lerobot
from stereovla.dataset_builder.formats.rig import read_rig

RIGHT = "observation.images.right"
WHOLE = {**AS_THEY_ARE, "crop_px": None, "resize_px": None}


def export(folder: Path, out: Path) -> Path:
    assert main(["export", "lerobot", "--dataset", str(folder), "--out", str(out)]) == 0
    return out


def import_again(source: Path, out: Path) -> int:
    """Exit status of the import of an export, by the rig that lies beside it."""
    config = str(source / "meta/rig.yaml")
    return main(["import", "lerobot", "--source", str(source), "--config", config, "--out", str(out)])


def lower_right_views(folder: Path, rows: int) -> None:
    """The right views of the first shard, `rows` px lower."""

    def change(table):
        pictures = [shards.decode_image(RIGHT, value["bytes"]) for value in table.column(RIGHT).to_pylist()]
        lower = [np.roll(picture, rows, axis=0) for picture in pictures]
        column = table.schema.field(RIGHT)
        values = [{"bytes": shards.encode_image(RIGHT, picture), "path": None} for picture in lower]
        return table.set_column(table.column_names.index(RIGHT), column, pa.array(values, type=column.type))

    rewrite_shard(folder, change)


@pytest.mark.parametrize("size", [64, 128])
def test_misaligned_worlds_go_out_and_in_and_unrectified_ones_do_not(size, tmp_path, capsys):
    """The statement travels with the data; without it, or where the views are further apart, both commands refuse."""
    folder = tmp_path / "built"
    build = ["build", "--preset", "tiny", "--train-episodes", "1", "--validation-episodes", "0", "--no-labels"]
    world = '{"preset": "geometry", "vertical_misalignment_px": [0.9, 1.0]}'
    assert main([*build, "--image-size", str(size), "--world", world, "--out", str(folder)]) == 0
    source, back = export(folder, tmp_path / "lerobot"), tmp_path / "back"
    assert main(["check", str(folder)]) == 0
    assert import_again(source, back) == 0
    assert main(["check", str(back)]) == 0
    for dataset in (folder, back):
        assert shards.read_json(dataset / "meta/info.json")["vertical_misalignment_px"] == 1.0

    rig = source / "meta/rig.yaml"
    rig.write_text(rig.read_text().replace("vertical_misalignment_px: 1.0\n", ""))
    lower_right_views(folder, 2)
    lower = export(folder, tmp_path / "lower")
    capsys.readouterr()
    assert import_again(source, tmp_path / "a") == import_again(lower, tmp_path / "b") == 1
    assert main(["check", str(folder)]) == 1
    unstated, imported, checked = (
        line for line in capsys.readouterr().out.splitlines() if "frame 0: the views are not rectified" in line
    )
    assert unstated.endswith("at most 0.8 are allowed") and imported.endswith("at most 1.8 are allowed")
    assert checked.endswith("at most 1.8 are allowed") and checked.startswith("data/train-00000-of-00001.parquet")


def test_what_an_import_drops_is_what_check_names(tmp_path, capsys):
    """Episodes on both sides of the limit: `check` refuses the very ones that an import does, in the same words."""
    rows = np.linspace(0.6, 1.0, 9)
    source = write_lerobot(tmp_path / "source", np.zeros((5, 3)), np.zeros((5, 3)), rows)
    strict = import_folder(import_config(source, tmp_path, "strict", rig=WHOLE, skip_bad_episodes=True))
    dropped = shards.read_json(strict / "meta/info.json")["dropped"]
    assert 2 < len(dropped) < 7 and f"episode {len(rows) - 1}" in dropped and "episode 0" not in dropped
    assert main(["check", str(strict)]) == 0
    stated = {**WHOLE, "vertical_misalignment_px": 0.5}
    everything = import_folder(import_config(source, tmp_path, "everything", rig=stated))
    assert main(["check", str(everything)]) == 0
    info = shards.read_json(everything / "meta/info.json")
    assert info["vertical_misalignment_px"] == 0.5 and info["dropped"] == {}
    shards.write_json(everything / "meta/info.json", {**info, "vertical_misalignment_px": 0})
    capsys.readouterr()
    assert main(["check", str(everything)]) == 1
    named = [line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert named == [f"{name}, {problem}" for name, problems in dropped.items() for problem in problems]


def test_views_that_shrink_are_judged_whole_too(tmp_path):
    """Halved, they are smaller than what can be judged."""
    source = write_lerobot(tmp_path / "source", np.zeros((5, 3)), np.zeros((5, 3)), [2])
    for stated, expected in ((0, 3), (1.5, 0)):
        options = import_config(source, tmp_path, rig={**AS_THEY_ARE, "vertical_misalignment_px": stated})
        rig = read_rig(Path(options.config))
        finding = check_episode(open_lerobot(options, rig), rig, "episode 0")
        assert rig.stored_misalignment_px == stated / 2
        assert [line.split(":")[0] for line in finding.problems] == ["frame 0", "frame 2", "frame 4"][:expected]
        for line in finding.problems:
            assert "not rectified: matching points lie 2.0 rows apart" in line
            assert line.endswith("at most 0.8 are allowed, before crop and resize")
