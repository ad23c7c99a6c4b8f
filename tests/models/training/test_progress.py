from __future__ import annotations

import numpy as np

from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.progress import Progress
from models.training.run import Run
from models.training.train import TrainConfig, train_checkpoint

SMALL = FitConfig(
    codebook_sizes=(8, 64), latent=4, hidden=(16,), start="random", warm_up_epochs=1, epochs=2, batch_rows=128
)


def test_a_pipe_gets_a_plain_line_for_each_epoch(tmp_path, clustered, capsys):
    # given few rows, so that codewords die
    np.save(tmp_path / "e.npy", clustered[:60].numpy())
    # when
    train_checkpoint([tmp_path / "e.npy"], tmp_path / "out", TrainConfig(fit=SMALL))
    # then
    out, err = capsys.readouterr()
    epochs = [line for line in out.splitlines() if "epoch" in line and ":" in line]
    assert [line.split(":")[0] for line in epochs] == ["warm-up epoch 1/1", "epoch 1/2", "epoch 2/2"]
    for words in (
        "loss ",
        "(unweighted: reconstruction ",
        "codebook ",
        "commitment ",
        "repulsion ",
        "held out: reconstruction ",
        "colliding ",
        "used: level 1 ",
        "worst (level 2) ",
        "restarted ",
        "best epoch ",
    ):
        assert words in epochs[1]
    assert not set(out) & set(map(chr, range(32))) - {"\n"}
    assert err == ""


def test_a_terminal_gets_one_bar_for_each_stage(clustered, capsys):
    lines = []
    fit(clustered, SMALL, run=Run(progress=Progress(lines.append, terminal=True)))
    err = capsys.readouterr().err
    assert lines == []
    assert "warm-up: 100%" in err
    assert "training: 100%" in err
    assert "best epoch" in err
