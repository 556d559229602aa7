"""`push --space` against a Hub on this machine: what is sent, that it runs as it was sent, that all it needs is in."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gradio_client import Client, handle_file
from house import ROOT, file_graph, imported_names, sources
from hub_client import environment
from hub_server import serve
from synthetic_dataset import write_finished_dataset
from tiny_checkpoint import save_tiny_checkpoint

from stereovla.sharing.space import CODE, LIBRARIES, PACKAGES, SCRIPTS, space_card
from stereovla.simulation.rendering import EGL_HELP

PATIENCE_S = 300  # a busy machine is no fault of a test
MODEL, SPACE, DATA = "someone/policy", "someone/policy-page", "someone/data"


def page_files() -> set[Path]:
    """The files of ours that the page may come to import: not LIBERO, whose world it does not offer."""
    found, todo = set(), [path for path in sources() if path.is_relative_to(ROOT / "app")]
    while todo:
        path = todo.pop()
        if path not in found and not path.is_relative_to(ROOT / "simulation/libero"):
            found.add(path)
            todo += [*file_graph()[path], *(up / "__init__.py" for up in path.parents if up.is_relative_to(ROOT))]
    return found


def test_all_that_the_page_imports_travels_and_is_installed():
    sent = {path for pattern in CODE for path in ROOT.glob(pattern) if path.name not in SCRIPTS}
    files = page_files()
    assert files <= sent, sorted(path.name for path in files - sent)
    owners = importlib.metadata.packages_distributions()
    foreign = {name.partition(".")[0] for path in files for name in imported_names(path)}
    foreign -= {"stereovla", *sys.stdlib_module_names}
    named = {name.lower().replace("_", "-") for name in PACKAGES} | {"gradio", "fastapi", "uvicorn"}
    missing = {name for name in foreign if not named & {owner.lower().replace("_", "-") for owner in owners[name]}}
    assert not missing, f"sharing/space.py does not name {missing}"
    assert all(library in EGL_HELP for library in LIBRARIES)


def test_what_people_wrote_into_the_card_of_a_space_stays():
    first = space_card(MODEL, [DATA], "mit", None)
    _, head, text = first.split("---")
    assert text.strip().startswith("# policy: a look inside")
    header = yaml.safe_load(head)
    assert header["title"] == "policy: a look inside" and header["models"] == [MODEL] and header["datasets"] == [DATA]
    assert (header["sdk"], header["sdk_version"]) == ("gradio", importlib.metadata.version("gradio"))
    edited = first.replace("policy: a look inside", "My arm").replace("Written by", "Mine. Written by")
    edited = edited.replace(f"sdk_version: {header['sdk_version']}", "sdk_version: 5.0.0")
    again = space_card("someone/better", [], "mit", edited)
    told = yaml.safe_load(again.split("---")[1])
    assert (told["title"], told["models"], told["sdk_version"]) == ("My arm", ["someone/better"], header["sdk_version"])
    assert "Mine. Written by" in again


@pytest.mark.slow
def test_a_space_is_published_and_runs_as_it_was_sent(tmp_path):
    """Its own folder is where the running page has its code from; the model comes from the Hub."""
    save_tiny_checkpoint(tmp_path / "model")
    write_finished_dataset(tmp_path / "data")
    with serve() as hub:
        hub.add("model", MODEL, tmp_path / "model")
        hub.add("dataset", DATA, tmp_path / "data")
        given = environment(hub.url, tmp_path / "home")
        program = (
            "import sys; from pathlib import Path; from stereovla.sharing.repository import Repository\n"
            "from stereovla.sharing.space import write_space\n"
            "repository, page = Repository(sys.argv[1], 'space'), Path(sys.argv[2])\n"
            "page.mkdir(); write_space(page, sys.argv[3], [sys.argv[4]], 'mit', repository.state().card)\n"
            "state = repository.create(private=True)\n"
            "print(repository.page, repository.send(page, state, 'Show', pull_request=False)[1])\n"
            "assert not repository.changes(page, repository.files('main')), 'not as it was sent'\n"
            "from huggingface_hub import snapshot_download\n"
            "snapshot_download(sys.argv[1], repo_type='space', local_dir=sys.argv[5])\n"
        )
        told = [SPACE, str(tmp_path / "written"), MODEL, DATA, str(tmp_path / "space")]
        done = subprocess.run([sys.executable, "-c", program, *told], env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"{hub.url}/spaces/{SPACE} ") and hub.repos["space", SPACE].private
        page = tmp_path / "space"
        needs = (page / "requirements.txt").read_text().splitlines()
        assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in needs) and len(needs) == len(PACKAGES)
        kept = {name: value for name, value in given.items() if name != "PYTHONPATH"}
        port = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": "0"}
        # the folder first, so that it is this package which is imported wherever another is installed
        started = (
            "import runpy, sys; sys.path.insert(0, ''); import stereovla; print(stereovla.__file__)\n"
            "runpy.run_path('app.py', run_name='__main__')"
        )
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", started], cwd=page, env=kept | port, stdout=subprocess.PIPE, text=True
        )
        try:
            code = process.stdout.readline().strip()
            assert Path(page, code).resolve().is_relative_to(page.resolve()), code
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://127[\d.:]+", line)))
            client = Client(url, verbose=False, httpx_kwargs={"timeout": PATIENCE_S})
            left, right, *fields = client.predict(DATA, "validation", 0, 1, api_name="/take")
            answer = client.predict(handle_file(left), handle_file(right), *fields, 0, api_name="/look")
            assert "for a chunk of 8 actions" in answer[-2]
            told = client.predict(1, api_name="/begin")[1]
            assert told.startswith("0.0 s")
        finally:
            process.terminate()
            process.wait(PATIENCE_S)
