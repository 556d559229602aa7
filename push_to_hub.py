"""Publishes models, adapters and datasets on the Hub: card, checks, upload, load back."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.errors import HTTPError

from stereovla.command_line import execute, option
from stereovla.dataset_builder.dataset import card as dataset_card
from stereovla.dataset_builder.formats import lerobot_card
from stereovla.sharing.folders import (
    DATASETS,
    REFERENCE,
    base_of,
    check_folder,
    lerobot_version,
    public_datasets,
    published_files,
    replacements,
    staged,
)
from stereovla.sharing.fresh_load import check_fresh_load, first_rows
from stereovla.sharing.leaks import find_leaks
from stereovla.sharing.model_card import CardOptions, write_model_card
from stereovla.sharing.repository import Changes, Repository, State, advice
from stereovla.sharing.space import write_space
from stereovla.sources import HUB_ID, Base, changed_code, code_in_words, look_at_base, remote_code


@dataclass
class PushOptions:
    """Publishes a trained model, an adapter or a dataset (also one of LeRobot's format) on the Hub, with its card, and
    loads it back before it says done.

        stereovla push --folder OUTPUT/model --repo_id NAME/MODEL --license apache-2.0 --report REPORT --tag v1
        stereovla push --folder OUTPUT/model --repo_id NAME/MODEL --license apache-2.0 --space NAME/SPACE
        stereovla push --folder ADAPTER --repo_id NAME/ADAPTER --license mit --base_model NAME/MODEL
        stereovla push --folder DATASET --repo_id NAME/DATASET --license cc-by-4.0 --dry_run

    One commit, all of it or nothing; stopped at any moment, the same command goes on. Sent are the files that this
    project writes, and what --include names. Nothing is sent that holds a secret or a path of this machine, or that
    does not load in a fresh process to the outputs of the trained model.
    """

    folder: str = field(metadata={"help": "Model or adapter (OUTPUT/model of train.py), or a dataset's folder."})
    license: str = field(metadata={"help": "Licence of what is published, an identifier of the Hub: apache-2.0, ..."})
    repo_id: str | None = option(None, "Repository on the Hub, NAME/REPOSITORY; made if it is not there.")
    public: bool = option(False, "The repository is public; without this it is private.")
    tag: str | None = option(None, "Name of this revision, such as v1, by which others can pin it.")
    pull_request: bool = option(False, "Open a pull request instead of changing the repository.")
    report: str | None = option(None, "Folder that `stereovla evaluate report` wrote: results of the model's card.")
    dataset_ids: list[str] = field(
        default_factory=list,
        metadata={"help": "Hub ids of the folders that a model was trained on, in their order."},
    )
    base_model: str | None = option(None, "Hub id of the model that the training began with, if that was a folder.")
    weights: list[str] = field(
        default_factory=list,
        metadata={"help": "Licences of the weights of others that a model contains, each NAME=LICENCE."},
    )
    include: list[str] = field(
        default_factory=list,
        metadata={"help": "Further files of the folder to send: their paths in it, or patterns such as 'docs/*.md'."},
    )
    space: str | None = option(
        None, "Also publish a Space, NAME/SPACE, that shows the model or adapter on the page of `stereovla app`."
    )
    run_code: bool = option(
        False, "Run the code, to load the folder, without asking, also where it is not that of this installation."
    )
    dry_run: bool = option(False, "Write the card, check all, show what would be sent, and send nothing.")

    def __post_init__(self):
        if self.repo_id is None and not self.dry_run:
            raise ValueError("--repo_id is needed to upload, such as NAME/REPOSITORY; --dry_run sends nothing")
        for name in ("repo_id", "base_model", "space"):
            value = getattr(self, name)
            if value is not None and not HUB_ID.fullmatch(value):
                raise ValueError(f"--{name} is {value!r}; an id on the Hub has the form NAME/REPOSITORY")
        if self.space and (self.repo_id is None or self.pull_request):
            raise ValueError("--space shows what --repo_id has on its main branch: give that, and no --pull_request")
        if self.tag and self.pull_request:
            raise ValueError("--tag names a revision of the repository; a pull request is tagged once it is merged")
        if wrong := [entry for entry in self.weights if not all(entry.partition("="))]:
            raise ValueError(f"--weights {wrong[0]!r} is not of the form NAME=LICENCE, such as SigLIP=apache-2.0")


def write_card(folder: Path, kind: str, options: PushOptions, published: str | None) -> None:
    """README.md, with what a person wrote into it, here or on the Hub."""
    if kind in DATASETS:
        card = dataset_card if kind == "dataset" else lerobot_card
        card.write_card(folder, options.license, options.repo_id, published)
        return
    report = Path(options.report) if options.report else None
    weights = dict(entry.split("=", 1) for entry in options.weights)
    known = CardOptions(options.license, options.repo_id, weights, options.dataset_ids, options.base_model, report)
    write_model_card(folder, kind, known, published)


def load_and_compare(
    source: str, folder: Path, kind: str, revision: str | None = None, base: Base | None = None
) -> str:
    """Loads a folder or repository in a fresh process, an adapter on that revision of its `base`; says how,
    RuntimeError if it gives something else.
    """
    if kind not in DATASETS:
        difference = check_fresh_load(source, folder / REFERENCE, revision, base and base.commit)
        return f"by the Auto classes; largest difference to the trained model {difference:.1e}"
    found = first_rows(source, revision)
    if revision is not None and found != first_rows(str(folder)):
        raise RuntimeError(f"{source} streams other first rows than {folder}")
    return f"by load_dataset, streaming; first rows of {', '.join(found)} compared"


def check_state(options: PushOptions, state: State, changes: Changes) -> None:
    """ValueError where the repository is not as the options want it."""
    if state.head is None:
        if options.pull_request:
            raise ValueError(
                f"{options.repo_id} is not there (or this token cannot see it): no pull request is possible"
            )
        return
    if state.private and options.public:
        raise ValueError(f"{options.repo_id} is private; change that in its settings, or leave --public out")
    if not state.private and not options.public:
        raise ValueError(f"{options.repo_id} is public; say --public to publish there, or choose another --repo_id")
    if options.tag in state.tags and (changes or state.tags[options.tag] != state.head):
        raise ValueError(
            f"the tag {options.tag} is on revision {state.tags[options.tag][:8]} of {options.repo_id}; choose another "
            f"--tag (there are {', '.join(sorted(state.tags))})"
        )


def consent_to_code(folder: Path, base: Base | None, options: PushOptions) -> None:
    """Says whose code the loading runs, also that of an adapter's `base`, and asks where it is not this installation's;
    ValueError where that is refused, or nobody can be asked.
    """
    where = {str(folder): (remote_code(folder), changed_code(folder))}
    if base is not None:
        where[f"{base.name} on the Hub, which it changes, at revision {base.commit}"] = (base.code, base.changed)
    for place, (names, changed) in where.items():
        if names:
            print(f"loading runs code of {place} on this machine: {code_in_words(names, changed)}", flush=True)
        if not changed or options.run_code:
            continue
        if not sys.stdin.isatty():
            raise ValueError(
                f"{place} has code of its own, {', '.join(changed)}: read it, then say --run_code to run it"
            )
        if input("Run it? [y/N] ").strip().lower() not in ("y", "yes"):
            raise ValueError("nothing was run and nothing sent")


def show(folder: Path, staging: Path, state: State, changes: Changes, options: PushOptions) -> None:
    """What is sent where."""
    where = options.repo_id or "(no --repo_id)"
    there = "a new repository" if state.head is None else f"now at {state.head[:8]}"
    print(f"{where}, {'public' if options.public else 'private'}, {there}; of {folder}:")
    total = 0
    for name in changes.sent:
        size = (staging / name).stat().st_size
        total += size
        print(f"  {size:>14,} {name}{'' if (staging / name).is_symlink() else '   (without paths of this machine)'}")
    for name in changes.removed:
        print(f"         removed {name}")
    for name in published_files(folder, options.include)[1]:
        print(f"        not sent {name}")
    print(f"{len(changes.sent)} files, {total:,} bytes" + (f", tag {options.tag}" if options.tag else ""))


def push(options: PushOptions) -> str:
    """Card, checks, upload, load back; returns the URL (or the folder on a dry run). RuntimeError says what to do where
    the Hub fails or refuses.
    """
    try:
        return check_and_publish(options)
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        if words := advice(error, options.repo_id):
            raise RuntimeError(words) from error
        raise


def check_and_publish(options: PushOptions) -> str:
    """`push` without its advice."""
    folder = Path(options.folder)
    kind = check_folder(folder)
    if options.space and kind in DATASETS:
        raise ValueError(f"{folder} is a dataset; a Space shows a model or an adapter")
    replaced = replacements(folder, kind, options.base_model, options.dataset_ids)
    repository = Repository(options.repo_id, kind) if options.repo_id else None
    state = repository.state() if repository else State()
    write_card(folder, kind, options, state.card)
    with staged(folder, replaced, options.include) as staging:
        if leaks := find_leaks(staging):
            raise ValueError(f"{folder} holds what must not be published:\n" + "\n".join(leaks))
        sent = published_files(folder, options.include)[0]
        changes = repository.changes(staging, state.files) if repository else Changes(sent, [])
        check_state(options, state, changes)
        base = look_at_base(base_of(folder, options.base_model)) if kind == "adapter" else None
        consent_to_code(folder, base, options)
        print(f"loads in a fresh process {load_and_compare(str(staging), staging, kind, base=base)}")
        show(folder, staging, state, changes, options)
        if not options.space:
            return str(folder) if not_sent(options) else publish(repository, staging, state, options, base)
        with TemporaryDirectory() as page:
            space = prepare_space(Path(page), folder, options)
            if not_sent(options):
                return str(folder)
            url = publish(repository, staging, state, options, base)
            publish_space(Path(page), *space, options)
            return url


def not_sent(options: PushOptions) -> bool:
    """Says so on a dry run."""
    if options.dry_run:
        print("dry run: nothing sent")
    return options.dry_run


def prepare_space(page: Path, folder: Path, options: PushOptions) -> tuple[Repository, State]:
    """Writes the Space of a model or an adapter, checks it as every folder that is sent, and says what is sent."""
    repository = Repository(options.space, "space")
    state = repository.state()
    training = json.loads((folder / "training.json").read_text())["options"]
    datasets = [name for name in public_datasets(training, options.dataset_ids) if HUB_ID.fullmatch(name)]
    write_space(page, options.repo_id, datasets, options.license, state.card, options.run_code)
    if leaks := find_leaks(page):
        raise ValueError("the Space would hold what must not be published:\n" + "\n".join(leaks))
    if state.head is not None and state.private == options.public:
        is_now, wanted = ("private", "public") if state.private else ("public", "private")
        raise ValueError(f"the Space {options.space} is {is_now}, this push is {wanted}; change that in its settings")
    changes = repository.changes(page, state.files)
    total = sum((page / name).stat().st_size for name in changes.sent)
    print(f"Space {options.space}: {len(changes.sent)} files, {total:,} bytes, {len(changes.removed)} removed")
    return repository, state


def publish_space(page: Path, repository: Repository, state: State, options: PushOptions) -> None:
    """Sends a Space that `prepare_space` has written, and compares what the Hub then has."""
    if state.head is None:
        state = repository.create(private=not options.public)
    if repository.changes(page, state.files):
        revision = repository.send(page, state, f"Show {options.repo_id}", pull_request=False)[1]
        if different := repository.changes(page, repository.files(revision)):
            names = ", ".join(different.sent)
            raise RuntimeError(f"{options.space} has other files than were sent: {names}; push again")
    print(f"Space {options.space}: {repository.page}")


def publish(repository: Repository, staging: Path, state: State, options: PushOptions, base: Base | None) -> str:
    """Sends a checked folder, loads it back from the Hub, and only then tags it; returns the URL."""
    if state.head is None:
        state = repository.create(private=not options.public)
    message = f"Upload {repository.kind}" + (f" {options.tag}" if options.tag else "")
    commit, revision, url = repository.send(staging, state, message, options.pull_request)
    if different := repository.changes(staging, repository.files(revision)):
        raise RuntimeError(f"{url} has other files than {options.folder}: {', '.join(different.sent)}; push again")
    print(f"loads from the Hub {load_and_compare(options.repo_id, staging, repository.kind, revision, base)}")
    if options.tag:
        repository.tag(options.tag, commit)
    if repository.kind == "lerobot dataset" and not options.pull_request:
        # LeRobot reads the revision of the tag with the version of its format, and nothing where there is none
        repository.move_tag(lerobot_version(staging), commit)
    print(url)
    return url


if __name__ == "__main__":
    sys.exit(execute(PushOptions, push, "push_to_hub.py"))
