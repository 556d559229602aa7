"""A policy goes to the Hub and comes back, by LeRobot's own command and against a Hub on this machine."""

import subprocess
import sys

from hub_client import environment
from hub_server import serve
from written_data import ID, VIEWS, WRITTEN

NAME = "someone/policy"
# LeRobot has its card checked at an address that no setting changes
PROGRAM = """
from huggingface_hub.repocard import RepoCard
from lerobot.scripts.lerobot_train import main
RepoCard.validate = lambda self, repo_type=None: None
main()
"""
TRAIN = [sys.executable, "-c", PROGRAM, f"--dataset.repo_id={ID}", f"--dataset.root={WRITTEN}"]
TRAIN += ["--batch_size=2", "--num_workers=0", "--steps=1", "--env_eval_freq=0", "--policy.device=cpu"]


def train(hub, home, *options):
    return subprocess.run(
        [*TRAIN, *options], env=environment(hub.url, home), capture_output=True, text=True, check=False
    )


def test_there_and_back(models, tmp_path):
    views = ", ".join(f"{view}: {key}" for view, key in VIEWS.items())
    model = ["--policy.type=depthvla", f"--policy.pretrained_model={models['depthvla']}", f"--policy.views={{{views}}}"]
    with serve() as hub:
        pushed = [f"--policy.repo_id={NAME}", "--policy.run_code=true", f"--output_dir={tmp_path / 'first'}"]
        done = train(hub, tmp_path / "ours", *model, *pushed)
        assert done.returncode == 0, done.stderr[-3000:]
        files, folder = hub.repos["model", NAME].files(), tmp_path / "first/checkpoints/last/pretrained_model"
        here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        assert {name for name in here if name.startswith("model/")} <= files.keys()  # the code too
        for name, path in here.items():
            if name.startswith("model/"):
                assert files[name] == path.read_bytes(), name

        again = [f"--policy.path={NAME}", "--policy.push_to_hub=false"]
        done = train(
            hub, tmp_path / "stranger", *again, "--policy.run_code=true", f"--output_dir={tmp_path / 'second'}"
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / "second/checkpoints/last/pretrained_model/model/model.safetensors").is_file()
