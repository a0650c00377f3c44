"""Shards: the file format, its faults, and the stateless reading order."""

import os
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmon.data.shards import HEADER_BYTES, MAGIC, Windows, _permute, find_files, read_shard, write_shard


def raw(path, *, magic=MAGIC, version=1, count=10, body=None):
    header = struct.pack("<3i", magic, version, count).ljust(HEADER_BYTES, b"\0")
    path.write_bytes(header + (np.arange(count, dtype="<u2").tobytes() if body is None else body))
    return path


def test_written_shard_has_the_published_layout(tmp_path):
    write_shard(tmp_path / "a.bin", np.array([0, 1, 258, 65535]))
    data = (tmp_path / "a.bin").read_bytes()
    assert len(data) == 1024 + 8
    assert struct.unpack("<3i", data[:12]) == (20240520, 1, 4)
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == b"\x00\x00\x01\x00\x02\x01\xff\xff"


@given(tokens=st.lists(st.integers(0, 65535), max_size=50))
@settings(max_examples=30, deadline=None)
def test_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, np.array(tokens, dtype=np.int64))
    back = read_shard(path)
    assert back.dtype == np.uint16
    assert back.tolist() == tokens


def test_shard_is_mapped_and_read_only(tmp_path):
    tokens = read_shard(raw(tmp_path / "a.bin"))
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"magic": 7}, "does not start with the magic number 20240520, got 7"),
        ({"version": 2}, "has format version 2, this reader knows 1"),
        ({"body": b"\0" * 19}, "is truncated: 10 tokens need 1044 bytes, the file has 1043"),
        (
            {"body": b"\0" * 22},
            "is longer than its header says: 10 tokens need 1044 bytes, the file has 1046",
        ),
        ({"count": -1, "body": b""}, "has a negative number of tokens in its header: -1"),
    ],
)
def test_faults_in_the_file(tmp_path, change, says):
    path = raw(tmp_path / "bad.bin", **change)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        read_shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_header_cut_short(tmp_path):
    path = tmp_path / "short.bin"
    path.write_bytes(struct.pack("<3i", MAGIC, 1, 0))
    with pytest.raises(ValueError, match="is truncated: 12 bytes, less than its 1024-byte header"):
        read_shard(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"shard .*gone\.bin does not exist"):
        read_shard(tmp_path / "gone.bin")
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find_files(str(tmp_path / "*.bin"))
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(FileNotFoundError, match="no file matches"):
        find_files(str(tmp_path / "*.bin"))


def test_files_come_sorted_and_from_subfolders(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("c.bin", "a.bin", "b/d.bin"):
        raw(tmp_path / name)
    assert find_files(str(tmp_path / "**/*.bin")) == [
        tmp_path / name for name in ("a.bin", "b/d.bin", "c.bin")
    ]


def test_vocabulary_is_checked_on_opening(tmp_path):
    path = raw(tmp_path / "a.bin")  # tokens 0..9
    assert len(read_shard(path, vocab_size=10)) == 10
    with pytest.raises(ValueError, match=r"a\.bin holds token id 9, the model's vocabulary ends at 8"):
        read_shard(path, vocab_size=9)


def test_vocabulary_is_checked_on_every_read():
    tokens = np.zeros(100, dtype=np.uint16)
    tokens[70] = 50
    windows = Windows([tokens], seq_len=10, seed=0, vocab_size=50, source="these shards")
    windows.read(np.array([0, 5, 8]))
    with pytest.raises(ValueError, match="these shards holds token id 50, the model's vocabulary ends at 49"):
        windows.read(np.array([7]))
    with pytest.raises(ValueError, match="token id 50"):  # as the target of the window before
        windows.read(np.array([6]))


@pytest.mark.parametrize("ids", [[-1], [65536]])
def test_ids_that_do_not_fit_are_not_written(tmp_path, ids):
    with pytest.raises(ValueError, match=r"must lie in \[0, 65536\)"):
        write_shard(tmp_path / "x.bin", np.array(ids))
    with pytest.raises(ValueError, match=r"1-D array of token ids, got shape \(1, 2\)"):
        write_shard(tmp_path / "x.bin", np.zeros((1, 2), dtype=np.int64))
    assert list(tmp_path.iterdir()) == []


def test_write_is_all_or_nothing(tmp_path, monkeypatch):
    write_shard(tmp_path / "x.bin", np.arange(5))

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "x.bin", np.arange(9))
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    assert read_shard(tmp_path / "x.bin").tolist() == [0, 1, 2, 3, 4]


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(n, seed, epoch):
    places = np.arange(n, dtype=np.uint64)
    order = _permute(places, np.full(n, epoch, dtype=np.uint64), n=n, seed=seed)
    assert np.array_equal(np.sort(order), np.arange(n))


def test_order_looks_random():
    # Neighbours in a random order of n are n / 3 apart on average; epochs and seeds are unrelated.
    n = 20000
    places = np.arange(n, dtype=np.uint64)
    first, second = (_permute(places, np.full(n, e, dtype=np.uint64), n=n, seed=1) for e in (0, 1))
    other = _permute(places, np.zeros(n, dtype=np.uint64), n=n, seed=2)
    for order in (first, second, other):
        assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.03
        assert (order == np.arange(n)).sum() < 10
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.03
    for a, b in ((first, second), (first, other), (second, other)):
        assert (a == b).sum() < 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.03


def test_order_is_pinned():
    # A run resumed by another version must go on in the same data: these numbers may not change.
    windows = Windows([np.zeros(1001, dtype=np.uint16)], seq_len=10, seed=1337, vocab_size=1)
    assert len(windows) == 100
    assert windows.order(np.arange(8)).tolist() == [88, 84, 50, 78, 31, 37, 56, 68]
    assert windows.order(np.array([10**12 + 7])).tolist() == [65]


def test_windows_cut_the_tokens():
    # Two arrays: 3 windows of 4 in the first (13 tokens), 1 in the second (8 tokens: 1 window, tail unread).
    a, b = np.arange(13, dtype=np.uint16), np.arange(100, 108, dtype=np.uint16)
    windows = Windows([a, b], seq_len=4, seed=0, vocab_size=1000)
    assert len(windows) == 4
    assert windows.read(np.arange(4)).tolist() == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
        [100, 101, 102, 103, 104],
    ]


def test_a_short_array_among_others_is_skipped():
    arrays = [np.arange(3, dtype=np.uint16), np.arange(10, 15, dtype=np.uint16), np.zeros(0, dtype=np.uint16)]
    windows = Windows(arrays, seq_len=4, seed=0, vocab_size=1000)
    assert windows.read(np.arange(len(windows))).tolist() == [[10, 11, 12, 13, 14]]


@pytest.mark.parametrize("arrays", [[], [np.zeros(4, dtype=np.uint16)]])
def test_too_few_tokens(arrays):
    have = len(arrays[0]) if arrays else 0
    with pytest.raises(
        ValueError, match=f"that file has {have} tokens in a row, a window of seq_len 4 needs 5"
    ):
        Windows(arrays, seq_len=4, seed=0, vocab_size=10, source="that file")


def test_batches_walk_through_epochs():
    windows = Windows([np.arange(71, dtype=np.uint16)], seq_len=10, seed=3, vocab_size=100)
    assert len(windows) == 7
    firsts = np.concatenate([windows.batch(i, size=2)[:, 0] for i in range(7)]) // 10
    assert sorted(firsts[:7]) == list(range(7))
    assert sorted(firsts[7:]) == list(range(7))
    assert list(firsts[:7]) != list(firsts[7:])


def test_batch_needs_nothing_before_it():
    tokens = np.arange(5001, dtype=np.uint16)
    one = Windows([tokens], seq_len=10, seed=3, vocab_size=5001)
    walked = [one.batch(i, size=4) for i in range(200)]
    jumped = Windows([tokens], seq_len=10, seed=3, vocab_size=5001).batch(199, size=4)
    assert np.array_equal(walked[199], jumped)
    # The micro-batch size only groups the samples: 2 of 2 are 1 of 4.
    halves = np.concatenate([one.batch(398, size=2), one.batch(399, size=2)])
    assert np.array_equal(halves, jumped)


def test_evaluation_windows_cover_the_data_evenly():
    windows = Windows([np.zeros(1001, dtype=np.uint16)], seq_len=10, seed=3, vocab_size=1)
    assert windows.spread(4).tolist() == [0, 25, 50, 75]
    assert windows.spread(1000).tolist() == list(range(100))
