"""sharing.leaks and sharing.folders: no secret and no path of this machine gets into what is sent."""

import json
import random
import re
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from house import ROOT
from PIL import Image
from safetensors.torch import save_file
from secrets_in_containers import CONTAINERS, FORMS, secrets

from stereovla.sharing.folders import check_folder, public_datasets, published_files, replacements, staged
from stereovla.sharing.leaks import find_leaks


def letters(count: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Made up here, so that this file holds nothing that looks like a secret."""
    return "".join(random.Random(0).choices(alphabet, k=count))


SECRETS = {
    "a Hugging Face token": "hf" + "_" + letters(34),
    "an AWS access key": "AK" + "IA" + letters(16, string.ascii_uppercase + string.digits),
    "an AWS secret key": "aws_secret" + "_access_key = " + letters(40),
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
    "a GitHub token": "gh" + "p_" + letters(36),
    "an API key": "sk" + "-" + letters(40),
    "a home folder": "/home" + "/someone/data",
}
HARMLESS = """
hf_hub_download("hf_internal/model"), task-specific-masks-of-objects-and-robots-in-scenes, https://host/home/page,
AKIA, tests/home/x, ghp_short, "/", '/no/such/folder/of/this/machine', -----BEGIN CERTIFICATE-----, sk-learn
"""


def test_parquet_that_declares_too_much_is_not_searched(tmp_path):
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 1100, pa.int32()), pa.array(["x" * 2**20]))
    pq.write_table(pa.table({"a": texts}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    (leak,) = find_leaks(tmp_path)
    assert re.match(r"a.parquet: its \d+ bytes declare 115\d{7} or more to be read, in 1100 rows", leak)


@pytest.mark.parametrize("what", SECRETS)
def test_secrets_are_found_in_every_file_and_not_repeated(what, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/notes.md").write_text(f"first\nsecond {SECRETS[what]}\n")
    save_file({"a": torch.zeros(9)}, tmp_path / "model.safetensors", metadata={"origin": SECRETS[what]})
    leaks = find_leaks(tmp_path)
    assert leaks == [f"model.safetensors, line 1: {what}", f"sub/notes.md, line 2: {what}"]
    assert SECRETS[what] not in "".join(leaks)


def test_what_only_looks_like_a_secret_passes(tmp_path):
    (tmp_path / "code.py").write_text(HARMLESS)
    (tmp_path / "empty").touch()
    (tmp_path / "weights.safetensors").write_bytes(random.Random(0).randbytes(2_000_000))
    assert find_leaks(tmp_path) == []


INNOCENT = (
    *('"/usr/bin/python3"', "'/dev/null'", '"/etc/hosts"', '"/var/log/lastlog"', "#!/bin/sh", '"/proc/self/status"'),
    *('href="/home/page"', "cd /home/user/data", '"/Users/you/data"', "https://user@host/x", "ssh://git@host/a/b.git"),
    *("postgres://user:password@localhost/db", "https://$USER:$PASS@host/x", "AKIAIOSFODNN7" + "EXAMPLE"),
    *('api_key = os.environ["OPENAI_API_KEY"]', "def login(password: str, token: str | None = None): ..."),
    *("HF_TOKEN=hf_" + "x" * 34, 'token: "<your token>"', 'password = "changeme-changeme-1"', "password: ********"),
    *('{"eos_token": "<|endoftext|>", "token_type_ids": 0}', '"tokenizer_class": "PreTrainedTokenizerFast"'),
    *("secret_access_key=YOUR_SECRET_KEY_0123", "Authorization: Bearer $TOKEN", "-----BEGIN PUBLIC KEY-----"),
    *("sha256: " + "0123456789abcdef" * 4, "123e4567-e89b-12d3-a456-426614174000", "revision=" + "0a1b2c3d4e" * 4),
    *('"weight_map": {"model.layers.0.q.weight": "model-00001-of-00002.safetensors"}', "sk-learn, task-specific-masks"),
    *("data:image/png;base64," + "iVBORw0KGgo" * 20, 'integrity="sha512-' + "Ab3/" * 21 + '=="'),
)


@pytest.mark.parametrize("text", INNOCENT)
def test_no_innocent_text_is_stopped(tmp_path, text):
    (tmp_path / "README.md").write_text(f"first\n{text}\n")
    assert find_leaks(tmp_path) == []


def test_paths_of_this_machine_are_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"a": 1, "from": str(tmp_path)}, indent=1))
    assert find_leaks(tmp_path) == [f"config.json, line 3: a path of this machine, {tmp_path}"]


def trained(folder: Path, dataset: list[str], model: str | None = None) -> Path:
    options = {"dataset": dataset, "model": model, "output_dir": str(folder), "steps": 3}
    folder.mkdir(exist_ok=True)
    (folder / "training.json").write_text(json.dumps({"options": options}))
    (folder / "config.json").write_text("{}")
    return folder


def test_training_names_no_folders(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    folder = trained(tmp_path / "m", [f"{data}=0.3", "someone/else@v1"], str(tmp_path))
    sent = json.loads(replacements(folder, "model", None, [])["training.json"])["options"]
    assert sent == {"dataset": ["data", "someone/else@v1"], "model": tmp_path.name, "steps": 3}
    assert public_datasets(sent | {"dataset": [str(data)]}, ["me/data"]) == ["me/data"]
    with pytest.raises(ValueError, match="--dataset_ids has 1 ids; the model was trained on 2 folders"):
        public_datasets({"dataset": [f"{data}=1", f"{tmp_path}=2"]}, ["me/data"])


def test_an_adapters_base_must_be_on_the_hub(tmp_path):
    folder = trained(tmp_path / "a", ["me/data"], str(tmp_path))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "r": 2}))
    with pytest.raises(ValueError, match="a folder that only this machine has; publish it and give its id"):
        replacements(folder, "adapter", None, [])
    with staged(folder, replacements(folder, "adapter", "me/policy", [])) as staging:
        sent = json.loads((staging / "adapter_config.json").read_text())
        assert sent == {"base_model_name_or_path": "me/policy", "r": 2} and find_leaks(staging) == []
    assert str(tmp_path) in (folder / "adapter_config.json").read_text()  # here the base stays where it is


OTHERS = (
    *(".git/config", "__pycache__/a.pyc", ".a.tmp", "id_rsa", "sub/.env", ".env", ".netrc", "optimizer.pt"),
    *("weights.PKL", "data.h5", "notes.md", "wandb/run.log", "events.out.tfevents.1", "script.py", "data/a.parquet"),
)


def model_folder(folder: Path) -> Path:
    """With code that the config names, which imports more, and everything that does not belong there."""
    config = {"auto_map": {"AutoModel": "modeling_a.Model"}, "text": {"auto_map": {"AutoConfig": "x--config_a.A"}}}
    ours = {
        "config.json": json.dumps(config),
        "modeling_a.py": "from .parts_a import x\nimport torch\n",
        "parts_a.py": "",
        "config_a.py": "",
    }
    written = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", ".eval_results/stereovla.yaml")
    ours |= dict.fromkeys((*written, "images/sample.png", "README.md", "training.json"), "")
    for name, text in (ours | dict.fromkeys(OTHERS, "")).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_only_what_the_project_writes_is_published(tmp_path):
    sent, left = published_files(model_folder(tmp_path))
    assert left == sorted(OTHERS) and "parts_a.py" in sent and "config_a.py" in sent and len(sent) == 10


def test_more_is_published_where_it_is_named(tmp_path):
    sent, _ = published_files(model_folder(tmp_path))
    assert published_files(tmp_path, ["notes.md", "*.log"])[0] == sorted([*sent, "notes.md", "wandb/run.log"])
    assert published_files(tmp_path, [".env"])[0] == sorted([*sent, ".env"])
    with pytest.raises(ValueError, match=r"--include '\*/.env' finds no file in .*; hidden files are named in full"):
        published_files(tmp_path, ["*/.env"])
    for name in ("optimizer.pt", "weights.PKL", "*.h5"):
        with pytest.raises(ValueError, match="loading these may run code"):
            published_files(tmp_path, [name])


def test_links_do_not_lead_out_of_what_is_published(tmp_path):
    (tmp_path / "secret").write_text("x")
    folder = model_folder(tmp_path / "model")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to("notes.md")
    assert "README.md" in published_files(folder)[0]
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match="'README.md' in .* is a link to .*secret, outside of it"):
        published_files(folder)


def test_folders_that_are_not_whole_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"lacks config.json \(a model\)"):
        check_folder(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(FileNotFoundError, match="no complete adapter: it lacks adapter_model.safetensors, processor"):
        check_folder(tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_secret_is_found_in_every_container(tmp_path, container):
    token = secrets(1, seed=3)[0]
    CONTAINERS[container](tmp_path / container, token)
    leaks = find_leaks(tmp_path)
    assert leaks and token not in "".join(leaks)
    (tmp_path / container).unlink()
    CONTAINERS[container](tmp_path / container, "nothing of worth")
    closed = container.startswith(("a.txt.gz", "a.bz2", "a.xz", "a.zip", "renamed", "a.tar", "a.h5", "events"))
    assert [line for line in find_leaks(tmp_path) if "cannot be searched" not in line] == []
    assert bool(find_leaks(tmp_path)) == closed


@pytest.mark.parametrize("form", range(len(FORMS)))
def test_every_kind_of_secret_is_found(tmp_path, form):
    for seed in range(5):
        (tmp_path / "a.md").write_text(f"it is {secrets(form + 1, seed)[form]}\n")
        assert len(find_leaks(tmp_path)) >= 1, FORMS[form]


def test_secrets_in_weights_are_found_wherever_they_lie(tmp_path, monkeypatch):
    """Weights are searched slice by slice, which overlap."""
    monkeypatch.setattr("stereovla.sharing.leaks.SLICE", 1000)
    monkeypatch.setattr("stereovla.sharing.leaks.OVERLAP", 100)
    token = "gsk" + "_" + letters(52)  # of a kind that only Kingfisher knows
    for place in (300, 870, 899, 950, 1000, 2650):
        content = bytearray(b"\0\n\0\0" * 700)
        content[place : place + 58] = f"\0{token} \0".encode()
        (tmp_path / "a.safetensors").write_bytes(bytes(content))
        line = content[: place + 1].count(b"\n") + 1
        assert find_leaks(tmp_path) == [
            f"a.safetensors, line {line}: a secret, by the rule betterleaks.groq-api-key"
        ], place


def test_secrets_in_names_are_found_and_not_repeated(tmp_path):
    token = secrets(1, seed=4)[0]
    (tmp_path / f"{token}.md").write_text("x")
    assert find_leaks(tmp_path) == ["the name of file number 1 in the order of names: a Hugging Face token"]


@pytest.mark.slow
def test_200_secrets_are_found_in_every_container(tmp_path):
    missed, count = [], 0
    for number, token in enumerate(secrets(200, seed=5)):
        for container, write in CONTAINERS.items():
            write(tmp_path / container, token)
            missed += [] if find_leaks(tmp_path) else [(number, container)]
            count += 1
            (tmp_path / container).unlink()
    assert not missed, f"{len(missed)} of {count} missed: {missed[:20]}"


def test_films_are_looked_into_and_those_of_rollouts_pass(tmp_path):
    (tmp_path / "rollout.gif").write_bytes((ROOT / "docs/images/rollout.gif").read_bytes())
    assert find_leaks(tmp_path) == []
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    secret = SECRETS["a Hugging Face token"]
    frames[0].save(tmp_path / "rollout.gif", save_all=True, append_images=frames[1:], comment=secret.encode())
    assert "rollout.gif" in str(find_leaks(tmp_path))
