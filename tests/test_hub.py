"""Models and data from a hub served on 127.0.0.1: layouts, failures, interrupted downloads, offline use."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hub import Hub, serve
from huggingface_hub import constants, utils
from safetensors.torch import save_model as save_tied
from test_weights import CONFIG, LAYOUTS, assert_holds, hub_state, write_config, write_weights

import train_rm
import train_sft
from minift.errors import UserError
from minift.files import hub as hub_module
from minift.files.adapters import save_adapters
from minift.files.datasets import PAIR_SCHEMAS, load_rows
from minift.files.hub import PrintableBar, commit_of, data_files, look_up, model_folder
from minift.files.pretrained import find_model, load_language_model
from minift.files.tokenizer import load_tokenizer
from minift.files.weights import load_model, save_model
from minift.lora import adapters_of, add_lora, merge
from minift.model import OPT

ROOT = Path(__file__).parent.parent
MODEL, DATA = "someone/opt-tiny", "someone/pairs"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve an empty hub, which this process takes for the real one, with its own cache."""
    with serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        forget()
        yield served
    forget()


def forget() -> None:
    """Clear what this process remembers of the hub, as if it had just started."""
    utils.close_session()
    look_up.cache_clear()


def go_offline(monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget()


def resolve(model: str | Path, revision: str | None = None) -> Path:
    return find_model(model, revision).folder


def load(model: str | Path, revision: str | None = None) -> OPT:
    return load_model(resolve(model, revision))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def model_files(folder: Path, *layouts: str, state: dict | None = None, seed: int = 0) -> dict[str, bytes]:
    """Return a repository's files as in facebook's, except that the weights have CONFIG's shape."""
    write_config(folder)
    for layout in layouts:
        write_weights(folder, layout, state or hub_state(seed))
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    (folder / "flax_model.msgpack").write_bytes(b"\x80")
    (folder / "generation_config.json").write_text("{}")
    return files_of(folder)


def refused(call, *arguments: object, error: type[Exception] = UserError) -> str:
    """Return the one-line message of the error that the call raises."""
    forget()
    with pytest.raises(error) as caught:
        call(*arguments)
    message = " ".join(str(caught.value).split()) if error is ConnectionError else str(caught.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", ["model.", ""])  # "" as in facebook/opt-350m's own file
def test_every_layout(hub, tmp_path, layout, prefix):
    state = {prefix + name.removeprefix("model."): tensor for name, tensor in hub_state().items()}
    commit = hub.add(MODEL, model_files(tmp_path / "made", layout, state=state))
    folder = resolve(MODEL)
    assert_holds(load(MODEL), hub_state())
    assert commit_of(folder) == commit
    shards = ["00001-of-00003", "00002-of-00003", "00003-of-00003"]
    stem, suffix = layout.removesuffix(".index.json").split(".")
    assert hub.downloads() == ([f"{stem}-{n}.{suffix}" for n in shards] if "index" in layout else [layout])
    assert not any("msgpack" in request or "README" in request for request in hub.requests)


def test_the_first_layout_of_the_order_is_fetched_and_no_other(hub, tmp_path):
    for first, layout in enumerate(LAYOUTS):
        folder = tmp_path / layout
        for seed in range(first, 4):
            model_files(folder, LAYOUTS[seed], seed=seed)
        hub.add(f"someone/{first}", files_of(folder))
        hub.requests.clear()
        assert_holds(load(f"someone/{first}"), hub_state(first))
        stem, suffix = layout.removesuffix(".index.json").split(".")
        assert all(re.fullmatch(rf"{stem}(-.*)?\.{suffix}", name) for name in hub.downloads())
        assert len(hub.downloads()) == (3 if "index" in layout else 1)


def test_a_conversion_with_a_tied_alias_on_a_pull_request(hub, tmp_path):
    """As facebook/opt-350m: `.bin` on main, safetensors in refs/pr/N only, without the embedding under its name."""
    main = hub.add(MODEL, model_files(tmp_path / "main", "pytorch_model.bin"))
    write_config(tmp_path / "converted")
    tied = torch.nn.ModuleDict({"lm_head": torch.nn.Linear(8, 50, bias=False), "model": OPT(CONFIG)})
    tied["lm_head"].weight = tied["model"].decoder.embed_tokens.weight
    save_tied(tied, str(tmp_path / "converted" / "model.safetensors"), {"format": "pt"})
    converted = hub.add(MODEL, files_of(tmp_path / "converted"), "refs/pr/7")
    assert_holds(load(MODEL), hub_state())
    state = {name: tensor for name, tensor in tied.state_dict().items() if name != "lm_head.weight"}
    assert_holds(load(MODEL, "refs/pr/7"), state)
    assert_holds(load(MODEL, converted), state)
    assert (commit_of(resolve(MODEL)), commit_of(resolve(MODEL, "refs/pr/7"))) == (main, converted)


def test_all_files_are_of_the_commit_found_first(hub, tmp_path):
    """The branch moves after each answer: config and weights must not be of different commits."""
    first = hub.add(MODEL, model_files(tmp_path / "0", "pytorch_model.bin.index.json"))
    versions = iter(range(1, 100))

    def move(path: str) -> None:
        if "/api/" not in path:
            seed = next(versions)
            hub.add(MODEL, model_files(tmp_path / str(seed), "pytorch_model.bin.index.json", seed=seed))

    hub.before_answer = move
    folder = resolve(MODEL)
    assert_holds(load_model(folder), hub_state(0))
    assert commit_of(folder) == first and resolve(MODEL) == folder
    assert next(versions) > 5


def test_weights_are_fetched_only_when_asked_for(hub, tmp_path, tokenizer_directory):
    files = model_files(tmp_path / "made", "pytorch_model.bin") | files_of(tokenizer_directory)
    hub.add(MODEL, files)
    folder = model_folder(MODEL)
    assert find_model(MODEL, fetch_weights=False).folder == folder and hub.downloads() == []
    assert load_tokenizer(folder).encode("a list") == load_tokenizer(tokenizer_directory).encode("a list")
    assert resolve(MODEL) == folder
    assert hub.downloads() == ["pytorch_model.bin"]


# ------------------------------------------------------------------------------------------------------------ failures


def test_a_dead_network(hub, tmp_path):
    with serve() as dead:
        port = dead.url.rsplit(":", 1)[1]
    constants.ENDPOINT = f"http://127.0.0.1:{port}"  # the fixture sets it back
    for call, name in ((resolve, MODEL), (data_files, DATA)):
        message = refused(call, name, error=ConnectionError)
        assert name in message and port in message and "connection" in message and "HF_HUB_OFFLINE=1" in message


def test_a_hub_that_never_answers(hub, monkeypatch):
    monkeypatch.setattr(hub_module, "TIMEOUT", 0.2)
    hub.hanging.clear()
    assert "Timeout" in refused(resolve, MODEL, error=ConnectionError)
    assert len(hub.requests) == 1, "huggingface_hub retried"


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_hub_that_is_out_of_order(hub, status):
    hub.status = status
    assert str(status) in refused(resolve, MODEL, error=ConnectionError)
    assert len(hub.requests) == 1, "huggingface_hub retried"


def test_something_else_answers(hub, monkeypatch):
    hub.log_in_page = True
    assert "no valid answer" in refused(resolve, MODEL, error=ConnectionError)
    monkeypatch.setattr(hub_module.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha="main", siblings=[]))
    assert "no commit in its answer: main" in refused(resolve, MODEL, error=ConnectionError)


def test_files_that_fail_after_the_listing(hub, tmp_path, monkeypatch):
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))
    files = hub.repositories[MODEL].commits[hub.repositories[MODEL].branches["main"]]

    def lose(path: str) -> None:
        if "/resolve/" in path:
            files.pop("config.json", None)

    hub.before_answer = lose
    message = refused(resolve, MODEL)
    assert f"{MODEL}: the hub answers 404 for config.json: Entry not found; see {hub.url}/{MODEL}" in message
    hub.before_answer = lambda path: None
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))

    def fail(*_, **__):
        raise RuntimeError("Data processing error")

    monkeypatch.setattr(hub_module, "hf_hub_download", fail)  # as hf_xet does
    assert "Data processing error" in refused(resolve, MODEL, error=ConnectionError)


def test_a_missing_private_or_gated_repository(hub, tmp_path):
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))
    assert "no model of that name on the hub, or a private one" in refused(resolve, "someone/else")
    assert "no dataset of that name" in refused(data_files, "someone/else")
    assert "no model of that name" in refused(resolve, "a--b/c")  # which huggingface_hub refuses as a name
    for revision in ("v2", "0" * 40):
        assert f"404 for revision {revision}: Invalid rev id: {revision}" in refused(resolve, MODEL, revision)
    hub.repositories[MODEL].gated = True
    message = refused(resolve, MODEL)
    assert "is restricted" in message and f"{hub.url}/{MODEL}" in message and "hf auth login" in message
    hub.token_refused = True
    message = refused(resolve, MODEL)
    assert "401" in message and "Invalid credentials" in message and "hf auth login" in message


def test_a_missing_file(hub, tmp_path):
    files = model_files(tmp_path / "made", "pytorch_model.bin.index.json")
    commit = hub.add(MODEL, {name: data for name, data in files.items() if "00002" not in name})
    message = refused(resolve, MODEL)
    assert f"{commit}/pytorch_model.bin.index.json: weight_map names 'pytorch_model-00002-of-00003.bin'" in message
    assert hub.downloads() == [], "the other shards were downloaded for nothing"
    hub.add(MODEL, {name: data for name, data in files.items() if "pytorch_model" not in name})
    assert "no weights, expected one of model.safetensors" in refused(resolve, MODEL)
    hub.add(MODEL, {"README.md": b""})
    assert "no config.json in it" in refused(resolve, MODEL)


@pytest.mark.parametrize("shard", ["../../../secret.bin", "/etc/secret.bin", "sub/shard.bin", "weights.safetensors"])
def test_an_index_with_paths_outside_is_refused_without_a_request(hub, tmp_path, shard):
    files = model_files(tmp_path / "made", "pytorch_model.bin.index.json")
    index = json.dumps({"weight_map": dict.fromkeys(hub_state(), shard)}).encode()
    hub.add(MODEL, files | {"pytorch_model.bin.index.json": index, shard: b""})
    assert f"weight_map names {shard!r}" in refused(resolve, MODEL)
    assert not any("secret" in request or shard in request for request in hub.requests)


def test_adapters_bring_their_base_at_its_commit(hub, tmp_path, tokenizer_directory):
    """Both repositories move on afterwards: the adapters are merged into the commit that they name."""
    config = replace(CONFIG, vocab_size=480, max_position_embeddings=64)
    torch.manual_seed(0)
    save_model(OPT(config), tmp_path / "base")
    base = hub.add(MODEL, files_of(tmp_path / "base") | files_of(tokenizer_directory))
    tuned = load_model(tmp_path / "base")
    add_lora(tuned, 2, 4.0, 0.0, ["q_proj", "v_proj"])
    for adapter in adapters_of(tuned).values():
        torch.nn.init.normal_(adapter.lora_B.weight)
    save_adapters(tuned, tmp_path / "adapters", MODEL, base)
    hub.add("someone/adapters", files_of(tmp_path / "adapters"))
    merge(tuned)
    save_model(OPT(config), tmp_path / "base")
    hub.add(MODEL, files_of(tmp_path / "base") | files_of(tokenizer_directory))

    for name in ("someone/adapters", tmp_path / "adapters"):
        hub.requests.clear()
        found = find_model(name)
        assert commit_of(found.folder) == base and found.are_adapters
        loaded = load_language_model(found.name)
        assert_holds(loaded.model, {f"model.{name}": weight for name, weight in tuned.state_dict().items()})
        assert loaded.tokenizer.encode("a list") == load_tokenizer(tokenizer_directory).encode("a list")
    hub.add("someone/adapters", {"adapter_config.json": b"{}"}, "empty")
    message = refused(find_model, "someone/adapters", "empty")
    assert "someone/adapters: the hub answers 404 for adapter_model.safetensors" in message
    (tmp_path / "nameless").mkdir()
    (tmp_path / "nameless" / "adapter_config.json").write_text("{}")
    assert f"{tmp_path}/nameless/adapter_config.json: base_model_name_or_path" in refused(
        find_model, tmp_path / "nameless"
    )


def test_the_hub_is_not_asked_about_mistyped_paths(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for typo in ("runs/stf", "./nowhere", "opt-350m", str(tmp_path / "runs" / "x"), "runs/a/b"):
        assert f"{typo}: no such folder" in refused(resolve, typo)
    for typo in ("runs/rows", "rows", "someone/rows.jsonl", "someone/rows.parquet", str(tmp_path / "rows")):
        assert typo in refused(load_rows, typo)
    assert hub.requests == []


# ---------------------------------------------------------------------------- interrupted downloads, offline, the cache


def test_an_interrupted_download_resumes(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # not 10 MB, which is more than the file
    files = model_files(tmp_path / "made", "pytorch_model.bin")
    hub.add(MODEL, files)
    hub.cuts = [3000, 2000]
    assert_holds(load(MODEL), hub_state())
    assert hub.downloads() == [
        "pytorch_model.bin",
        "pytorch_model.bin bytes=3000-",
        "pytorch_model.bin bytes=5000-",
    ]
    assert (resolve(MODEL) / "pytorch_model.bin").read_bytes() == files["pytorch_model.bin"]


def test_a_failed_fetch_keeps_the_complete_files(hub, tmp_path, monkeypatch):
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin.index.json"))

    def fail_at_the_second_shard(path: str) -> None:
        hub.download_status = 200 if len(hub.downloads()) < 2 else 500

    hub.before_answer = fail_at_the_second_shard
    assert "500" in refused(resolve, MODEL, error=ConnectionError)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    with monkeypatch.context() as offline:
        go_offline(offline)
        assert "names 'pytorch_model-00002-of-00003.bin'" in refused(resolve, MODEL)
    hub.before_answer = lambda path: None
    hub.download_status = 200
    hub.requests.clear()
    forget()
    assert_holds(load(MODEL), hub_state())
    assert hub.downloads() == ["pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin"]


def test_a_branch_that_moves_during_the_download(hub, tmp_path, monkeypatch):
    """The commit found first is the one fetched, and the one found offline."""
    first = hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))
    other = model_files(tmp_path / "other", "pytorch_model.bin", seed=1)
    hub.before_answer = lambda path: hub.add(MODEL, other) if "/resolve/" in path else None
    assert resolve(MODEL).name == first
    go_offline(monkeypatch)
    assert resolve(MODEL).name == first
    assert_holds(load(MODEL), hub_state())


def test_a_read_only_cache_still_works(hub, tmp_path, monkeypatch):
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))
    folder = resolve(MODEL)
    hub.add(MODEL, hub.repositories[MODEL].commits[folder.name], "v2")  # the same commit under another name
    forget()

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(hub_module, "write_text", refuse)
    assert resolve(MODEL) == resolve(MODEL, "v2") == folder


def test_offline_after_online(hub, tmp_path, monkeypatch):
    commit = hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin.index.json"))
    online = resolve(MODEL)
    hub.add(f"datasets/{DATA}", {"data/train-00000-of-00001.json": b'[{"text": "a"}]'})
    rows = load_rows(DATA)
    go_offline(monkeypatch)
    hub.requests.clear()
    assert resolve(MODEL) == resolve(MODEL, "main") == resolve(MODEL, commit) == online
    assert_holds(load(MODEL), hub_state())
    assert load_rows(DATA) == rows
    assert hub.requests == []


def test_offline_with_nothing_in_the_cache(hub, tmp_path, monkeypatch):
    hub.add(MODEL, model_files(tmp_path / "made", "pytorch_model.bin"))
    resolve(MODEL)
    go_offline(monkeypatch)
    for call in (resolve, data_files):
        message = refused(call, "someone/else")
        assert "HF_HUB_OFFLINE is set" in message and str(tmp_path / "cache") in message
    assert "at revision v2" in refused(resolve, MODEL, "v2")


def test_offline_an_incomplete_data_set_is_not_found(hub, monkeypatch):
    first = [json.dumps({"text": name}).encode() for name in "ab"]
    hub.add(f"datasets/{DATA}", {"a.json": first[0], "b.json": first[1]})
    assert [row["text"] for row in load_rows(DATA)] == ["a", "b"]
    hub.add(f"datasets/{DATA}", {"a.json": b'{"text": "new a"}', "b.json": b'{"text": "new b"}'})

    def fail_at_b(path: str) -> None:
        hub.status = 403 if path.endswith("b.json") else 200

    hub.before_answer = fail_at_b
    assert "403" in refused(load_rows, DATA)
    go_offline(monkeypatch)
    assert [row["text"] for row in load_rows(DATA)] == ["a", "b"], "half of the new version"


# ---------------------------------------------------------------------------------------------------------------- data


def parquet(rows: list[dict]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the parquet extra is not installed")
    from pyarrow.parquet import write_table

    sink = pyarrow.BufferOutputStream()
    write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def pairs(*names: str) -> list[dict]:
    return [{"prompt": f"prompt {name}", "chosen": "yes", "rejected": "no"} for name in names]


def test_json_as_in_code_alpaca(hub):
    rows = [{"output": "b", "instruction": "a\u2028", "input": ""}]
    content = json.dumps(rows, indent=2).encode()
    page = "datasets/sahil2801/CodeAlpaca-20k"
    others = {".gitattributes": b"", "README.md": b"", "dataset_infos.json": b"{}", ".cache/rows.json": b"{}"}
    commit = hub.add(page, others | {"code_alpaca_20k.json": content})
    assert load_rows("sahil2801/CodeAlpaca-20k") == rows
    [path] = data_files("sahil2801/CodeAlpaca-20k")
    assert path.name == "code_alpaca_20k.json" and commit_of(path) == commit
    assert path.read_bytes() == content
    assert len([request for request in hub.requests if "GET /api/" in request]) == 1, "looked up more than once"


def test_a_download_s_file_name_is_escaped(hub, monkeypatch):
    shown = io.StringIO()

    class Bar(PrintableBar):
        def __init__(self, **settings):
            super().__init__(**settings | {"disable": False, "file": shown})

    monkeypatch.setattr("minift.files.hub.PrintableBar", Bar)
    hub.add("datasets/some/rows", {"\x1b[2J.json": b'[{"text": "a"}]'})
    load_rows("some/rows")
    assert "%1B%5B2J.json: 100%" in shown.getvalue()  # here, the library shows the end of the URL
    with Bar(desc="\x1b[2J.json", total=1):  # with Xet, and where the answer names a file, the name itself
        pass
    assert "\\x1b[2J.json: " in shown.getvalue() and "\x1b" not in shown.getvalue()


def test_parquet_as_in_synthetic_instruct(hub):
    files = {
        ".gitattributes": b"",
        "README.md": b"",
        "dataset_infos.json": b'{"default": {}}',
        "data/train-00000-of-00001-1e5d57b93c448e7a.parquet": parquet(pairs("a", "b")),
    }
    hub.add("datasets/Dahoas/synthetic-instruct-gptj-pairwise", files)
    rows = load_rows("Dahoas/synthetic-instruct-gptj-pairwise", PAIR_SCHEMAS)
    assert rows == pairs("a", "b") and [row.location for row in rows] == ["row 1", "row 2"]


def test_splits_and_shards(hub):
    files = {f"data/train-0000{n}-of-00003.parquet": parquet(pairs(name)) for n, name in ((2, "c"), (0, "a"), (1, "b"))}
    files |= {"data/test-00000-of-00001.parquet": parquet(pairs("d")), "data/validation.parquet": parquet(pairs("e"))}
    hub.add(f"datasets/{DATA}", files)
    rows = load_rows(DATA, PAIR_SCHEMAS)
    assert rows == pairs("a", "b", "c")
    assert rows[1].location == "train-00001-of-00003.parquet: row 1"
    assert b"".join(path.read_bytes() for path in data_files(DATA)) == b"".join(
        files[f"data/train-0000{n}-of-00003.parquet"] for n in range(3)
    )
    assert load_rows(f"{DATA}:train", PAIR_SCHEMAS) == rows
    assert not any("test" in request or "validation" in request for request in hub.requests)
    assert load_rows(f"{DATA}:test", PAIR_SCHEMAS) == load_rows(f"{DATA}@main:test", PAIR_SCHEMAS) == pairs("d")
    assert load_rows(f"{DATA}:dev", PAIR_SCHEMAS) == pairs("e")
    hub.add(f"datasets/{DATA}", {"en/train.json": b"{}", "training/test/held.json": b'{"text": "x"}'}, "v2")
    assert load_rows(f"{DATA}@v2:test") == [{"text": "x"}]
    parts = {f"data/train_{name}-0000{n}-of-00002.json": b'{"text": "%d"}' % n for n in (0, 1) for name in ("a", "b")}
    hub.add(f"datasets/{DATA}", parts | {"eval/prompts-1.jsonl": b"", "rows/all.json": b'{"text": "y"}'}, "v3")
    assert load_rows(f"{DATA}@v3:data/train_b") == [{"text": "0"}, {"text": "1"}]
    assert load_rows(f"{DATA}@v3:rows/all") == [{"text": "y"}]
    hub.add(f"datasets/{DATA}", {"part-1.json": b'{"text": "1"}', "part-2.json": b'{"text": "2"}'}, "v4")
    assert load_rows(f"{DATA}@v4") == load_rows(f"{DATA}@v4:train") == load_rows(f"{DATA}@v4:part")
    assert load_rows(f"{DATA}@v4:part-2") == [{"text": "2"}]


def test_csv_is_read_where_there_is_nothing_else(hub):
    table = b"text\na\n"
    hub.add(f"datasets/{DATA}", {"train.csv": table, "test.csv": b"text\nb\n"})
    assert load_rows(DATA) == [{"text": "a"}] and load_rows(f"{DATA}:test") == [{"text": "b"}]
    hub.add(f"datasets/{DATA}", {"scores.csv": table, "rows.json": b'{"text": "c"}'}, "v2")
    assert load_rows(f"{DATA}@v2") == [{"text": "c"}]


def test_a_data_set_is_pinned_to_its_commit(hub):
    old = hub.add(f"datasets/{DATA}", {"rows.jsonl": b'{"text": "old"}'})
    hub.add(f"datasets/{DATA}", {"rows.jsonl": b'{"text": "new"}'})
    hub.add(f"datasets/{DATA}", {"rows.jsonl": b'{"text": "asked for"}'}, "refs/pr/1")
    assert load_rows(DATA) == [{"text": "new"}]
    hub.add(f"datasets/{DATA}", {"rows.jsonl": b'{"text": "newer"}'})
    assert load_rows(DATA) == [{"text": "new"}], "a run's rows and fingerprint must be of one commit"
    assert load_rows(f"{DATA}@{old}") == [{"text": "old"}]
    assert load_rows(f"{DATA}@refs/pr/1") == [{"text": "asked for"}]
    assert commit_of(data_files(f"{DATA}@{old}")[0]) == old


def test_compressed_files_of_a_hub_data_set(hub):
    line = gzip.compress(b'{"text": "a"}')
    shards = {f"b/train-0000{number}-of-00002.jsonl.gz": line for number in range(2)}
    hub.add(f"datasets/{DATA}", {"a/train.jsonl.gz": line, "a/test.jsonl.gz": line} | shards)
    assert f"(a/train, b/train): name one of them, as in {DATA}:a/train" in refused(load_rows, DATA)
    assert load_rows(f"{DATA}:a/train") == [{"text": "a"}]
    assert load_rows(f"{DATA}:b/train") == [{"text": "a"}] * 2


@pytest.mark.parametrize(
    "files, asked, words",
    [
        ({"data.tsv": b"", "README.md": b""}, "", "no .json, .jsonl, .parquet, .csv file in it"),
        ({"data.tsv": b"", "README.md": b""}, "", f"try {DATA}@refs/convert/parquet, or convert one"),
        (
            {"train.json": b"", "train.json.gz": b""},
            "",
            f"several formats (train.json, train.json.gz): try {DATA}@refs/",
        ),
        ({"test.json": b"", "dev.json": b""}, "", "no train split, expected test or validation"),
        ({"train.json": b""}, ":test", "no test split, expected train"),
        ({"rows.json": b""}, ":test", "no test split, as no path names one: leave :test out"),
        ({"train.json": b"", "train.parquet": b""}, "", "files of several formats (train.json, train.parquet)"),
        ({"a/train-00000-of-00001.json": b"", "b/train.json": b""}, "", "train split (a/train, b/train): name one of"),
        ({"train_sft-0.json": b"", "train_gen-0.json": b""}, ":train", f"as in {DATA}:train_gen"),
        ({"train.json": b'{"instruction": "a"}'}, "", "train.json:1: field 'output' is missing"),
    ],
)
def test_data_sets_that_cannot_be_read(hub, files, asked, words):
    hub.add(f"datasets/{DATA}", files)
    message = refused(load_rows, DATA + asked)
    assert words in message and DATA.replace("/", "--" if ":1:" in words else "/") in message


# ------------------------------------------------------------------------------------------------------------ commands


def execute(hub: Hub, tmp_path: Path, *command: object, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "TQDM_POSITION": "-1",  # progress bars although stderr is not a terminal
        "NO_PROXY": "127.0.0.1,localhost",
    } | environment
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "0"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_command_configured_by_the_environment(hub, tmp_path, tokenizer_directory):
    """Users set HF_ENDPOINT and HF_HUB_OFFLINE; progress is shown; status 1 for the hub's fault, 2 for the user's."""
    hub.add(MODEL, files_of(tokenizer_directory))
    hub.add(f"datasets/{DATA}", {"train.jsonl": b'{"instruction": "a", "output": "b"}'})
    preview = ("-m", "minift", "preview", "--model", MODEL, "--data", DATA)
    done = execute(hub, tmp_path, *preview)
    assert done.returncode == 2 and "error: someone/opt-tiny at" in done.stderr and "config.json" in done.stderr
    hub.add(MODEL, files_of(tokenizer_directory) | {"config.json": b"{}"})
    done = execute(hub, tmp_path, *preview)
    assert done.returncode == 0, done.stderr
    assert "vocab.json" in done.stderr and "100%" in done.stderr, "no progress was shown"
    hub.status = 503
    offline = execute(hub, tmp_path, *preview, HF_HUB_OFFLINE="1")
    assert (offline.returncode, offline.stdout) == (0, done.stdout), offline.stderr
    dead = execute(hub, tmp_path, *preview)
    assert dead.returncode == 1 and dead.stdout == ""
    assert re.fullmatch(r"error: the machine failed: someone/opt-tiny: .*503.*\n", dead.stderr)


def test_training_from_the_hub_equals_training_from_a_folder(hub, tmp_path, monkeypatch, tokenizer_directory):
    """Losses are bitwise equal for fp16 in sharded `.bin` and in one safetensors file; the commits are recorded."""
    config = replace(CONFIG, vocab_size=480, max_position_embeddings=64)
    torch.manual_seed(0)
    save_model(OPT(config), tmp_path / "folder", torch.float16)
    for path in tokenizer_directory.iterdir():
        (tmp_path / "folder" / path.name).write_bytes(path.read_bytes())
    state = {f"model.{name}": tensor.half() for name, tensor in load_model(tmp_path / "folder").state_dict().items()}
    files = files_of(tmp_path / "folder")
    del files["model.safetensors"]
    write_weights(tmp_path / "folder", "pytorch_model.bin.index.json", state)
    files |= {path.name: path.read_bytes() for path in (tmp_path / "folder").glob("pytorch_model*")}
    commit = hub.add(MODEL, files)
    lines = [json.dumps({"instruction": f"Add {n}.", "input": "", "output": f"return {n}"}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    data_commit = hub.add(f"datasets/{DATA}", {"train.jsonl": (tmp_path / "rows.jsonl").read_bytes()})

    monkeypatch.chdir(ROOT)
    records, losses = [], []
    for number, (model, data) in enumerate(((tmp_path / "folder", tmp_path / "rows.jsonl"), (MODEL, DATA))):
        out = tmp_path / f"run{number}"
        flags = ["--max-steps", "3", "--batch-size", "4", "--bleu-samples", "0", "--device", "cpu", "--lr", "1e-2"]
        flags += ["--model", str(model), "--data", str(data), "--out", str(out), "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", ["train_sft.py", *flags])
        train_sft.main()
        records.append(json.loads((out / "run.json").read_text()))
        metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in metrics])
    assert losses[0] == losses[1] and len(set(losses[0])) == len(losses[0]) == 5
    assert records[0]["commits"] == {"data": None, "weights": None}
    assert records[1]["commits"] == {"data": data_commit, "weights": commit}
    assert records[0]["fingerprints"]["data"] == records[1]["fingerprints"]["data"]
    assert hub.downloads() == [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]

    # Resumed after both branches have moved, the run keeps and records its commits.
    hub.add(MODEL, files | {"model.safetensors": b""})
    hub.add(f"datasets/{DATA}", {"train.jsonl": b'{"instruction": "other", "output": "rows"}'})
    forget()
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *flags, "--resume"])
    train_sft.main()
    assert json.loads((out / "run.json").read_text())["commits"] == records[1]["commits"]
    for damaged in (5, ["a"], "main"):
        (out / "run.json").write_text(json.dumps(records[1] | {"commits": {"weights": damaged}}))
        with pytest.raises(UserError, match="--resume: the (data|weights) was|truncated"):
            train_sft.main()
    (out / "run.json").write_text(json.dumps(records[1]))
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *flags, "--resume", "--data", f"{DATA}@{data_commit}"])
    train_sft.main()  # the same rows by another name
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *flags, "--resume", "--model", "someone/else"])
    with pytest.raises(UserError, match="someone/else: no such"):
        train_sft.main()


@pytest.mark.parametrize("task", ["sft", "rm"])
def test_the_courses_own_names(hub, tmp_path, monkeypatch, tokenizer_directory, task):
    """`make sft RECIPE=course` and `make rm RECIPE=course` work with these names; only the sizes differ."""
    torch.manual_seed(0)
    config = replace(CONFIG, vocab_size=480, max_position_embeddings=64, hidden_size=32, ffn_dim=64)
    save_model(OPT(config), tmp_path / "model", torch.float16)
    weights = hub.add("facebook/opt-350m", files_of(tmp_path / "model") | files_of(tokenizer_directory))
    answers = [{"instruction": f"Add {n}.", "input": "1" * (n % 2), "output": f"return {n}"} for n in range(20)]
    page = "datasets/sahil2801/CodeAlpaca-20k"
    data = hub.add(page, {"code_alpaca_20k.json": json.dumps(answers).encode(), "README.md": b""})
    if task == "rm":
        page = "datasets/Dahoas/synthetic-instruct-gptj-pairwise"
        data = hub.add(page, {"data/train-00000-of-00001-1e5d57b93c448e7a.parquet": parquet(pairs(*"abcdefghij"))})

    monkeypatch.chdir(ROOT)
    flags = ["--recipe", "course", "--max-steps", "2", "--out", str(tmp_path / "run"), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [f"train_{task}.py", *flags, *(["--bleu-samples", "1"] if task == "sft" else [])])
    {"sft": train_sft, "rm": train_rm}[task].main()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["commits"] == {"data": data, "weights": weights}
    values = [
        "facebook/opt-350m",
        page.removeprefix("datasets/"),
        {"sft": 10, "rm": 3}[task],
        {"sft": 16, "rm": 8}[task],
    ]
    assert [record["values"][name] for name in ("model", "data", "epochs", "lora_rank")] == values
    settings = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("facebook/opt-350m", weights)
