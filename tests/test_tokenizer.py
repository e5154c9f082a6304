"""The tokenizer against transformers' own (the reference), on strings made to be hard."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, processors
from transformers import AutoTokenizer

from minift.errors import UserError
from minift.files.text import read_bytes
from minift.files.tokenizer import check_fits, load_tokenizer, save_tokenizer
from minift.tokenizer import Special
from tests.compare.tokenizer import compare_tokenizers, hard_texts

NAMES = ["</s>", "<pad>", "<unk>", "<mask>", "<|endoftext|>"]
TEXTS = ["", " ", "\0", "</s>", *hard_texts([*NAMES, "{", "}", "a"], 600)]


def assert_equal_to_reference(directory: Path) -> None:
    reference, ours = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    assert (ours.eos_token, ours.eos_token_id) == (reference.eos_token, reference.eos_token_id)
    assert ours.vocab_size == max(reference.get_vocab().values()) + 1
    assert [check for check in compare_tokenizers(reference, ours, TEXTS) if not check.agrees] == []


def test_equal_to_reference_from_vocab_and_merges(tokenizer_directory):
    assert_equal_to_reference(tokenizer_directory)


def test_equal_to_reference_from_tokenizer_json(tokenizer_directory, gpt2_tokenizer_directory, tmp_path):
    assert_equal_to_reference(gpt2_tokenizer_directory)
    AutoTokenizer.from_pretrained(tokenizer_directory).save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and not (tmp_path / "vocab.json").exists()
    assert_equal_to_reference(tmp_path)


def test_equal_to_reference_on_opt_itself(real_data):
    assert_equal_to_reference(real_data / "opt_tokenizer")
    opt = load_tokenizer(real_data / "opt_tokenizer")
    assert (opt.bos_token_id, opt.eos_token_id, opt.pad_token_id, opt.vocab_size) == (2, 2, 1, 50265)
    assert [opt.encode(text) for text in ("", "Hello world", "\0")] == [[2], [2, 31414, 232], [2, 50108]]
    assert opt.decode([31414, 50265, 50271]) == "Hello"


def test_text_that_spells_a_special_token_is_text(tokenizer, gpt2_tokenizer_directory):
    """Encode `</s>` in a row as text: as a token, as in the reference, a row could end its own response."""
    gpt2 = load_tokenizer(gpt2_tokenizer_directory)
    for ours, name in ((tokenizer, "</s>"), (tokenizer, "<pad>"), (gpt2, "<|endoftext|>")):
        text = f"print('{name}')"
        ids = ours.encode(text)[ours.bos_token_id is not None :]
        (token,) = ours.encode(["", Special(name)])[ours.bos_token_id is not None :]
        assert token not in ids
        assert ours.decode(ids) == text


def test_special_pieces_are_one_token_and_plain_pieces_join(tokenizer):
    text = "def add(first, second):\n    return first"
    assert tokenizer.encode(list(text)) == tokenizer.encode(text)
    assert len(tokenizer.encode(list(text))) < len(text), "nothing was merged, so this tests nothing"
    ids = tokenizer.encode(["def", " add", Special("<pad>"), Special("</s>"), " add"])
    assert ids == [*tokenizer.encode("def add"), 1, 2, *tokenizer.encode(" add")[1:]]
    with pytest.raises(ValueError, match="no token '<nothing>'"):
        tokenizer.encode([Special("<nothing>")])


def test_bos_is_neither_missing_nor_doubled(tokenizer, gpt2_tokenizer_directory):
    gpt2 = load_tokenizer(gpt2_tokenizer_directory)
    assert tokenizer.bos_token_id == 2 and gpt2.bos_token_id is None
    for name, ours in (("</s>", tokenizer), ("<|endoftext|>", gpt2)):
        ids = ours.encode([Special(name), "x"])
        assert ids == [ours.eos_token_id, *ours.encode("x")[-1:]]
    # With OPT's BOS and EOS the same, an empty text and its end token are two tokens, not one.
    assert tokenizer.encode(["", Special("</s>")]) == [2, 2]
    assert tokenizer.encode([]) == [2] and gpt2.encode("") == []


def test_pad_falls_back_to_eos(tokenizer, gpt2_tokenizer_directory):
    assert tokenizer.pad_token_id == 1
    assert load_tokenizer(gpt2_tokenizer_directory).pad_token_id == 0


def test_offsets_cover_every_character(tokenizer_directory, gpt2_tokenizer_directory):
    """Ignore GPT-2's own post-processor, which trims spaces off, so that no token covers them."""
    for directory in (tokenizer_directory, gpt2_tokenizer_directory):
        ours = load_tokenizer(directory)
        for text in TEXTS:
            ids, offsets = ours.encode_with_offsets(text)
            assert ids == ours.encode(text) and len(ids) == len(offsets)
            covered = {index for start, end in offsets for index in range(start, end)}
            assert covered == set(range(len(text))), repr(text)
    ids, offsets = load_tokenizer(tokenizer_directory).encode_with_offsets("a 😀")
    assert offsets[0] == (0, 0) and offsets[-1] == (2, 3) and ids[0] == 2


def test_lone_surrogates_are_named(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at character 3"):
            encode("ab\ud83d")


def test_save_is_byte_for_byte(tokenizer_directory, tmp_path):
    original = tmp_path / "original"
    shutil.copytree(tokenizer_directory, original)
    (original / "special_tokens_map.json").write_text('{"eos_token":   {"content": "</s>", "lstrip": false}}')
    (original / "added_tokens.json").write_text("{}")
    (original / "config.json").write_text("{}")
    ours = load_tokenizer(original)
    before = {path.name: path.read_bytes() for path in original.iterdir()}
    shutil.rmtree(original)  # saving must not depend on files that may change during a run
    save_tokenizer(ours, tmp_path / "run")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert saved == {name: content for name, content in before.items() if name != "config.json"}


def test_vocab_alone_is_assumed_to_be_opts_and_saved_so_that_the_reference_agrees(tokenizer_directory, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_directory / name, tmp_path)
    ours = load_tokenizer(tmp_path)
    assert ours.encode("x") == load_tokenizer(tokenizer_directory).encode("x")
    save_tokenizer(ours, tmp_path / "run")
    assert_equal_to_reference(tmp_path / "run")


def test_special_tokens_from_each_file(tokenizer_directory, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(tokenizer_directory / name, tmp_path)
    # The layout of facebook/opt-350m: objects in one file, strings or nothing in the other.
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "tokenizer_class": "GPT2Tokenizer"}')
    tokens = {f"{name}_token": {"content": "</s>", "normalized": True} for name in ("bos", "eos", "unk")}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(tokens | {"pad_token": "<pad>"}))
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_token_id, ours.eos_token, ours.pad_token_id) == (2, "</s>", 1)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": ours.vocab_size}))
    assert_equal_to_reference(tmp_path)
    assert load_tokenizer(tmp_path).encode("a<extra>")[-1] == ours.vocab_size


def test_which_file_wins_if_they_disagree(tokenizer_directory, tmp_path):
    shutil.copytree(tokenizer_directory, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"eos_token": "<unk>"}
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    decoder = {"1": {"content": "<pad>", "special": True}, "2": {"content": "</s>", "special": True}}
    for settings, eos_token in ((config, "</s>"), (config | {"added_tokens_decoder": decoder}, "<unk>")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).eos_token == eos_token
        assert_equal_to_reference(tmp_path)


def test_config_json_names_the_eos_if_nothing_else_does(gpt2_tokenizer_directory, tmp_path):
    """Read Galactica's files: tokenizer.json, and no other file that names special tokens."""
    shutil.copy(gpt2_tokenizer_directory / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    assert load_tokenizer(tmp_path).eos_token == "<|endoftext|>"


def test_a_token_that_is_special_by_name_only_stays_safe(gpt2_tokenizer_directory, tmp_path):
    shutil.copytree(gpt2_tokenizer_directory, tmp_path, dirs_exist_ok=True)
    backend = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in backend["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    assert 0 not in load_tokenizer(tmp_path).encode("a<|endoftext|>b")


def test_dropout_is_off(gpt2_tokenizer_directory, tmp_path):
    """A tokenizer.json with BPE dropout would encode a text differently each time; it is saved as it is."""
    shutil.copytree(gpt2_tokenizer_directory, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    text = "def add(first, second):\n    return first + second\n"
    tokenizer, plain = load_tokenizer(tmp_path), load_tokenizer(gpt2_tokenizer_directory)
    assert all(tokenizer.encode(text) == plain.encode(text) for _ in range(20))
    assert tokenizer.files["tokenizer.json"] == (tmp_path / "tokenizer.json").read_bytes()


def broken_copies(opt: Path, gpt2: Path, target: Path):
    """Damage the folder `target` in many ways; yield each damage and the message expected."""

    def fresh(original: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(original, target)

    shutil.rmtree(target, ignore_errors=True)
    yield "no folder", "no tokenizer here"
    target.mkdir()
    yield "empty folder", "no tokenizer here"
    fresh(opt)
    (target / "merges.txt").unlink()
    yield "no merges", "no tokenizer here"
    fresh(opt)
    (target / "merges.txt").write_text("#version: 0.2\nqqqq zzzz\n")
    yield "merges of another vocabulary", "can't be read"
    (target / "merges.txt").write_text("#version: 0.2\na b\nab\n")
    yield "a merge of one token", "merges.txt: 'ab', expected two tokens"
    fresh(opt)
    (target / "vocab.json").write_text((opt / "vocab.json").read_text()[:500])
    yield "cut vocab.json", "vocab.json:1:"
    fresh(opt)
    vocabulary = json.loads((opt / "vocab.json").read_text())
    (target / "vocab.json").write_text(json.dumps({k: v for k, v in vocabulary.items() if k != "Ā"}))
    (target / "merges.txt").write_text("#version: 0.2\n")
    yield "a byte missing", "1 of the 256 byte symbols are missing"
    fresh(opt)
    (target / "tokenizer_config.json").write_text("{")
    yield "cut tokenizer_config.json", "tokenizer_config.json:1:2: malformed JSON"
    (target / "tokenizer_config.json").write_text("[]")
    yield "a list instead of an object", "expected a JSON object"
    (target / "tokenizer_config.json").write_text('{"eos_token": 2}')
    yield "an id instead of a name", "eos_token is 2, expected its text"
    (target / "tokenizer_config.json").write_text("{}")
    yield "no EOS", "its EOS token is '', expected one in its vocabulary"
    (target / "config.json").write_text('{"eos_token_id": -1}')
    yield "an EOS id below 0", "its EOS token is ''"
    for token_id in ("1e20", "100000000000000000000", "true", "9000", "[]"):
        (target / "config.json").write_text(f'{{"eos_token_id": {token_id}}}')
        yield f"the EOS id {token_id}", "its EOS token is ''"
    (target / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    yield "an EOS that is not a token", "its EOS token is '<eos>', expected one in its vocabulary"
    (target / "tokenizer_config.json").write_text('{"eos_token": "</s>", "add_bos_token": true}')
    yield "BOS without a name", "no bos_token in its vocabulary"
    fresh(opt)
    (target / "added_tokens.json").write_text('{"<extra>": 9000}')
    yield "a gap in the ids", "can't have id 9000"
    fresh(gpt2)
    (target / "tokenizer.json").write_text("{}")
    yield "an empty tokenizer.json", "can't be read"
    backend = tokenizers.Tokenizer.from_file(str(gpt2 / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("$A <|endoftext|>", None, [("<|endoftext|>", 0)])
    backend.save(str(target / "tokenizer.json"))
    yield "a post-processor that adds an EOS", "at most one token in front"
    backend.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", 99999)])
    backend.save(str(target / "tokenizer.json"))
    yield "a BOS outside of the vocabulary", "its BOS has id 99999"
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 2}
    for name, model in (
        ("WordPiece", models.WordPiece(vocabulary, unk_token="[UNK]")),
        ("WordLevel", models.WordLevel(vocabulary, unk_token="[UNK]")),
        ("Unigram", models.Unigram([("<|endoftext|>", 0.0), ("a", -1.0)])),
        ("BPE", models.BPE(vocabulary, [])),
    ):
        tokenizers.Tokenizer(model).save(str(target / "tokenizer.json"))
        yield f"{name} of three tokens", "text would be lost" if name == "BPE" else f"the algorithm is {name}"
    values = json.loads((gpt2 / "tokenizer.json").read_text())
    for charsmap in ("", "AAAA", "AAAAAA==", "!"):
        broken = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": charsmap}]}
        (target / "tokenizer.json").write_text(json.dumps(values | {"normalizer": broken}))
        yield "a damaged charsmap", "the algorithm is SentencePiece"
    for text in ("[]", "null", '{"model": null}', "[" * 100_000):
        (target / "tokenizer.json").write_text(text)
        yield "no tokenizer.json at all", "nested too deeply" if text[:2] == "[[" else "can't be read"


def test_broken_files_end_in_one_line(tokenizer_directory, gpt2_tokenizer_directory, tmp_path, capfd):
    target = tmp_path / "model"
    for damage, expected in broken_copies(tokenizer_directory, gpt2_tokenizer_directory, target):
        with pytest.raises(UserError) as caught:
            load_tokenizer(target)
        message = str(caught.value)
        assert expected in message and str(target) in message and "\n" not in message, (damage, message)
    assert capfd.readouterr().err == ""  # a panic of the library would print itself


def test_a_text_that_the_library_cannot_encode(gpt2_tokenizer_directory, tmp_path):
    values = json.loads((gpt2_tokenizer_directory / "tokenizer.json").read_text())
    del values["model"]["vocab"]["Z"]
    values["model"]["unk_token"] = "<nowhere>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    shutil.copy(gpt2_tokenizer_directory / "tokenizer_config.json", tmp_path)
    assert load_tokenizer(tmp_path).encode("a")
    with pytest.raises(ValueError, match="the tokenizer cannot encode it: "):
        load_tokenizer(tmp_path).encode("aZ")


def test_a_stored_truncation_is_not_used(gpt2_tokenizer_directory, tmp_path):
    values = json.loads((gpt2_tokenizer_directory / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | {"truncation": cut}))
    shutil.copy(gpt2_tokenizer_directory / "tokenizer_config.json", tmp_path)
    assert load_tokenizer(tmp_path).encode("a b c d") == load_tokenizer(gpt2_tokenizer_directory).encode("a b c d")


def test_check_fits(tokenizer):
    check_fits(tokenizer, tokenizer.vocab_size, "model")
    with pytest.raises(UserError, match="model: its tokenizer doesn't fit"):
        check_fits(tokenizer, tokenizer.vocab_size - 1, "model")


def test_an_io_error_is_not_a_broken_tokenizer(tokenizer_directory, tmp_path, monkeypatch):
    """It was called the user's mistake, with status 2."""
    folder = shutil.copytree(tokenizer_directory, tmp_path / "tokenizer")

    def fail(path):
        if Path(path).name == "merges.txt":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read_bytes(path)

    monkeypatch.setattr("minift.files.text.read_bytes", fail)
    with pytest.raises(OSError, match="Input/output error"):
        load_tokenizer(folder)
