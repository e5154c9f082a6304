"""Hub id or local path → local files, all at one commit. The only room that talks to the hub.

A repository is looked up once in a process: its commit is pinned and its files are listed then, and whatever is
fetched later is of that commit, even if the branch has moved. With HF_HUB_OFFLINE=1 the cache takes the hub's place.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from minift.errors import UserError
from minift.files import write_text

TIMEOUT = 10  # seconds for the hub's first answer, for which huggingface_hub by itself waits without end
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")
NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_NAME = re.compile(rf"({NAME.pattern})(?:@([^:@]+))?(?::([\w./-]+))?")  # owner/name@revision:split
# How the files of one split differ: -00000-of-00001 and a hash, and the suffix.
SHARD = re.compile(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?\.\w+$")
SPLITS = {  # a word in a file's path → the split that it is of
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
NO_ROWS = ("dataset_infos.json",)  # what older data sets on the hub say of themselves


class Repository(NamedTuple):
    """What the hub, or offline its cache, holds under one name at one commit."""

    name: str
    kind: str  # model or dataset
    revision: str | None  # as asked for
    commit: str
    files: tuple[str, ...]  # their paths in the repository, sorted

    def __str__(self) -> str:
        return f"{self.name} at {self.commit[:12]}" + (" in the cache" if constants.is_offline_mode() else "")


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder with a model's config and tokenizer: `model` itself, or the one its hub id's files are fetched into.

    Raises UserError when `model` is neither, and as `look_up` does.
    """
    folder = Path(model)
    if folder.is_dir():
        if revision not in (None, commit_of(folder)):
            raise UserError(f"--revision {revision}: {model} is a folder, which has no revisions: leave the flag out")
        if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
            raise UserError(f"{model}: adapters without their model: the merged one lies beside them in a run's folder")
        return folder
    if not NAME.fullmatch(str(model)) or folder.parent.is_dir():
        # A folder that holds no such folder is a slip in a path; nobody means to ask the hub for runs/stf.
        raise UserError(f"{model}: no such folder, expected one with config.json and weights, or a hub id (owner/name)")
    repository = look_up(str(model), "model", revision)
    if "config.json" not in repository.files:
        raise UserError(f"{repository}: no config.json in it, expected a model's repository")
    small = [name for name in repository.files if "/" not in name and name.endswith((".json", ".txt"))]
    return fetch(repository, small)[0].parent


def data_files(data: str | Path) -> list[Path]:
    """The files of a data set in the order of their names: `data` itself, or those of `owner/name@revision:split`.

    Revision and split may be left out: main, and train, which is all files where no path names a split. A split is
    train, validation or test, by whatever word for it the paths have, or a path without suffix and shard's number.
    Raises UserError when the repository has no files that minift reads, none of the split, or several that could be it;
    and as `look_up` does.
    """
    path, parts = Path(data), DATA_NAME.fullmatch(str(data))
    if parts is None or path.exists() or path.suffix in DATA_SUFFIXES or path.parent.is_dir():
        return [path]
    name, revision, split = parts.groups()
    repository = look_up(name, "dataset", revision)
    return fetch(repository, _files_of_split(repository, split))


def at_commit(data: str, commit: str | None) -> str:
    """A hub data set's name with `commit` as its revision; any other path, and without a commit, as it is."""
    parts = DATA_NAME.fullmatch(data)
    if commit is None or parts is None or Path(data).exists():
        return data
    return f"{parts[1]}@{commit}" + (f":{parts[3]}" if parts[3] else "")


def commit_of(path: Path) -> str | None:
    """The commit that a file or folder in the hub's cache is of, for run.json; None for any other path."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", path.absolute().as_posix())
    return found and found[1]


@cache
def look_up(name: str, kind: str, revision: str | None = None) -> Repository:
    """A repository's commit and files. `kind` is model or dataset; a revision is a branch, tag, commit or refs/pr/N.

    Raises UserError, one line each, when there is none of that name or revision, when it is gated or the token
    refused, and offline when the cache lacks it; ConnectionError when the hub can't be reached or fails.
    """
    with _failures_named(name, kind, revision):
        if constants.is_offline_mode():
            # Without patterns it would want all of the repository to be there.
            snapshot = snapshot_download(
                name, repo_type=kind, revision=revision, allow_patterns=[], local_files_only=True
            )
            folder = Path(snapshot)
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
            return Repository(name, kind, revision, folder.name, tuple(sorted(files)))
        info = HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT)
        if not re.fullmatch("[0-9a-f]{40}", info.sha or ""):
            raise ValueError(f"no commit in its answer: {info.sha}")
        return Repository(name, kind, revision, info.sha, tuple(sorted(file.rfilename for file in info.siblings or ())))


def fetch(repository: Repository, names: Iterable[str]) -> list[Path]:
    """Where some of a repository's files lie in the cache, after a download with a progress bar of those it lacked.

    A connection that breaks off is taken up again where it broke; where the hub falls silent, huggingface_hub asks
    several times more. A process that is killed keeps its whole files and starts the current one again. Raises as
    `look_up`.
    """
    paths = []
    for name in names:
        with _failures_named(repository.name, repository.kind, repository.revision, name):
            path = hf_hub_download(repository.name, name, repo_type=repository.kind, revision=repository.commit)
            paths.append(Path(path))
    if not constants.is_offline_mode() and repository.revision != repository.commit:
        # Which commit the branch is at, by which the cache is asked offline. Last: files that did not all come must not
        # be found.
        folder = f"{repository.kind}s--{repository.name.replace('/', '--')}"
        note = Path(constants.HF_HUB_CACHE, folder, "refs", repository.revision or constants.DEFAULT_REVISION)
        with suppress(OSError, UserError):  # a cache that can only be read; another process that writes the same
            if not note.is_file() or note.read_text() != repository.commit:
                note.parent.mkdir(parents=True, exist_ok=True)
                write_text(note, repository.commit)
    return paths


def _files_of_split(repository: Repository, split: str | None) -> list[str]:
    readable = [
        name
        for name in repository.files
        if name.endswith(DATA_SUFFIXES) and name not in NO_ROWS and not re.search(r"(^|/)[._]", name)
    ]
    if not readable:
        raise UserError(f"{repository}: no {', '.join(DATA_SUFFIXES)} file in it: convert one, and name the file")
    whole = {name: Path(name).with_suffix("").as_posix() for name in readable}
    paths = {name: SHARD.sub("", name) for name in readable}
    splits = {name: _split_of(name) for name in readable}
    found = sorted(set(filter(None, splits.values())))
    if named := [name for name in readable if split in (whole[name], paths[name])]:
        files = named
    elif not found and split in (None, "train"):
        files = readable
    else:
        wanted = SPLITS.get(split, split) if split else "train"
        files = [name for name in readable if splits[name] == wanted]
        if not files:
            what = f"expected {' or '.join(found)}" if found else f"as no path names one: leave :{split} out"
            raise UserError(f"{repository}: no {wanted} split, {what}")
        several = sorted({paths[name] for name in files})
        if len(several) > 1:
            choice = f"name one of them, as in {repository.name}:{several[0]}"
            raise UserError(f"{repository}: several are a {wanted} split ({', '.join(several[:5])}): {choice}")
    if len({Path(name).suffix for name in files}) > 1:
        raise UserError(f"{repository}: files of several kinds ({', '.join(files[:5])}): download and name one of them")
    return files


def _split_of(path: str) -> str | None:
    words = re.split("[^a-z]+", path.lower())
    return next((SPLITS[word] for word in reversed(words) if word in SPLITS), None)


@contextmanager
def _failures_named(name: str, kind: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    try:
        yield
    # RuntimeError is how hf_xet fails; the last three come of an answer that no hub would give, such as a log-in page.
    except (HTTPError, EntryNotFoundError, RevisionResolutionError, RuntimeError, ValueError, TypeError, KeyError) as e:
        raise _told_apart(e, name, kind, revision, file) from None


def _told_apart(
    error: BaseException, name: str, kind: str, revision: str | None, file: str | None
) -> UserError | ConnectionError:
    """What huggingface_hub raised, as UserError for the user's mistakes and ConnectionError for the rest.

    `file` is what was asked for after the repository had been found and listed.
    """
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    at = f"revision {revision}" if revision else "main"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    token_refused = status == 401 and "Invalid credentials" in str(error)
    if isinstance(error, LocalEntryNotFoundError | RevisionResolutionError):
        if not constants.is_offline_mode():
            return _told_apart(error.__cause__ or RuntimeError(error), name, kind, revision, file)
        what = f"the cache in {constants.HF_HUB_CACHE} has no {kind} of that name at {at}"
        return UserError(f"{name}: {what}, and HF_HUB_OFFLINE is set: run once without it")
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, which is its base class
        return UserError(f"{name}: gated: accept its terms at {page}, then run `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"{name}: no {at} on the hub, expected a branch, tag or commit of {page}")
    if file and status in (401, 404) and not token_refused:
        return UserError(f"{name}: {file} can't be had though the hub lists it ({status}): see {page}, or try again")
    if isinstance(error, HFValidationError) or (status in (401, 404) and not token_refused):
        what = f"no such file or folder here, and no {kind} of that name on the hub, or a private one"
        return UserError(f"{name}: {what}: check the name, or run `hf auth login`")
    if status is not None and status < 500 and status not in (408, 429):
        reason = error.server_message or error.response.reason_phrase
        return UserError(f"{name}: refused by the hub ({status}: {reason}): see {page}, or run `hf auth login`")
    what = f"{name}: no proper answer from {constants.ENDPOINT} ({type(error).__name__}: {error})"
    return ConnectionError(f"{what}: check the connection; HF_HUB_OFFLINE=1 takes what was downloaded before")
