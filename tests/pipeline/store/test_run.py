"""Files come into being whole or not at all; manifests are believed only while they are true."""

import threading
from contextlib import suppress

import numpy as np
import pytest
from conftest import flip_bit

from pipeline.errors import PipelineError
from pipeline.store import files as rundir
from pipeline.store.arrays import read_arrays, write_arrays


def test_a_failed_write_leaves_nothing(tmp_path):
    for folder in (False, True):
        with pytest.raises(RuntimeError), rundir.write_atomically(tmp_path / "x", folder=folder) as temporary:
            (temporary / "half" if folder else temporary).write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_while_threads_read_and_seal_it(tmp_path):
    folder, stop = tmp_path / "report", threading.Event()

    def replace(text):
        with rundir.write_atomically(folder, folder=True) as new:
            rundir.write_text(new / "page", text)
            rundir.write_manifest(new, ["page"])

    def seal():
        while not stop.is_set():
            with suppress(OSError, PipelineError):
                rundir.note_times(folder / rundir.MANIFEST, {"page": rundir.read_file_facts(folder / "page")})

    replace("old")
    readers = [threading.Thread(target=seal) for _ in range(3)]
    for reader in readers:
        reader.start()
    try:
        for number in range(60):
            replace(str(number))
            assert (folder / "page").read_text() == str(number)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    rundir.remove_leftovers(tmp_path)  # a thread may write into the old folder while it is deleted
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_manifest_notices_every_difference(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert rundir.read_manifest(tmp_path, rundir.Manifest) is None, "not sealed yet"
    rundir.write_manifest(tmp_path, ["a"], n=1)
    for check in ("seal", "sha256"):
        assert rundir.read_manifest(tmp_path, rundir.Manifest, check)["n"] == 1
    for content, fault in ((b"abd", "sha256"), (b"ab", "2 bytes"), (None, "missing")):
        (tmp_path / "a").write_bytes(content) if content else (tmp_path / "a").unlink()
        for check in ("seal", "sha256"):
            with pytest.raises(PipelineError, match=fault):
                rundir.read_manifest(tmp_path, rundir.Manifest, check)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_arrays_are_named_and_warned_of_once(tmp_path, damage, caplog):
    file = tmp_path / "unit.npz"
    write_arrays(file, x=np.arange(1000.0))
    if damage == "flipped":
        flip_bit(file, 2000)
    else:
        file.write_bytes(b"" if damage == "empty" else file.read_bytes()[:-100])
    with pytest.raises(PipelineError, match=f"{file} is damaged .*makes it again"):
        read_arrays(file)
    assert [rundir.try_read(read_arrays, file) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1
