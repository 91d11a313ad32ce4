"""The file of `lowbit tune`: where it lies, what survives in it, what is refused."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowbit.ops import tuning_file
from lowbit.ops.tuning_file import Entry, UnreadableError

MARK = {"op": "linear", "gpu": "GPU A", "triton": "3.6.0", "source": "abc"}
ENTRY = Entry("int8_row", 48, 64, 512, 512, "reference", 0.5, "triton", 0.75)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "folder" / tuning_file.FILE


def entries(file: Path, mark=MARK) -> list[Entry]:
    return [e for part in tuning_file.read(file) if part.mark == mark for e in part.entries]


def changes(*found: Entry) -> dict:
    return {entry.key: entry for entry in found}


def test_what_is_written_is_read(file):
    tile = dataclasses.replace(ENTRY, scheme="int8", choice={"block_m": 16}, instead_ms=None)
    tuning_file.update(file, MARK, changes(ENTRY, tile))
    assert sorted(entries(file), key=lambda e: e.scheme) == [tile, ENTRY]
    assert [p.name for p in file.parent.iterdir() if p.suffix not in (".lock", ".json")] == []


def test_no_file_holds_nothing(file):
    assert tuning_file.read(file) == []


def test_an_entry_replaces_that_of_its_key_and_none_removes_it(file):
    other = dataclasses.replace(ENTRY, m=1024)
    tuning_file.update(file, MARK, changes(ENTRY, other))
    faster = dataclasses.replace(ENTRY, ms=0.25)
    tuning_file.update(file, MARK, {faster.key: faster, other.key: None})
    assert entries(file) == [faster]


def test_other_gpus_operations_and_versions_stay(file):
    others = [{**MARK, "gpu": "GPU B"}, {**MARK, "op": "scaled_mm"}, {**MARK, "triton": "3.5.0"}]
    for mark in others:
        tuning_file.update(file, mark, changes(ENTRY))
    tuning_file.update(file, MARK, changes(dataclasses.replace(ENTRY, m=1)))
    tuning_file.update(file, MARK, {dataclasses.replace(ENTRY, m=1).key: None})
    assert [entries(file, mark) for mark in others] == [[ENTRY]] * 3
    assert entries(file) == []


def test_entries_of_another_source_go_when_new_ones_come(file):
    old = {**MARK, "source": "older"}
    tuning_file.update(file, old, changes(ENTRY))
    assert entries(file, old) == [ENTRY]
    tuning_file.update(file, MARK, changes(ENTRY))
    assert entries(file, old) == []


def content(**changed) -> str:
    entry = {**dataclasses.asdict(ENTRY), **changed}
    return json.dumps({"schema": 1, "sections": [{"for": MARK, "entries": [entry]}]})


UNREADABLE = {
    "empty": "",
    "cut": content()[:50],
    "no object": "[1, 2]",
    "foreign": '{"name": "another tool"}',
    "binary": "\x00\x01",
    "deep": "[" * 100_000,
    "old": '{"schema": 0, "sections": []}',
    "newer": '{"schema": 2, "sections": {}}',
    "sections of another kind": '{"schema": 1, "sections": 5}',
    "section without a mark": '{"schema": 1, "sections": [{"entries": []}]}',
    "entry that is a number": json.dumps(
        {"schema": 1, "sections": [{"for": MARK, "entries": [3]}]}
    ),
    "size of text": content(n="48"),
    "size that is true": content(m=True),
    "scheme of no text": content(scheme=None),
    "time below zero": content(ms=-1),
    "time that is no number": content(instead_ms="fast"),
    "field too many": content(colour="red"),
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE)
def test_another_content_is_refused_with_a_reason(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(UnreadableError, match=r"\w"):
        tuning_file.read(file)


def test_bytes_that_are_no_text_are_refused(file):
    file.parent.mkdir()
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UnreadableError):
        tuning_file.read(file)


def test_a_file_that_is_not_understood_is_set_aside_not_lost(file, caplog):
    file.parent.mkdir()
    file.write_text(UNREADABLE["newer"])
    tuning_file.update(file, MARK, changes(ENTRY))
    assert entries(file) == [ENTRY]
    assert file.with_name(tuning_file.SET_ASIDE).read_text() == UNREADABLE["newer"]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "schema 2" in caplog.text


def test_the_file_is_as_it_was_when_writing_fails(file, monkeypatch):
    tuning_file.update(file, MARK, changes(ENTRY))
    before = file.read_bytes()

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning_file.update(file, MARK, changes(dataclasses.replace(ENTRY, m=1)))
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.part"))


WRITER = """
import dataclasses, sys
from pathlib import Path
from lowbit.ops import tuning_file
entry = tuning_file.Entry("int8_row", 48, 64, 512, 512, "reference", 0.5, "triton", 0.75)
for i in range(20):
    found = dataclasses.replace(entry, n=int(sys.argv[2]) * 100 + i)
    tuning_file.update(Path(sys.argv[1]), {"op": "linear"}, {found.key: found})
"""


def test_two_processes_lose_nothing(file):
    runs = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(file), str(i)], stderr=subprocess.PIPE)
        for i in (1, 2)
    ]
    for run in runs:
        _, error = run.communicate(timeout=120)
        assert run.returncode == 0, error.decode()
    assert {e.n for e in entries(file, {"op": "linear"})} == {
        100 * i + j for i in (1, 2) for j in range(20)
    }


def test_clearing_tells_how_many_there_were(file):
    assert tuning_file.clear(file) == 0
    tuning_file.update(file, MARK, changes(ENTRY, dataclasses.replace(ENTRY, m=1)))
    assert tuning_file.clear(file) == 2
    assert not file.exists()


def test_clearing_removes_what_cannot_be_read(file):
    file.parent.mkdir()
    file.write_text("nonsense")
    assert tuning_file.clear(file) == 0
    assert not file.exists()
