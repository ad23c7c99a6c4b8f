"""A training that was killed goes on where it was, and ends where it would have ended."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.training.cluster import ClusterConfig
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.history import TRAINING, WARM_UP, read_history
from models.training.progress import Progress
from models.training.resume import STATE, StateDirectory
from models.training.rqvae import LossConfig
from models.training.run import Run
from models.training.rvq import RVQConfig
from models.training.train import TrainConfig, state_directory, train_checkpoint

ROOT = Path(__file__).parents[3]
SMALL = FitConfig(
    codebook_sizes=(8, 8),
    latent=4,
    hidden=(16,),
    start="random",
    warm_up_epochs=3,
    epochs=5,
    batch_rows=128,
    learning_rate=3e-3,
)
LONG = replace(SMALL, warm_up_epochs=30, epochs=15)

CHILD = """
import sys
import torch
from pathlib import Path
from models.training.fit_config import FitConfig
from models.training.train import TrainConfig, train_checkpoint

torch.set_num_threads(1)
config = TrainConfig(fit=FitConfig(**eval(sys.argv[3])))
train_checkpoint([Path(sys.argv[1])], Path(sys.argv[2]), config, keep_every_s=0.0)
"""


@pytest.fixture
def array(tmp_path, clustered):
    np.save(tmp_path / "e.npy", clustered.numpy())
    return tmp_path / "e.npy"


def train(array, out, config=SMALL, lines=None, **options):
    say = (lambda _: None) if lines is None else lines.append
    return train_checkpoint([array], out, TrainConfig(fit=config), keep_every_s=0.0, say=say, **options)


class Impatient:
    """Interrupts where it is told of so many epochs."""

    def __init__(self, after):
        self.after = after

    def __call__(self, line):
        self.after -= " epoch " in f" {line}" and ":" in line
        if not self.after:
            raise KeyboardInterrupt


def interrupted(array, out):
    """Interrupt a training while it tells of the joint training's second epoch, so that the first is kept."""
    with pytest.raises(KeyboardInterrupt):
        train_checkpoint([array], out, TrainConfig(fit=SMALL), keep_every_s=0.0, say=Impatient(5))


def timeless(records):
    return [replace(record, seconds=0.0) for record in records]


def alike(one, other):
    states = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return all(torch.equal(*tensors) for tensors in states) and timeless(one.records) == timeless(other.records)


def kept_epoch(out):
    """Stage and epoch of the state that is kept, None where there is none."""
    path = state_directory(out) / STATE
    if not path.exists():
        return None
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    content = json.loads(header["__metadata__"]["state"])
    return content["stage"], content["epoch"]


def test_a_training_killed_twice_has_the_fingerprint_of_one_that_was_not(array, tmp_path):
    # given
    undisturbed = train(array, tmp_path / "undisturbed", LONG)
    settings = {name: getattr(LONG, name) for name in ("codebook_sizes", "latent", "hidden", "start", "batch_rows")}
    settings |= {name: getattr(LONG, name) for name in ("warm_up_epochs", "epochs", "patience", "learning_rate")}
    # when it is killed in the warm-up, and once more in the joint training
    for stage, epoch in ((WARM_UP, 2), (TRAINING, 3)):
        command = [sys.executable, "-c", CHILD, str(array), str(tmp_path / "out"), repr(settings)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as child:
            deadline = time.monotonic() + 60
            while child.poll() is None and time.monotonic() < deadline:
                there = kept_epoch(tmp_path / "out")
                if there and there[0] == stage and there[1] >= epoch:
                    break
                time.sleep(0.01)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert kept_epoch(tmp_path / "out")[0] == stage
    lines = []
    resumed = train(array, tmp_path / "out", LONG, lines)
    # then
    assert any("going on after training epoch" in line for line in lines)
    assert resumed.fingerprint == undisturbed.fingerprint
    assert resumed.report == undisturbed.report
    histories = [read_history(tmp_path / name).records for name in ("out", "undisturbed")]
    assert timeless(histories[0]) == timeless(histories[1])
    assert not state_directory(tmp_path / "out").exists()


def test_going_on_writes_nothing_before_there_is_something_new(clustered, tmp_path):
    with StateDirectory(tmp_path / "state", 0.0) as state:
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, SMALL, run=Run(state=state, progress=Progress(Impatient(6), terminal=False)))
        kept = (tmp_path / "state" / STATE).read_bytes()
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, SMALL, run=Run(state=state, progress=Progress(Impatient(1), terminal=False)))
        assert (tmp_path / "state" / STATE).read_bytes() == kept


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, codebooks="ema"),
        replace(SMALL, loss=LossConfig(contrastive=0.1, diversity=0.1, diversity_clusters=2)),
        RVQConfig(codebook_sizes=(8, 8), epochs=8, batch_rows=128, start_rows=100).training(12),
    ],
)
def test_a_fit_may_be_interrupted_after_any_epoch(config, clustered, tmp_path):
    whole = fit(clustered, config)
    for after in (1, 3, 4, 8):  # in the warm-up, at its end, after it, at the end
        with StateDirectory(tmp_path / "state", 0.0) as state:
            with pytest.raises(KeyboardInterrupt):
                fit(clustered, config, run=Run(state=state, progress=Progress(Impatient(after), terminal=False)))
            resumed = fit(clustered, config, run=Run(state=state))
            state.clear()
        assert alike(whole, resumed)


def test_a_training_that_drew_by_weight_goes_on_alike(clustered, tmp_path):
    weights = torch.rand(600, generator=torch.Generator().manual_seed(1)) + 0.1
    whole = fit(clustered, SMALL, weights)
    with StateDirectory(tmp_path / "state", 0.0) as state:
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, SMALL, weights, run=Run(state=state, progress=Progress(Impatient(6), terminal=False)))
        assert alike(whole, fit(clustered, SMALL, weights, run=Run(state=state)))


@pytest.mark.parametrize(
    "config",
    [
        replace(SMALL, codebooks="ema"),
        replace(SMALL, loss=LossConfig(diversity=0.1)),
        replace(SMALL, loss=LossConfig(reconstruction=0.0, contrastive=1.0)),
        replace(SMALL, loss=LossConfig(collaborative=1.0)),
        RVQConfig(codebook_sizes=(8, 8), latent=4, epochs=8, batch_rows=128, start_rows=100).training(12),
    ],
)
def test_a_training_for_any_objective_goes_on_alike_in_bfloat16_too(config, clustered, tmp_path):
    collaborative = clustered[:, :5].roll(1, dims=0)
    whole = fit(clustered, config, None, collaborative, run=Run(bf16=True))
    with StateDirectory(tmp_path / "state", 0.0) as state:
        impatient = Progress(Impatient(6), terminal=False)
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, config, None, collaborative, run=Run(bf16=True, state=state, progress=impatient))
        assert alike(whole, fit(clustered, config, None, collaborative, run=Run(bf16=True, state=state)))


def test_other_data_and_other_settings_are_refused_with_what_differs(array, tmp_path, clustered):
    # given
    interrupted(array, tmp_path / "out")
    # when
    with pytest.raises(ValueError, match=r"settings\.learning_rate: 0\.003 then, 0\.002 now") as error:
        train(array, tmp_path / "out", replace(SMALL, learning_rate=2e-3))
    assert "data." not in str(error.value)
    np.save(array, clustered.numpy()[::-1])
    with pytest.raises(ValueError, match=r"data\..*e\.npy\.sha256: '\w+' then, '\w+' now"):
        train(array, tmp_path / "out")
    # then the state is as it was, and forgotten where that is asked for
    assert kept_epoch(tmp_path / "out") == (TRAINING, 1)
    lines = []
    train(array, tmp_path / "out", lines=lines, fresh=True)
    assert not any("going on" in line for line in lines)


def test_a_state_of_other_training_code_is_refused(array, tmp_path, monkeypatch):
    interrupted(array, tmp_path / "out")
    monkeypatch.setattr("models.training.train.code_digest", lambda: "another")
    with pytest.raises(ValueError, match=r"training_code: '\w{16}' then, 'another' now"):
        train(array, tmp_path / "out")


def test_names_and_terms_may_change_in_between(array, tmp_path):
    interrupted(array, tmp_path / "out")
    config = TrainConfig(name="other", fit=SMALL, data_terms="Free.", max_suffix=9)
    manifest = train_checkpoint([array], tmp_path / "out", config, say=lambda _: None)
    assert manifest.fingerprint == train(array, tmp_path / "undisturbed").fingerprint


def test_a_full_disk_is_an_error_that_leaves_the_state_before(clustered, tmp_path):
    # given
    whole, directory = fit(clustered, SMALL), tmp_path / "state"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with StateDirectory(directory, 0.0) as state:
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, SMALL, run=Run(state=state, progress=Progress(Impatient(5), terminal=False)))
        kept = (directory / STATE).read_bytes()
        # when no file may be as large as the state
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"the state after training epoch 2 cannot be kept in .*: File too large"):
                fit(clustered, SMALL, run=Run(state=state))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        # then
        assert {path.name for path in directory.iterdir()} == {STATE, "lock"}
        assert (directory / STATE).read_bytes() == kept
        assert alike(whole, fit(clustered, SMALL, run=Run(state=state)))


def test_a_directory_that_cannot_be_written_is_told_of_before_any_work(array, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"the state of the training cannot be kept in .*: Not a directory"):
        train(tmp_path / "absent.npy", tmp_path / "file" / "out")


def test_two_trainings_of_one_checkpoint_are_not_at_work_at_once(array, tmp_path):
    with StateDirectory(state_directory(tmp_path / "out")), pytest.raises(OSError, match="another training is at work"):
        train(array, tmp_path / "out")


def test_what_a_kill_left_half_written_is_not_read(array, tmp_path):
    interrupted(array, tmp_path / "out")
    (state_directory(tmp_path / "out") / f".{STATE}-01234567.draft").write_bytes(b"half")
    assert train(array, tmp_path / "out").fingerprint == train(array, tmp_path / "undisturbed").fingerprint
    assert not state_directory(tmp_path / "out").exists()


def test_a_damaged_state_is_refused(array, tmp_path):
    interrupted(array, tmp_path / "out")
    path = state_directory(tmp_path / "out") / STATE
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"cannot be read: .*; start over with --fresh"):
        train(array, tmp_path / "out")


def test_the_state_is_not_written_more_often_than_asked_for(clustered, tmp_path):
    with StateDirectory(tmp_path / "state", 3600.0) as state:
        fit(clustered, SMALL, run=Run(state=state))
        assert not (tmp_path / "state" / STATE).exists()
    assert not (tmp_path / "state").exists()


def test_families_fitted_by_k_means_alone_keep_no_state_and_are_not_at_work_twice_either(array, tmp_path):
    config = TrainConfig(family="rq-kmeans", fit=ClusterConfig(codebook_sizes=(8, 8)))
    with StateDirectory(state_directory(tmp_path / "out")), pytest.raises(OSError, match="another training is at work"):
        train_checkpoint([array], tmp_path / "out", config, say=lambda _: None)
    train_checkpoint([array], tmp_path / "out", config, say=lambda _: None)
    assert not state_directory(tmp_path / "out").exists()


def test_the_same_files_in_another_order_are_other_data(array, tmp_path, clustered):
    # given a state: in another order, rows that were held out would be trained on
    np.save(tmp_path / "f.npy", clustered.numpy()[::-1] + 1)
    files, config = [array, tmp_path / "f.npy"], TrainConfig(fit=SMALL)
    with pytest.raises(KeyboardInterrupt):
        train_checkpoint(files, tmp_path / "out", config, keep_every_s=0.0, say=Impatient(5))
    # then
    with pytest.raises(ValueError, match="holds the unfinished state of another training"):
        train_checkpoint(files[::-1], tmp_path / "out", config, say=lambda _: None)


def test_a_state_of_another_format_is_refused(clustered, tmp_path, monkeypatch):
    with StateDirectory(tmp_path / "state", 0.0) as state:
        monkeypatch.setattr("models.training.resume.FORMAT", 2)
        with pytest.raises(KeyboardInterrupt):
            fit(clustered, SMALL, run=Run(state=state, progress=Progress(Impatient(5), terminal=False)))
        monkeypatch.undo()
        with pytest.raises(ValueError, match="it has format 2; this version reads format 1; start over with --fresh"):
            state.read()


def test_a_lock_is_one_s_alone_however_many_come_and_go(tmp_path):
    # given the lock is a file of a directory that goes with whoever had it
    inside, most, taken, faults = 0, 0, 0, []
    counting = threading.Lock()

    def come_and_go():
        nonlocal inside, most, taken
        for _ in range(300):
            try:
                with StateDirectory(tmp_path / "state"):
                    with counting:
                        inside, taken = inside + 1, taken + 1
                        most = max(most, inside)
                    time.sleep(0)
                    with counting:
                        inside -= 1
            except OSError as error:
                faults.append(str(error))

    # when
    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # then
    assert taken
    assert most == 1
    assert {fault for fault in faults if "another training is at work" not in fault} == set()


def test_the_present_directory_and_a_link_to_one_are_written_into(array, tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), tmp_path / "link"):
        train(array, out)
    assert all(read_history(tmp_path / name) for name in ("here", "there"))
