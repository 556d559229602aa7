"""push_to_hub.py against a Hub on this machine: what is sent, that it comes whole or not at all, who can use it."""

import copy
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from hub_client import client
from hub_server import Blob, cut, lost, serve
from safetensors.torch import load_file
from synthetic_dataset import write_finished_dataset
from views_dataset import MONO, write_views

from stereovla.command_line import parse
from stereovla.push_to_hub import PushOptions, check_and_publish, consent_to_code, write_card
from stereovla.sharing.fresh_load import check_fresh_load
from stereovla.sources import remote_code
from stereovla.train import TrainingOptions, train

MODEL, ADAPTER, DATA = "someone/policy", "someone/policy-other-arm", "someone/demonstrations"
SPACE = "someone/policy-page"
COMMAND = "import sys; from stereovla.__main__ import main; sys.exit(main(['push', *sys.argv[1:]]))"
# a push without the loads, which are the same for every fault; the calls are those of push_to_hub.publish
SEND = """
import sys
from pathlib import Path
from stereovla.push_to_hub import Repository, replacements, staged
folder, repo_id, kind, tag, base = sys.argv[1:]
repository = Repository(repo_id, kind)
state = repository.state()
with staged(Path(folder), replacements(Path(folder), kind, base or None, [])) as staging:
    if state.head is None:
        state = repository.create(private=True)
    commit, revision, url = repository.send(staging, state, "Upload", tag == "pull request")
    assert not repository.changes(staging, repository.files(revision))
if tag not in ("", "pull request"):
    repository.tag(tag, commit)
print(url)
"""
LOAD = """
import importlib.util, json, sys
assert not importlib.util.find_spec("modeling_stereovla") and not importlib.util.find_spec("processing")
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor
source, reference, options = sys.argv[1], load_file(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModel.from_pretrained(source, trust_remote_code=True, **options).eval()
processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
inputs = processor(images=[reference["left"].numpy(), reference["right"].numpy()], text="pick up the red cube",
                   state=reference["state"].numpy(), embodiment=sys.argv[4])
actions = processor.decode_actions(model.predict_action(**inputs, noise=reference["noise"]), embodiment=sys.argv[4])
assert "stereovla" not in sys.modules
print(json.dumps(float(abs(actions - reference["actions"].numpy()).max())))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """`data`, `other` (of another arm), `run/model` and its adapter `lora/model`, as the commands leave them."""
    home = tmp_path_factory.mktemp("folders")
    common = ["--preset", "tiny", "--steps", "2", "--batch_size", "2", "--validation_batches", "0"]
    common += ["--pool_episodes", "1", "--learning_rate", "0.02", "--warmup_steps", "1"]
    write_finished_dataset(home / "data")
    write_finished_dataset(home / "other", "other_arm")
    lora = ["--model", str(home / "run/model"), "--lora_rank", "2"]
    for name, data, own in (("run", "data", []), ("lora", "other", lora)):
        train(
            parse(
                TrainingOptions,
                "train.py",
                [*common, "--dataset", str(home / data), "--output_dir", str(home / name), *own],
            )
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        write_card(
            home / name / "model", "adapter" if own else "model", options(base_model=MODEL if own else None), None
        )
    return home


def options(**given) -> PushOptions:
    return PushOptions(folder="", license="apache-2.0", dry_run=True, **given)


@pytest.fixture
def copied(folders, tmp_path) -> Path:
    """The same, to be changed."""
    return shutil.copytree(folders, tmp_path / "folders")


@pytest.fixture(scope="module")
def server():
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def processes(server, tmp_path_factory):
    """(with this project, without it)"""
    home = tmp_path_factory.mktemp("clients")
    with client(server.url, home / "ours", True) as ours, client(server.url, home / "stranger", False) as stranger:
        yield ours, stranger


@pytest.fixture
def hub(server, processes):
    server.reset()
    for process in processes:
        shutil.rmtree(process.folder / "home", ignore_errors=True)
    return server


@pytest.fixture
def ours(processes):
    return processes[0]


@pytest.fixture
def stranger(processes):
    return processes[1]


def difference(stranger, name: str, folder: Path, embodiment: str = "franka_panda", **options) -> float:
    """How far the actions that a stranger gets are from those of the trained model."""
    reference = str(folder / "reference_prediction.safetensors")
    return json.loads(stranger.run(LOAD, name, reference, json.dumps(options), embodiment).stdout.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_is_published_whole(hub, ours, stranger, folders, copied):
    folder, arguments = copied / "run/model", ["--repo_id", MODEL, "--license", "apache-2.0", "--tag", "v1"]
    done = ours.run(COMMAND, "--folder", str(folder), *arguments)
    repo = hub.repos["model", MODEL]
    assert repo.private and f"{hub.url}/{MODEL}/commit/{repo.heads['main']}" in done.stdout
    assert repo.tags == {"v1": repo.heads["main"]} and len(repo.commits) == 2
    sent, there = repo.files(), contents(folder)
    assert sent.keys() - {".gitattributes"} == there.keys()
    assert {name for name in there if sent[name] != there[name]} == {"training.json"}
    assert json.loads(sent["training.json"])["options"]["dataset"] == ["data"]
    assert str(copied).encode() not in b"".join(sent.values())
    assert "loads from the Hub by the Auto classes; largest difference" in done.stdout
    again = [SEND, str(folder), MODEL, "model", "", ""]
    assert repo.heads["main"] in ours.run(*again).stdout and len(repo.commits) == 2  # nothing is sent twice
    (folder / "README.md").write_text(f"{sent['README.md'].decode()}\nMore.\n")
    ours.run(*again)
    assert repo.tags["v1"] != repo.heads["main"] and repo.files("v1") == sent


# a push's Space without the model's loads; the calls are those of push_to_hub.check_and_publish
SEND_SPACE = """
import sys, tempfile
from pathlib import Path
from stereovla.push_to_hub import PushOptions, prepare_space, publish_space
folder, repo_id, space, dataset = sys.argv[1:]
options = PushOptions(folder, "mit", repo_id, dataset_ids=[dataset], space=space)
with tempfile.TemporaryDirectory() as page:
    publish_space(Path(page), *prepare_space(Path(page), Path(folder), options), options)
"""


def test_a_space_is_published_beside_its_model(hub, ours, folders, copied):
    folder = str(copied / "run/model")
    hub.add("dataset", DATA, folders / "data")
    command = ["--folder", folder, "--repo_id", MODEL, "--license", "mit", "--dataset_ids", DATA, "--space", SPACE]
    done = ours.run(COMMAND, *command)
    assert f"Space {SPACE}: {hub.url}/spaces/{SPACE}" in done.stdout
    repo = hub.repos["space", SPACE]
    assert repo.private and hub.repos["model", MODEL].private
    sent = repo.files()
    written = {"README.md", "app.py", "packages.txt", "requirements.txt"}
    assert {name for name in sent if "/" not in name} == written | {".gitattributes"}
    assert f'model="{MODEL}"'.encode() in sent["app.py"] and f'dataset=["{DATA}"]'.encode() in sent["app.py"]
    assert str(copied).encode() not in b"".join(sent.values())
    again = [SEND_SPACE, folder, MODEL, SPACE, DATA]
    # of an earlier version of the page
    repo.commit("main", repo.commits[repo.sha("main")] | {"stereovla/old.py": Blob(b"x = 1", False)})
    ours.run(*again)
    assert repo.files() == sent
    before = len(repo.commits)
    ours.run(*again)
    assert len(repo.commits) == before  # nothing is sent twice
    repo.private = False
    assert f"the Space {SPACE} is public, this push is private" in ours.run(*again, check=False).stderr
    assert len(repo.commits) == before


def test_a_space_that_cannot_be_is_told_before_anything_is_sent(folders):
    with pytest.raises(ValueError, match="--space shows what --repo_id has on its main branch"):
        options(space=SPACE, repo_id=MODEL, pull_request=True)
    with pytest.raises(ValueError, match="give that, and no --pull_request"):
        options(space=SPACE)
    with pytest.raises(ValueError, match="--space is 'no id at all'; an id on the Hub has the form"):
        options(space="no id at all", repo_id=MODEL)
    dataset = PushOptions(str(folders / "data"), "mit", DATA, space=SPACE, dry_run=True)
    with pytest.raises(ValueError, match="is a dataset; a Space shows a model or an adapter"):
        check_and_publish(dataset)


def test_strangers_use_model_and_adapter(hub, ours, stranger, folders):
    model, adapter = folders / "run/model", folders / "lora/model"
    ours.run(SEND, str(model), MODEL, "model", "v1", "")
    ours.run(SEND, str(adapter), ADAPTER, "adapter", "v1", MODEL)
    hub.requests.clear()
    assert difference(stranger, MODEL, model) < 1e-4
    fetched = hub.reads()
    assert "model.safetensors" in fetched
    assert not fetched & {"README.md", "training.json", "reference_prediction.safetensors"}, fetched
    assert difference(stranger, ADAPTER, adapter, "other_arm") < 1e-4
    # the adapter makes a difference: the base gives other actions, if it takes the other arm at all
    recorded = load_file(adapter / "reference_prediction.safetensors")["actions"]
    assert abs(recorded - load_file(model / "reference_prediction.safetensors")["actions"]).max() > 1e-3


def test_strangers_use_a_depthvla_by_the_code_of_its_card(hub, ours, stranger, tmp_path):
    """Of two cameras, and shown the depth."""
    write_views(tmp_path / "data", [3, 4], without=MONO)
    common = ["--preset", "depthvla-tiny", "--steps", "2", "--batch_size", "2", "--validation_batches", "0"]
    common += ["--pool_episodes", "1", "--dataset", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run")]
    own = ["--views", "left,wrist", "--depth_input", "depth"]
    train(parse(TrainingOptions, "train.py", [*common, *own]))
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path / "run/model"
    recorded = load_file(folder / "reference_prediction.safetensors")
    assert recorded.keys() - {"state", "noise", "actions"} == {"left", "view.wrist", "depth", "depth.wrist"}
    write_card(folder, "model", options(repo_id=MODEL), None)
    assert check_fresh_load(str(folder), folder / "reference_prediction.safetensors") < 1e-4
    ours.run(SEND, str(folder), MODEL, "model", "", "")
    card = hub.repos["model", MODEL].files()["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    snippet = snippet.replace("**inputs", '**inputs, noise=recorded["noise"]')
    done = stranger.run(f"{snippet}\nprint(float(abs(actions - sample['actions']).max()))")
    assert float(done.stdout.splitlines()[-1]) < 1e-4


def test_a_pinned_revision_has_its_own_code_and_weights(hub, ours, stranger, copied):
    model, adapter = copied / "run/model", copied / "lora/model"
    ours.run(SEND, str(model), MODEL, "model", "v1", "")
    ours.run(SEND, str(adapter), ADAPTER, "adapter", "v1", MODEL)
    for folder in (model, adapter):  # later revisions that do not even run
        for name in ("modeling_stereovla.py", "processing_stereovla.py"):
            if (folder / name).exists():
                (folder / name).write_text("raise RuntimeError('the code of another revision')\n")
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    ours.run(SEND, str(adapter), ADAPTER, "adapter", "", MODEL)
    pins = {"adapter_kwargs": {"revision": "v1"}}
    program = LOAD.replace(
        "AutoProcessor.from_pretrained(source, ", 'AutoProcessor.from_pretrained(source, revision="v1", '
    )
    reference = str(adapter / "reference_prediction.safetensors")
    done = stranger.run(program, ADAPTER, reference, json.dumps(pins), "other_arm")
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-4
    ours.run(SEND, str(model), MODEL, "model", "", "")
    reference = str(model / "reference_prediction.safetensors")
    done = stranger.run(program, MODEL, reference, json.dumps({"revision": "v1"}), "franka_panda")
    assert json.loads(done.stdout.splitlines()[-1]) < 1e-4
    broken = stranger.run(LOAD, MODEL, reference, "{}", "franka_panda", check=False)
    assert "the code of another revision" in broken.stderr


FRESH = """
import sys
from pathlib import Path
from stereovla.sharing.fresh_load import check_fresh_load
print(check_fresh_load(sys.argv[1], Path(sys.argv[2]), *(word or None for word in sys.argv[3:])))
"""


@pytest.mark.slow
def test_the_base_of_an_adapter_is_loaded_at_the_revision_that_was_looked_at(hub, ours, copied):
    """In the folder and from the Hub, though there is a later one."""
    model, adapter = copied / "run/model", copied / "lora/model"
    ours.run(SEND, str(model), MODEL, "model", "", "")
    ours.run(SEND, str(adapter), ADAPTER, "adapter", "", MODEL)
    looked_at = hub.repos["model", MODEL].heads["main"]
    (model / "modeling_stereovla.py").write_text("raise RuntimeError('the code of another revision')\n")
    ours.run(SEND, str(model), MODEL, "model", "", "")
    reference = str(adapter / "reference_prediction.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": MODEL}))
    for source, revision in ((str(adapter), ""), (ADAPTER, hub.repos["model", ADAPTER].heads["main"])):
        assert float(ours.run(FRESH, source, reference, revision, looked_at).stdout.splitlines()[-1]) < 1e-4
    broken = ours.run(FRESH, str(adapter), reference, check=False)
    assert "the code of another revision" in broken.stderr


def test_other_code_of_an_adapters_base_is_not_run_without_asking(hub, ours, copied):
    model, ran = copied / "run/model", ours.folder / "ran"
    code = model / "modeling_stereovla.py"
    code.write_text(code.read_text() + f"\nopen({str(ran)!r}, 'w').close()\n")
    commit = hub.add("model", MODEL, model).heads["main"]
    command = ["--folder", str(copied / "lora/model"), "--license", "mit", "--dry_run", "--base_model", MODEL]
    done = ours.run(COMMAND, *command, check=False)
    place = f"{MODEL} on the Hub, which it changes, at revision {commit}"
    assert done.returncode == 2 and f"{place} has code of its own, modeling_stereovla.py: read it" in done.stderr
    told = f"loading runs code of {place} on this machine: {len(remote_code(model))} files, not as in this installation"
    assert f"{told}: modeling_stereovla.py\n" in done.stdout and not ran.exists()
    ours.run(COMMAND, *command, "--run_code")
    assert ran.exists()


def test_strangers_stream_a_dataset_and_fetch_nothing_else(hub, ours, stranger, folders):
    ours.run(SEND, str(folders / "data"), DATA, "dataset", "v1", "")
    hub.requests.clear()
    program = f"""
from datasets import load_dataset
rows = list(load_dataset({DATA!r}, split="validation", streaming=True))
print(len(rows), rows[0]["task"], rows[0]["observation.images.left"].size)
"""
    assert stranger.run(program).stdout.splitlines()[-1] == "3 pick up the red cube (64, 64)"
    assert hub.reads() - {"README.md"} == {"data/validation-00000-of-00001.parquet"}
    hub.requests.clear()
    stranger.run(f"""
from datasets import load_dataset
print(next(iter(load_dataset({DATA!r}, split="train", streaming=True)))["task"])
""")
    assert hub.reads() - {"README.md"} == {"data/train-00000-of-00002.parquet"}


@pytest.mark.slow
def test_a_push_that_is_killed_at_any_request_is_finished_by_the_same_command(hub, ours, copied):
    folder = copied / "data"
    ours.run(SEND, str(folder), DATA, "dataset", "v1", "")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nA second edition.\n")
    with open(folder / "data/train-00000-of-00002.parquet", "ab") as shard:
        shard.write(b"other bytes")
    (folder / "data/train-00001-of-00002.parquet").unlink()
    new = contents(folder)
    command = [SEND, str(folder), DATA, "dataset", "v2", ""]
    before, large = copy.deepcopy(hub.repos), dict(hub.large)
    old = hub.repos["dataset", DATA].files()
    requests = hub.requests
    requests.clear()
    ours.run(*command)
    assert hub.repos["dataset", DATA].files() == new | {".gitattributes": old[".gitattributes"]}
    assert {path.rsplit("/", 1)[0].split("/")[-1] for method, path in requests if method in ("POST", "PUT")} >= {
        "preupload", "objects", "lfs", "commit", "tag"
    }  # fmt: skip

    def killed(act, after: bool):
        if after:
            act()
        while not ours.pid:
            time.sleep(0.001)
        os.kill(ours.pid, signal.SIGKILL)

    states = set()
    for number, (method, _) in enumerate(requests, 1):
        for after in (False, True) if method in ("POST", "PUT") else (False,):
            hub.repos, hub.large, hub.requests = copy.deepcopy(before), dict(large), []
            shutil.rmtree(ours.folder / "home")  # what it has fetched, it would not ask for again
            repo = hub.repos["dataset", DATA]
            hub.fault = lambda n, *_, number=number, after=after: (
                (lambda act: killed(act, after)) if n == number else None
            )
            assert ours.run(*command, check=False).returncode == -signal.SIGKILL
            assert repo.files("v1") == old and repo.files() in (old, new | {".gitattributes": old[".gitattributes"]})
            states.add((len(repo.commits), len(repo.tags)))
            hub.fault = None
            ours.run(*command)
            assert repo.files() == new | {".gitattributes": old[".gitattributes"]}
            assert repo.tags["v2"] == repo.heads["main"] and len(repo.commits) == 3 and repo.files("v1") == old
    assert states == {(2, 1), (3, 1), (3, 2)}


def test_what_was_uploaded_before_the_break_is_not_uploaded_again(hub, ours, folders):
    uploads = []

    def fault(number, method, path):
        if method == "PUT":
            uploads.append(path)
            return 403 if len(uploads) == 3 else None

    hub.fault = fault
    command = [SEND, str(folders / "data"), DATA, "dataset", "", ""]
    assert ours.run(*command, check=False).returncode == 1
    ours.run(*command)
    assert len(uploads) >= 4 and len(set(uploads)) >= len(uploads) - 3  # those that were refused, or not yet begun


@pytest.mark.parametrize("way", [429, 503, cut, lost])
def test_passing_faults_of_the_commit_are_waited_for(way, hub, ours, folders):
    commits = []

    def fault(number, method, path):
        if "/commit/" in path:
            commits.append(path)
            return way if len(commits) == 1 else None

    hub.fault = fault
    done = ours.run(SEND, str(folders / "lora/model"), ADAPTER, "adapter", "v1", MODEL)
    repo = hub.repos["model", ADAPTER]
    assert "trying again in 1 s" in done.stdout and len(repo.commits) == 2 and repo.tags == {"v1": repo.heads["main"]}


PROBLEMS = [
    (401, "/api/repos/create", "hf auth login"),
    (403, "/preupload/", "may not write to someone/policy"),
    (404, "/commit/", "see to the name"),
    (409, "/commit/", "give the command again"),
    (412, "/commit/", "someone else has changed"),
]


@pytest.mark.parametrize(("status", "where", "advised"), PROBLEMS)
def test_failures_say_what_to_do(status, where, advised, hub, ours, folders):
    from_main = SEND.replace(
        "import sys\n", "import sys, traceback\nfrom stereovla.sharing.repository import advice\n", 1
    )
    lines = from_main.splitlines()
    program = "\n".join(
        [
            "try:",
            *(f"    {line}" for line in lines),
            "except Exception as error:",
            "    print(advice(error, sys.argv[2]))",
        ]
    )
    hub.fault = lambda number, method, path: status if where in path else None
    done = ours.run(program, str(folders / "lora/model"), MODEL, "adapter", "", MODEL)
    assert f"the Hub answers {status}" in done.stdout and advised in done.stdout


def test_tokens_decide(hub, ours, folders):
    arguments = ["--folder", str(folders / "data"), "--repo_id", DATA, "--license", "apache-2.0", "--dry-run"]
    hub.add("dataset", DATA, folders / "data", private=True)
    for token, told in (("nobody", "hf auth login"), ("reader", None)):
        done = ours.run(COMMAND, *arguments, check=False, HF_TOKEN=token)
        assert (done.returncode, (told or "") in done.stderr) == (2 if told else 0, True), done.stderr
    hub.reset()
    done = ours.run(SEND, str(folders / "data"), DATA, "dataset", "", "", check=False, HF_TOKEN="reader")
    assert done.returncode == 1 and "403" in done.stderr and not hub.repos


def test_a_pull_request_changes_nothing_and_is_opened_once(hub, ours, copied):
    folder, repo = copied / "data", hub.add("dataset", DATA, copied / "data")
    before = repo.files()
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBetter.\n")
    told = []
    hub.fault = lambda number, method, path: lost if "/commit/" in path and not told and not told.append(path) else None
    ours.run(SEND, str(folder), DATA, "dataset", "pull request", "")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nBetter still.\n")
    ours.run(SEND, str(folder), DATA, "dataset", "pull request", "")
    assert repo.files() == before and len(repo.pulls) == 1 and told
    assert repo.files("refs/pr/1") == contents(folder) != before


@pytest.mark.slow
def test_bytes_that_change_on_the_way_are_noticed(hub, ours, copied):
    folder = copied / "lora/model"
    hub.add("model", MODEL, copied / "run/model")
    arguments = [
        "--folder",
        str(folder),
        "--repo_id",
        ADAPTER,
        "--license",
        "mit",
        "--base_model",
        MODEL,
        "--tag",
        "v1",
    ]
    hub.corrupt = {"adapter_model.safetensors"}
    done = ours.run(COMMAND, *arguments, check=False)
    assert done.returncode == 2 and "differ from the trained model's" in done.stderr, done.stderr
    assert not hub.repos["model", ADAPTER].tags  # main has it, but nothing that was checked


def test_code_of_a_folder_is_not_run_without_asking(copied, tmp_path, capsys, monkeypatch):
    folder = copied / "run/model"
    told = PushOptions(folder=str(folder), license="apache-2.0", dry_run=True)
    consent_to_code(folder, None, told)  # the code of this installation
    said = capsys.readouterr().out
    assert re.fullmatch(f"loading runs code of {folder} on this machine: \\d+ files of this installation\n", said)
    code = folder / "modeling_stereovla.py"
    code.write_text(code.read_text() + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ValueError, match="has code of its own, modeling_stereovla.py: read it, then say --run_code"):
        check_and_publish(told)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: "n")
    with pytest.raises(ValueError, match="nothing was run and nothing sent"):
        check_and_publish(told)
    assert not (tmp_path / "ran").exists()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    consent_to_code(folder, None, told)
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked though told"))
    consent_to_code(folder, None, PushOptions(folder="", license="mit", dry_run=True, run_code=True))
