"""A repository on the Hub: what it holds, one commit that is made whole or not at all, its tags and pull requests."""

import hashlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

# What an earlier push may have left and what would be loaded in place of, or beside, the new files
OUTDATED = {
    "model": r"model[\w-]*\.safetensors(\.index\.json)?|\.eval_results/stereovla\.yaml",
    "adapter": r"adapter_model[\w-]*\.safetensors(\.index\.json)?|\.eval_results/stereovla\.yaml",
    "dataset": r"data/[^/]+\.parquet",
    "lerobot dataset": r"(data|meta/episodes)/.+\.parquet|videos/.+\.mp4",
    "space": r"stereovla/.+",
}
WAITS_S = (1.0, 2.0, 4.0)


def patiently(call: Callable[[], Any]) -> Any:
    """The result of a request that may be repeated, tried again after 429, 5xx and cut connections.

    huggingface_hub does this itself for uploads and downloads, not for creating repositories, commits and tags.
    """
    for wait in WAITS_S:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code != 429 and error.response.status_code < 500:
                raise
            problem = f"the Hub answers {error.response.status_code}"
        except HTTPError as error:
            problem = str(error) or type(error).__name__
        print(f"{problem}; trying again in {wait:g} s", flush=True)
        time.sleep(wait)
    return call()


@dataclass
class State:
    """What a repository holds: `files` {name: SHA-256 or git id}, `tags` {name: commit}; `head` None = not there."""

    head: str | None = None
    private: bool | None = None
    files: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    card: str | None = None


@dataclass
class Changes:
    """Names of files that a commit adds or changes, and that it removes."""

    sent: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.sent or self.removed)


class Repository:
    """One repository, of a "model", an "adapter" (which is a model to the Hub), a "dataset", a "lerobot dataset" or a
    "space".
    """

    def __init__(self, repo_id: str, kind: str):
        self.api, self.kind = HfApi(), kind
        of_hub = {"adapter": "model", "lerobot dataset": "dataset"}
        self.which = {"repo_id": repo_id, "repo_type": of_hub.get(kind, kind)}

    def state(self) -> State:
        """What is there now; an empty `State` where there is no such repository."""
        try:
            info = patiently(lambda: self.api.repo_info(**self.which))
        except RepositoryNotFoundError as error:
            if error.response.status_code == 401:
                raise
            return State()
        files = self.files(info.sha)
        refs = patiently(lambda: self.api.list_repo_refs(**self.which))
        card = hf_hub_download(**self.which, filename="README.md", revision=info.sha) if "README.md" in files else None
        return State(
            info.sha,
            info.private,
            files,
            {tag.name: tag.target_commit for tag in refs.tags},
            None if card is None else Path(card).read_text(encoding="utf-8"),
        )

    def files(self, revision: str) -> dict[str, str]:
        """{name: SHA-256 of a large file, git id of a small one}."""
        entries = patiently(lambda: list(self.api.list_repo_tree(**self.which, recursive=True, revision=revision)))
        files = [entry for entry in entries if hasattr(entry, "blob_id")]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    @property
    def page(self) -> str:
        """Its address."""
        kind, name = self.which["repo_type"], self.which["repo_id"]
        return f"{self.api.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"

    def create(self, private: bool) -> State:
        sdk = {"space_sdk": "gradio"} if self.kind == "space" else {}
        patiently(lambda: self.api.create_repo(**self.which, private=private, exist_ok=True, **sdk))
        return self.state()

    def changes(self, folder: Path, files: dict[str, str]) -> Changes:
        """What makes of a repository with these `files` one with those of the folder."""
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        sent = [name for name in names if name not in files or not _same(folder / name, files[name])]
        removed = [name for name in files if name not in names and re.fullmatch(OUTDATED[self.kind], name)]
        return Changes(sent, removed)

    def send(self, folder: Path, state: State, message: str, pull_request: bool) -> tuple[str, str, str]:
        """Sends what has changed since `state` as one commit.

        `upload_folder` makes several commits of many files, and of failing ones, so that an interruption could leave
        half a model on main. Here all files are uploaded first (again only those that the Hub lacks), then one commit
        names them; it is refused where someone else has changed the repository since `state`.

        Returns:
            (commit, revision that it can be loaded by, URL).
        """

        def commit() -> tuple[str, str, str]:
            revision, known = "main", state.files
            if pull_request and (number := self._open_pull_request(message)):
                revision = f"refs/pr/{number}"  # of this push, interrupted before
                known = self.files(revision)
            changes = self.changes(folder, known)
            operations = [CommitOperationAdd(name, str(folder / name)) for name in changes.sent]
            operations += [CommitOperationDelete(name) for name in changes.removed]
            new = pull_request and revision == "main"
            done = self.api.create_commit(
                **self.which,
                operations=operations,
                commit_message=message,
                revision=revision,
                parent_commit=state.head if revision == "main" else None,
                create_pr=new,
            )
            url = done.pr_url or done.commit_url
            return done.oid, (done.pr_revision or revision) if pull_request else done.oid, url

        return patiently(commit)

    def tag(self, name: str, commit: str) -> None:
        patiently(lambda: self.api.create_tag(**self.which, tag=name, revision=commit, exist_ok=True))

    def move_tag(self, name: str, commit: str) -> None:
        """As `tag`, also where it is on another revision."""
        if self.state().tags.get(name, commit) != commit:
            patiently(lambda: self.api.delete_tag(**self.which, tag=name))
        self.tag(name, commit)

    def _open_pull_request(self, title: str) -> int | None:
        found = self.api.get_repo_discussions(**self.which, discussion_type="pull_request", discussion_status="open")
        return next((pull.num for pull in found if pull.title == title), None)


def _same(path: Path, known: str) -> bool:
    """Whether a file has this SHA-256 (64 digits) or git id (40)."""
    if len(known) == 64:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == known
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == known


def advice(error: BaseException, repo_id: str | None) -> str | None:
    """What to do about a failed request, in words; None for an error that is no failed request."""
    while error is not None and not isinstance(error, HTTPError):
        error = error.__cause__
    if error is None:
        return None
    if not isinstance(error, HfHubHTTPError):
        return f"the Hub cannot be reached ({error}); see to the connection (HF_ENDPOINT?), then give the command again"
    status = error.response.status_code
    what = {
        401: "log in with a token that may write: `hf auth login`, or set HF_TOKEN",
        403: f"this token may not write to {repo_id}: use one with write access, or another name, or --pull_request",
        404: f"{error.response.url} is not there: see to the name and, for private repositories, to the token",
        409: "the repository changes at this moment; give the command again",
        412: f"someone else has changed {repo_id} in the meantime; look at it, then give the command again",
        429: "too many requests; wait a while, then give the command again, which goes on",
    }.get(status, "the Hub fails; give the command again later, which goes on" if status >= 500 else "see above")
    return f"the Hub answers {status}: {str(error).strip()}\n{what}"
