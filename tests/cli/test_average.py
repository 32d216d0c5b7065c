# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from transducer_toolkit.cli.average import average_checkpoints, main
from transducer_toolkit.inference.recognizer import Recognizer


@pytest.fixture
def checkpoints(trained, tmp_path):
    """Three checkpoints of one model, the first as it was trained."""
    paths = [str(trained / "checkpoints" / "best.ckpt")]
    checkpoint = torch.load(paths[0], weights_only=True)
    for index in (1, 2):
        weights = checkpoint["state_dict"]
        weights.pop("counter", None)
        for value in weights.values():
            value.add_(torch.randn_like(value))
        weights["counter"] = torch.tensor(index)
        paths.append(str(tmp_path / f"{index}.ckpt"))
        torch.save(checkpoint, paths[-1])
    return paths


def weights_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_mean_is_one_more_checkpoint(checkpoints, tmp_path, capsys):
    path = str(tmp_path / "mean.ckpt")
    two = checkpoints[1:]
    assert main([*two, "--output", path]) == 0
    assert capsys.readouterr().out == f"{path}: mean of 2 checkpoints\n"
    one, other, mean = map(weights_of, [*two, path])
    assert mean["counter"] == 2 and mean["counter"].dtype == torch.int64
    for name in mean.keys() - {"counter"}:
        torch.testing.assert_close(mean[name], (one[name] + other[name]) / 2)
    recognizer = Recognizer.from_checkpoint(path)
    for name, value in recognizer.model.state_dict().items():
        assert torch.equal(value, mean[f"model.{name}"])


def test_one_checkpoint_is_its_own_mean(checkpoints):
    mean = average_checkpoints(checkpoints[:1])["state_dict"]
    original = weights_of(checkpoints[0])
    assert mean.keys() == original.keys()
    assert all(torch.equal(mean[name], original[name]) for name in mean)


def test_checkpoints_that_do_not_belong_together_are_named(checkpoints, tmp_path, capsys):
    def complaint(*paths):
        assert main([*paths, "--output", str(tmp_path / "mean.ckpt")]) == 1
        return capsys.readouterr().err

    first, second, _ = checkpoints
    # The first has no counter.
    assert f"{second} differs from {first} in: names of the weights" in complaint(first, second)
    checkpoint = torch.load(first, weights_only=True)
    checkpoint["recognizer"]["symbols"] = ["<blk>", "x"]
    other = str(tmp_path / "other.ckpt")
    torch.save(checkpoint, other)
    assert f"{other} differs from {first} in: symbols" in complaint(first, other)
    checkpoint = torch.load(second, weights_only=True)
    name = next(name for name, x in checkpoint["state_dict"].items() if x.dim() == 1)
    checkpoint["state_dict"][name] = checkpoint["state_dict"][name][:1]  # would be broadcast
    torch.save(checkpoint, other)
    assert f"{other} differs from {second} in the size of {name}: (1,)" in complaint(second, other)
    assert "no checkpoint at nowhere.ckpt" in complaint(first, "nowhere.ckpt")
    assert main([first, "--output", str(tmp_path / "nowhere" / "mean.ckpt")]) == 1
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must hold at least one checkpoint"):
        average_checkpoints([])


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    assert "save_top_k=5" in capsys.readouterr().out
