"""`stereovla push` of an export in LeRobot's format: it comes whole, with the tag that LeRobot looks for."""

import json
import shutil

import pytest
from command_lines import data
from hub_client import client
from hub_server import serve
from huggingface_hub import DatasetCard
from lerobot_folder import WRITTEN, import_config, import_folder

from stereovla.sharing.folders import check_folder, published_files

NAME = "someone/demonstrations-lerobot"
PUSH = "import sys; from stereovla.__main__ import main; sys.exit(main(['push', *sys.argv[1:]]))"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lerobot")
    imported = import_folder(import_config(WRITTEN, folder, validation_episodes=1))
    assert data(["export", "lerobot", "--dataset", str(imported), "--out", str(folder / "exported")]) == 0
    return folder / "exported"


def test_an_export_is_published_and_published_again(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "exported")
    (folder / "notes.txt").write_text("mine")
    command = ["--folder", str(folder), "--repo_id", NAME, "--license", "mit"]
    with serve() as hub, client(hub.url, tmp_path / "ours", ours=True) as ours:
        done = ours.run(PUSH, *command)
        assert "loads from the Hub by load_dataset, streaming; first rows of train compared" in done.stdout
        repo = hub.repos["dataset", NAME]
        files = repo.files()
        here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert files.keys() - {".gitattributes"} == here.keys() - {"notes.txt"}
        assert all(files[name] == path.read_bytes() for name, path in here.items() if name in files)
        assert repo.tags == {"v3.0": repo.heads["main"]}  # the revision that LeRobot reads
        assert f'LeRobotDataset("{NAME}")' in files["README.md"].decode()

        card = folder / "README.md"
        card.write_text(card.read_text() + "\nRecorded in the cellar.\n")
        ours.run(PUSH, *command)
        assert "in the cellar" in DatasetCard(hub.repos["dataset", NAME].files()["README.md"].decode()).text
        assert repo.tags == {"v3.0": repo.heads["main"]} and len(repo.commits) == 3

        done = ours.run(PUSH, *command[:-1], "apache-2.0", check=False)
        assert done.returncode == 2 and "the license is 'apache-2.0'; " in done.stderr and "says 'mit'" in done.stderr


def test_what_is_not_whole_is_named(exported, tmp_path):
    assert check_folder(exported) == "lerobot dataset"
    assert published_files(exported)[1] == []
    folder = shutil.copytree(exported, tmp_path / "broken")
    video = next(folder.glob("videos/observation.images.right/*/*.mp4"))
    video.unlink()
    with pytest.raises(ValueError, match=r"videos/observation.images.right/chunk-000/file-\d+.mp4, .* is missing"):
        check_folder(folder)
    info = folder / "meta/info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "total_frames": 17}))
    with pytest.raises(ValueError, match=r"info.json: total_frames is 17, but meta/episodes has 18"):
        check_folder(folder)
