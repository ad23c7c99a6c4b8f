"""Files and directories are written whole or not at all, and what a kill leaves goes with the next attempt."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from models.training.cluster import ClusterConfig
from models.training.train import TrainConfig, state_directory, train_checkpoint
from models.whole_files import remove_abandoned, stamp_of, whole_directory, write_whole

ROOT = Path(__file__).parents[2]

# Stops half-way through a checkpoint, says so, and waits for whatever comes.
WRITER = """
import sys
from pathlib import Path
from models.whole_files import whole_directory

with whole_directory(Path(sys.argv[1])) as draft:
    (draft / "manifest.json").write_text("{}")
    print("half", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start():
    """Starts processes that are half-way through writing a directory."""
    started = []

    def writer(out):
        command = [sys.executable, "-c", WRITER, str(out)]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "half\n"
        return process

    yield writer
    for process in started:
        process.kill()
        process.communicate()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_a_file_takes_the_place_of_the_one_before_it(tmp_path):
    write_whole(tmp_path / "new" / "report.html", "one")
    write_whole(tmp_path / "new" / "report.html", b"two \xc3\xa9")
    assert (tmp_path / "new" / "report.html").read_text(encoding="utf-8") == "two é"
    assert names(tmp_path / "new") == ["report.html"]
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "new" / "report.html").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_file_that_cannot_be_written_is_the_one_before(tmp_path):
    # given
    write_whole(tmp_path / "report.json", "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # when no file may be as large as the new one
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_whole(tmp_path / "report.json", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # then
    assert (tmp_path / "report.json").read_text() == "before"
    assert names(tmp_path) == ["report.json"]


def test_a_directory_is_there_once_all_of_it_is(tmp_path):
    with whole_directory(tmp_path / "out") as draft:
        (draft / "one").write_text("1")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["one"]
    with pytest.raises(OSError, match="not empty"), whole_directory(tmp_path / "out") as draft:
        (draft / "two").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["one"]


def test_a_training_removes_the_draft_that_a_kill_left_and_no_other(tmp_path, start):
    # given one that was killed, and one of a checkpoint whose name begins alike and that is written just now
    np.save(tmp_path / "e.npy", np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32))
    killed = start(tmp_path / "out")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    other = start(tmp_path / "out-2")
    assert [name.endswith(".draft") for name in names(tmp_path)] == [True, True, False]
    (tmp_path / ".out-notes").write_text("the user's own")
    lines = []
    # when
    config = TrainConfig(family="rq-kmeans", fit=ClusterConfig(codebook_sizes=(4, 4)))
    train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", config, say=lines.append)
    # then
    assert any("killed" in line for line in lines)
    left = [name for name in names(tmp_path) if name.endswith(".draft")]
    assert len(left) == 1
    assert left[0].startswith(".out-2-")
    other.communicate("")
    assert names(tmp_path) == [".out-notes", "e.npy", "out", "out-2"]


def test_a_draft_in_use_is_left_alone(tmp_path, start):
    # given
    process = start(tmp_path / "out")
    # when
    assert remove_abandoned(tmp_path / "out") == 0
    process.communicate("")
    # then
    assert process.returncode == 0
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["manifest.json"]


def test_the_state_of_a_training_is_never_taken_for_a_draft(tmp_path):
    for name in ("out", "out-0123abcd.draft"):
        state_directory(tmp_path / name).mkdir()
    assert remove_abandoned(tmp_path / "out") == 0
    assert len(names(tmp_path)) == 2


def test_a_link_named_like_a_draft_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    (tmp_path / ".out-01234567.draft").symlink_to(tmp_path / "precious")
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path / "precious") == ["file"]


def test_a_file_that_is_written_again_has_another_stamp(tmp_path):
    path = tmp_path / "file"
    stamps = [stamp_of(path)]
    for content in ("one", "two", "two"):
        write_whole(path, content)
        stamps += [stamp_of(path), stamp_of(path)]

    assert stamps[0] is None
    assert stamps[1::2] == stamps[2::2]
    assert len(set(stamps)) == 4
