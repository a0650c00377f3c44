"""Token shards on disk, and the order in which a run reads them.

A shard is the file format of modded-nanogpt and llm.c: 256 little-endian int32 words of header (magic
20240520, version 1, number of tokens, zeros), then that many uint16 tokens. Shards are memory-mapped, so a
run touches only the pages it reads.

Windows cuts the tokens into fixed windows and reads them in a seeded order that needs no state: the position
in the run is the whole state, and any position is reached at once.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.uint16]

MAGIC = 20240520
VERSION = 1
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_VOCAB = 1 << 16  # what uint16 can hold
CHECKED_TOKENS = 1 << 20  # leading tokens of a shard compared with the vocabulary when it is opened: 2 MiB


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` one after the other as the file `path`: all of it or nothing, also after a power cut.

    The bytes go to a temporary file in the same folder, reach the disk (fsync), and take the name by rename;
    several processes may write the same file at once, the last one wins. Raises OSError as the system does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_shard(
    path: str | Path,
    tokens: NDArray[np.integer],  # (n,)
) -> None:
    """Write `tokens` as a shard at `path`, atomically; ValueError when an id does not fit uint16."""
    if tokens.ndim != 1:
        raise ValueError(f"a shard holds a 1-D array of token ids, got shape {tokens.shape}")
    if tokens.size and (int(tokens.min()) < 0 or int(tokens.max()) >= MAX_VOCAB):
        raise ValueError(f"token ids must lie in [0, {MAX_VOCAB}), got {tokens.min()} to {tokens.max()}")
    header = np.zeros(HEADER_WORDS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    body = np.ascontiguousarray(tokens, dtype="<u2")
    write_atomically(Path(path), header.data.cast("B"), body.data.cast("B") if body.size else b"")


def find_files(pattern: str) -> list[Path]:
    """Return the files that the glob `pattern` matches, sorted, ** crossing folders; FileNotFoundError."""
    found = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
    files = [path for path in found if path.is_file()]
    if not files:
        raise FileNotFoundError(f"no file matches {pattern!r}")
    return files


def read_shard(
    path: str | Path,
    *,
    vocab_size: int | None = None,
) -> Tokens:
    """Return the tokens of one shard, (n,) uint16, memory-mapped read-only.

    FileNotFoundError when it is missing; ValueError, one sentence, on a wrong magic or version, a negative count,
    a size other than the header promises, or a token id >= `vocab_size` among the first 2^20 (Windows checks every
    later one as it is read, so that opening 100 shards does not read 20 GB).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} does not exist")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise ValueError(f"shard {path} is truncated: {size} bytes, less than its {HEADER_BYTES}-byte header")
    magic, version, count = (int(word) for word in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ValueError(f"shard {path} does not start with the magic number {MAGIC}, got {magic}")
    if version != VERSION:
        raise ValueError(f"shard {path} has format version {version}, this reader knows {VERSION}")
    if count < 0:
        raise ValueError(f"shard {path} has a negative number of tokens in its header: {count}")
    wanted = HEADER_BYTES + 2 * count
    if size != wanted:
        fault = "is truncated" if size < wanted else "is longer than its header says"
        raise ValueError(f"shard {path} {fault}: {count} tokens need {wanted} bytes, the file has {size}")
    if count == 0:
        return np.zeros(0, dtype=np.uint16)
    tokens: Tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size is not None:
        check_vocabulary(tokens[:CHECKED_TOKENS], vocab_size=vocab_size, source=f"shard {path}")
    return tokens


def check_vocabulary(
    tokens: NDArray[np.integer],  # (...)
    *,
    vocab_size: int,
    source: str,
) -> None:
    """Raise ValueError when a token id has no row in an embedding of `vocab_size` rows."""
    if tokens.size and (top := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{source} holds token id {top}, the model's vocabulary ends at {vocab_size - 1}")


class Windows:
    """Token arrays cut into windows of `seq_len` inputs and their next tokens, in a seeded endless order.

    Window i of an array covers tokens [i T, i T + T], T = seq_len: its last token is only a target here and
    the first input of the next window. Windows do not cross arrays; a tail shorter than T + 1 is never read.
    Sample number s belongs to epoch s // len; inside an epoch every window comes once, in an order drawn from
    (seed, epoch) by a permutation that is computed, not stored. So a run's position is one integer, no array
    of indices is kept, and a resumed or differently distributed run reads the same windows.
    """

    def __init__(
        self,
        arrays: Sequence[Tokens],
        *,
        seq_len: int,
        seed: int,
        vocab_size: int,
        source: str = "the data",
    ) -> None:
        if seq_len < 1:
            raise ValueError(f"seq_len must be at least 1, got {seq_len}")
        self.arrays, self.seq_len, self.seed, self.source = list(arrays), seq_len, seed, source
        self.vocab_size = vocab_size
        counts = [max(0, (len(array) - 1) // seq_len) for array in self.arrays]
        self.ends = np.cumsum(counts)
        if not counts or self.ends[-1] == 0:
            longest = max((len(array) for array in self.arrays), default=0)
            raise ValueError(
                f"{source} has {longest} tokens in a row, a window of seq_len {seq_len} needs {seq_len + 1}"
            )

    def __len__(self) -> int:
        """Number of windows, the samples of one epoch."""
        return int(self.ends[-1])

    def order(
        self,
        samples: NDArray[np.integer],  # (k,), >= 0
    ) -> NDArray[np.int64]:
        """Return the windows that the samples number `samples` of the run are, (k,)."""
        n = len(self)
        epochs, places = np.divmod(samples.astype(np.uint64), np.uint64(n))
        return _permute(places, epochs, n=n, seed=self.seed)

    def read(
        self,
        windows: NDArray[np.int64],  # (k,)
    ) -> NDArray[np.int64]:
        """Return the tokens of `windows`, (k, seq_len + 1); ValueError on an id outside the vocabulary."""
        out = np.empty((len(windows), self.seq_len + 1), dtype=np.int64)
        for row, window in enumerate(windows):
            which = int(np.searchsorted(self.ends, window, side="right"))
            start = (int(window) - (int(self.ends[which - 1]) if which else 0)) * self.seq_len
            out[row] = self.arrays[which][start : start + self.seq_len + 1]
        check_vocabulary(out, vocab_size=self.vocab_size, source=self.source)
        return out

    def batch(
        self,
        index: int,
        *,
        size: int,
    ) -> NDArray[np.int64]:
        """Return micro-batch `index`, the samples [index size, (index + 1) size): (size, seq_len + 1)."""
        return self.read(self.order(np.arange(index * size, (index + 1) * size)))

    def spread(
        self,
        count: int,
    ) -> NDArray[np.int64]:
        """Return `count` windows at equal distances over all the data, (min(count, len),): for evaluation."""
        count = min(count, len(self))
        return np.arange(count, dtype=np.int64) * len(self) // count


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of words that mixes every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(
    places: NDArray[np.uint64],  # (k,), < n
    epochs: NDArray[np.uint64],  # (k,)
    *,
    n: int,
    seed: int,
) -> NDArray[np.int64]:
    """Map place -> window within each epoch, a bijection of [0, n) for every (seed, epoch).

    A Feistel network of six rounds permutes [0, 4^h) with 4^h >= n; a value that falls outside [0, n) is sent
    through again until it falls inside (cycle walking, Black & Rogaway 2002), at most four passes on average.
    """
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    key = _mix(_mix(np.full_like(places, seed) + np.uint64(0x9E3779B97F4A7C15)) + epochs)
    out, todo = places.copy(), np.arange(len(places))
    while len(todo):
        left, right, keys = out[todo] >> half, out[todo] & mask, key[todo]
        for turn in range(6):
            left, right = right, left ^ (_mix(keys + (right << np.uint64(3)) + np.uint64(turn)) & mask)
        out[todo] = (left << half) | right
        todo = todo[out[todo] >= n]
    return out.astype(np.int64)
