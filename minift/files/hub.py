"""Hub ids and local paths resolved to local files, all at one commit. The only module that talks to the hub.

A repository is looked up once per process: this pins its commit and lists its files. Whatever is fetched later is of
that commit, even if the branch has moved. With HF_HUB_OFFLINE=1 the cache replaces the hub.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, errors, hf_hub_download, snapshot_download
from huggingface_hub.utils import tqdm

from minift.errors import UserError
from minift.files.text import printable, write_text

TIMEOUT = 10  # seconds for the hub's first answer; huggingface_hub itself would wait forever
CSV = (".csv", ".csv.gz")
DATA_SUFFIXES = (".json", ".jsonl", ".parquet", ".json.gz", ".jsonl.gz", *CSV)
CONVERTED = "refs/convert/parquet"  # the branch where the hub keeps most data sets as parquet
NAME = re.compile(r"[\w.-]+/[\w.-]+")
DATA_NAME = re.compile(rf"({NAME.pattern})(?:@([^:@]+))?(?::([\w./-]+))?")  # owner/name@revision:split
# The part of a path in which the shards of one split differ: -00000-of-00001, a hash, the suffix.
SHARD = re.compile(r"([-_.]?\d+)?([-_.]of[-_.]\d+)?(-[0-9a-f]{16})?\.\w+(\.gz)?$")
SPLITS = {  # a word in a file's path → its split
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
WITHOUT_ROWS = re.compile(r"(^|/)[._]|^dataset_infos\.json$")  # hidden files; metadata in older data sets


class Repository(NamedTuple):
    """A repository's files at one commit, on the hub or, offline, in its cache."""

    name: str
    repo_type: str  # model or dataset
    revision: str | None  # as the user gave it
    commit: str
    files: tuple[str, ...]  # paths in the repository, sorted

    def __str__(self) -> str:
        return f"{self.name} at {self.commit[:12]}" + (" in the cache" if constants.is_offline_mode() else "")


class PrintableBar(tqdm):
    """A download's progress bar with the escaped name of a file."""

    def __init__(self, *, desc: str, **settings: Any) -> None:
        super().__init__(desc=printable(desc), **settings)


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """Return a model's or adapters' folder; for a hub id that of the cache, without weights. Raises like `look_up`."""
    folder = Path(model)
    if folder.is_dir() and str(model):
        if revision not in (None, commit_of(folder)):
            raise UserError(f"--revision {revision}: {model} is a folder, which has no revisions: leave the flag out")
        return folder
    if not NAME.fullmatch(str(model)) or folder.parent.is_dir():
        # Where the parent folder exists, this is a mistyped path, such as runs/stf, and not a hub id.
        expected = "one with config.json and weights, or a hub id (owner/name)"
        raise UserError(f"{model or repr(model)}: no such folder, expected {expected}")
    repository = look_up(str(model), "model", revision)
    if not {"config.json", "adapter_config.json"} & {*repository.files}:
        raise UserError(f"{repository}: no config.json in it, expected a model's repository")
    small = [name for name in repository.files if "/" not in name and name.endswith((".json", ".txt"))]
    return fetch(repository, small)[0].parent


def data_files(data: str | Path) -> list[Path]:
    """Return a data set's files in the order of their names: `data` itself, or those of `owner/name@revision:split`.

    The revision defaults to main, the split to train, or to all files if no path names a split. A split is one of the
    words in `SPLITS`, or a path without suffix and shard number. Raises UserError when the repository has no files that
    minift reads, none of the split, or several candidates; and as `look_up` does.
    """
    path, parts = Path(data), DATA_NAME.fullmatch(str(data))
    if parts is None or path.exists() or path.name.endswith(DATA_SUFFIXES) or path.parent.is_dir():
        return [path]
    name, revision, split = parts.groups()
    repository = look_up(name, "dataset", revision)
    return fetch(repository, _files_of_split(repository, split))


def at_commit(data: str, commit: str | None) -> str:
    """Return a hub data set's name with `commit` as its revision, and any other name unchanged."""
    parts = DATA_NAME.fullmatch(data)
    if commit is None or parts is None or Path(data).exists():
        return data
    return f"{parts[1]}@{commit}" + (f":{parts[3]}" if parts[3] else "")


def commit_of(path: Path) -> str | None:
    """Return the commit of a file or folder in the hub's cache; None for any other path."""
    found = re.search(r"/snapshots/([0-9a-f]{40})(?:/|$)", path.absolute().as_posix())
    return found and found[1]


@cache
def look_up(name: str, repo_type: str, revision: str | None = None) -> Repository:
    """Return a repository's commit and files; a revision is a branch, tag, commit or refs/pr/N.

    Raises UserError when the name or revision does not exist or is not in the cache that replaces the hub, or when the
    hub refuses; ConnectionError when it can't be reached or fails.
    """
    where: dict[str, Any] = {"repo_type": repo_type, "revision": revision}
    with _translate_errors(name, repo_type, revision):
        if constants.is_offline_mode():
            # Without allow_patterns, huggingface_hub would require the whole repository to be cached.
            folder = Path(snapshot_download(name, **where, allow_patterns=[], local_files_only=True))
            commit = folder.name
            files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        else:
            info: Any = HfApi().repo_info(name, **where, timeout=TIMEOUT)
            commit, files = str(info.sha), [file.rfilename for file in info.siblings or ()]
            if not re.fullmatch("[0-9a-f]{40}", commit):
                raise ValueError(f"no commit in its answer: {commit}")
        return Repository(name, repo_type, revision, commit, tuple(sorted(files)))


def fetch(repository: Repository, files: Iterable[str]) -> list[Path]:
    """Return the cached paths of some of a repository's files, downloading missing ones with a progress bar.

    A broken connection is resumed; a killed process begins again with the file that it was at. Raises like `look_up`.
    """
    name, repo_type, revision, commit, _ = repository
    paths = []
    for file in files:
        with _translate_errors(name, repo_type, revision, file):
            path = hf_hub_download(name, file, repo_type=repo_type, revision=commit, tqdm_class=PrintableBar)
        paths.append(Path(path))
    if not constants.is_offline_mode() and revision != commit:
        # Record the branch's commit, by which it is found offline. Last: an incomplete set of files must not be found.
        folder = f"{repo_type}s--{name.replace('/', '--')}"
        ref = Path(constants.HF_HUB_CACHE, folder, "refs", revision or constants.DEFAULT_REVISION)
        with suppress(OSError, UserError):  # a read-only cache, or another process writing the same
            ref.parent.mkdir(parents=True, exist_ok=True)
            write_text(ref, commit)
    return paths


def _files_of_split(repository: Repository, split: str | None) -> list[str]:
    """Return the files of a split by their paths, or all files if no path names a split. Raises like `data_files`.

    `data/train-00000-of-00002.parquet` is a shard of the stem `data/train` and, by the word in it, of the split train.
    """
    elsewhere = "" if repository.revision == CONVERTED else f"try {repository.name}@{CONVERTED}, or "
    names = [name for name in repository.files if name.endswith(DATA_SUFFIXES) and not WITHOUT_ROWS.search(name)]
    names = [name for name in names if not name.endswith(CSV)] or names  # tables beside the rows are often CSV
    if not names:
        formats = ", ".join((*DATA_SUFFIXES[:3], CSV[0]))
        raise UserError(f"{repository}: no {formats} file in it: {elsewhere}convert one, and name the file")
    stems = {name: SHARD.sub("", name) for name in names}
    words = {name: [SPLITS[word] for word in re.split("[^a-z]+", name.lower()) if word in SPLITS] for name in names}
    known = sorted({found[-1] for found in words.values() if found})  # the last such word in a path counts
    files = [name for name in names if split in (stems[name], re.sub(r"\.\w+(\.gz)?$", "", name))]  # given as a path
    if not files and not known and split in (None, "train"):  # no path names a split
        files = names
    elif not files:  # given as a word
        wanted = SPLITS.get(split, split) if split else "train"
        files = [name for name in names if words[name][-1:] == [wanted]]
        if not files:
            hint = f"expected {' or '.join(known)}" if known else f"as no path names one: leave :{split} out"
            raise UserError(f"{repository}: no {wanted} split, {hint}")
        candidates = sorted({stems[name] for name in files})
        if len(candidates) > 1:
            at = f"@{repository.revision}" if repository.revision else ""
            hint = f"name one of them, as in {repository.name}{at}:{candidates[0]}"
            raise UserError(f"{repository}: several are a {wanted} split ({', '.join(candidates[:5])}): {hint}")
    if len({suffix for suffix in DATA_SUFFIXES for name in files if name.endswith(suffix)}) > 1:
        found = ", ".join(files[:5])
        raise UserError(f"{repository}: files of several formats ({found}): {elsewhere}download and name one")
    return files


@contextmanager
def _translate_errors(name: str, repo_type: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """Translate huggingface_hub's errors to UserError or ConnectionError; without `file`, those of a look-up."""
    try:
        yield
    # hf_xet raises RuntimeError. The last three are raised over answers that are not a hub's, such as a login page.
    except (errors.HTTPError, errors.LocalEntryNotFoundError, RuntimeError, ValueError, TypeError, KeyError) as raised:
        error: BaseException = raised
        if isinstance(raised, errors.LocalEntryNotFoundError) and not constants.is_offline_mode():
            error = raised.__cause__ or RuntimeError(raised)  # the hub failed, and then the file was not in the cache
        page = f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{name}"
        at = f"revision {revision}" if revision else "main"
        status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
        has_reason = isinstance(error, errors.RevisionNotFoundError) or "Invalid credentials" in str(error)
        is_unknown = file is None and status in (401, 404) and not has_reason
        if isinstance(error, errors.LocalEntryNotFoundError):
            problem = f"not in the cache {constants.HF_HUB_CACHE} at {at}; HF_HUB_OFFLINE is set: run once without it"
        elif isinstance(error, errors.HFValidationError) or is_unknown:
            problem = f"no such path, and no {repo_type} of that name on the hub, or a private one (`hf auth login`)"
        elif isinstance(error, errors.HfHubHTTPError) and status < 500 and status not in (408, 429):
            reason = error.server_message or error.response.reason_phrase
            problem = f"the hub answers {status} for {file or at}: {reason}; see {page}, or run `hf auth login`"
        else:
            problem = f"{name}: no valid answer from {constants.ENDPOINT} ({type(error).__name__}: {error})"
            raise ConnectionError(f"{problem}: check the connection; HF_HUB_OFFLINE=1 uses earlier downloads") from None
        raise UserError(f"{name}: {problem}") from None
