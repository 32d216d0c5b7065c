# SPDX-License-Identifier: Apache-2.0
import json
import shutil
import sys
from functools import partial

import pytest
import torch

from transducer_toolkit.cli import average
from transducer_toolkit.cli.evaluate import main
from transducer_toolkit.cli.trained_data import check_trusted, trained_data
from transducer_toolkit.data.audio import read_audio
from transducer_toolkit.decoding import BeamSearch
from transducer_toolkit.inference.recognizer import Recognizer

FAST = ("trainer.accelerator=cpu", "~callbacks.utterance_picture")


@pytest.fixture
def evaluate(tmp_path, console, capsys):
    """Run the command in another folder than the training; returns its output and results."""

    def run(checkpoint, *overrides):
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
        console(main, tmp_path, f"checkpoint={checkpoint}", *FAST, *overrides)
        run_dir = tmp_path / "outputs" / "evaluate" / "run"
        return capsys.readouterr().out, json.loads((run_dir / "results.json").read_text())

    return run


def refused(console, folder, capsys, *arguments):
    with pytest.raises(SystemExit) as raised:
        console(main, folder, *arguments)
    return str(raised.value.code) + capsys.readouterr().err


def test_the_corpus_is_that_of_the_training(evaluate, trained, tones, data_overrides):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    out, results = evaluate(checkpoint)
    assert f"testing tones: {tones}/test.jsonl" in out and "digits" not in out
    assert results["test_sets"]["tones"]["words"]["reference"] == 14
    assert "results      outputs/evaluate/run/results.json" in out.splitlines()
    assert results == evaluate(checkpoint, *data_overrides)[1] | {
        "test_sets": results["test_sets"]  # they differ in their real-time factors
    }
    # Its options may be changed.
    out, results = evaluate(
        checkpoint, "data.max_utterances=1", f"+data.corpus.test.b={tones}/val.jsonl"
    )
    assert list(results["test_sets"]) == ["tones", "b"]


def test_one_test_manifest_is_enough(evaluate, trained, tones):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    for override in ("data.corpus.test", "+data.corpus.test.val"):
        _, results = evaluate(checkpoint, "data=manifest", f"{override}={tones}/val.jsonl")
        assert list(results["test_sets"]) == ["val"]
        assert results["test_sets"]["val"]["words"]["reference"] > 0


def test_an_averaged_checkpoint_knows_its_corpus_too(evaluate, trained, tmp_path):
    paths = [str(trained / "checkpoints" / f"{name}.ckpt") for name in ("best", "last")]
    assert average.main([*paths, "--output", str(tmp_path / "mean.ckpt")]) == 0
    assert list(evaluate(tmp_path / "mean.ckpt")[1]["test_sets"]) == ["tones"]


def test_relative_paths_start_where_the_training_ran(
    tmp_path, console, train_overrides, tones, evaluate, capsys
):
    from transducer_toolkit.cli.train import main as train

    folder = tmp_path / "project"
    shutil.copytree(tones, folder / "my data")
    relative = [
        override.replace(f"{tones}/", "my data/").replace("=my data/", "='my data/") + "'"
        if f"{tones}/" in override
        else override
        for override in train_overrides
    ]
    console(train, folder, *relative, "trainer.max_epochs=1", "test=false")
    (checkpoint,) = folder.rglob("last.ckpt")
    # The same name elsewhere is another corpus.
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "test.jsonl").write_text("")
    out, _ = evaluate(checkpoint)
    assert f"testing tones: {folder}/my data/test.jsonl" in out
    # A copy without its run folder: the folders above are tried, then data= is demanded.
    copied = folder / "copy.ckpt"
    shutil.copy(checkpoint, copied)
    assert f"testing tones: {folder}/my data/test.jsonl" in evaluate(copied)[0]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(str(copied), elsewhere / "copy.ckpt")
    shutil.rmtree(tmp_path / "my data")
    said = refused(console, tmp_path, capsys, f"checkpoint={elsewhere}/copy.ckpt")
    assert "a relative path that leads to no file" in said and "give data=OPTION" in said
    (folder / "my data" / "test.jsonl").unlink()
    said = refused(console, tmp_path, capsys, f"checkpoint={checkpoint}")
    assert "'my data/test.jsonl', a relative path" in said


def test_without_a_corpus_data_is_demanded(tmp_path, console, trained, tones, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    config = checkpoint.pop("training_config")
    path = tmp_path / "a.ckpt"

    def said(**changes):
        saved = {**checkpoint, "training_config": {**config, **changes}}
        torch.save(saved if changes else checkpoint, path)
        return refused(console, tmp_path, capsys, f"checkpoint={path}", *FAST)

    message = f"transducer-evaluate: {path} does not say which corpus it was trained on"
    assert message in said() and "data=manifest data.corpus.test=test.jsonl" in said()
    assert message in said(data={"corpus": "${oc.env:HOME}"})
    torch.save({**checkpoint, "training_config": config}, path)
    assert trained_data(str(path))["corpus"]["test"] == {"tones": f"{tones}/test.jsonl"}
    assert trained_data(str(path))["spec_augment"] is None
    assert trained_data(str(tmp_path / "none.ckpt")) is None  # the command reports it


def test_the_corpus_of_a_checkpoint_runs_no_foreign_code(tmp_path, console, trained, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    data = checkpoint["training_config"]["data"]
    path = tmp_path / "a.ckpt"
    for changed in (
        {**data, "corpus": {"_target_": "os.system", "command": "true"}},
        {**data, "text": {**data["text"], "function": "os.system"}},
    ):
        config = {**checkpoint["training_config"], "data": changed}
        torch.save({**checkpoint, "training_config": config}, path)
        with pytest.raises((SystemExit, ValueError)):
            console(main, tmp_path, f"checkpoint={path}", *FAST)
        with pytest.raises(ValueError, match=r"wants to instantiate os\.system"):
            check_trusted(changed, [], "a.ckpt")
    check_trusted(data, [], "a.ckpt")


def test_no_test_set_is_an_error(tmp_path, console, trained, tones, capsys):
    checkpoint = f"checkpoint={trained}/checkpoints/best.ckpt"
    with pytest.raises((SystemExit, ValueError)) as raised:
        console(main, tmp_path, checkpoint, "data=manifest", *FAST)
    assert "has no test set: give data.corpus.test=PATH" in (
        str(raised.value) + capsys.readouterr().err
    )
    assert sys.argv[0] != "transducer_toolkit.cli.evaluate"


def test_texts_are_normalized_for_scoring_and_what_is_left_is_named(
    evaluate, trained, tones, tmp_path
):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    rows = [json.loads(line) for line in (tones / "test.jsonl").open()]
    for row in rows:
        row["audio"] = str(tones / row["audio"])
        row["text"] = row["text"].upper() + "!"
    rows[0]["text"] += " ä"
    del rows[0]["word_starts_s"]
    path = tmp_path / "upper.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("data=manifest", f"data.corpus.test={path}")

    def found(*overrides):
        out, results = evaluate(checkpoint, *data, *overrides)
        return out, results["test_sets"]["upper"]

    out, as_is = found()
    assert "upper: 6 of 6 references have characters that the model cannot write" in out
    assert set(as_is["unwritable"]["characters"]) == {"!", "A", "B", "C", "ä"}
    out, scored = found("scoring.case=lower", "scoring.punctuation=remove")
    assert scored["unwritable"] == {"characters": {"ä": 1}, "ids": ["test-0"]}
    assert (
        scored["characters"]["substitutions"] + scored["characters"]["deletions"]
        < (as_is["characters"]["substitutions"] + as_is["characters"]["deletions"])
        or scored["characters"]["insertions"] != as_is["characters"]["insertions"]
    )
    # The transcripts keep the texts; normalizing the corpus changes them.
    transcripts = tmp_path / "outputs/evaluate/run/transcripts/upper.tsv"
    assert rows[1]["text"] in transcripts.read_text()
    out, normalized = found("data.text.case=lower", "data.text.punctuation=remove")
    assert rows[1]["text"] not in transcripts.read_text()
    assert normalized["unwritable"] == scored["unwritable"]
    assert normalized["characters"] == scored["characters"]


def test_evaluate_prints_the_error_rates(tmp_path, console, trained, data_overrides, capsys):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    console(main, tmp_path, f"checkpoint={checkpoint}", *data_overrides, "trainer.accelerator=cpu")
    out = capsys.readouterr().out
    assert "test set" in out and "tones" in out
    assert out.split("test set")[1].splitlines()[0].endswith("delay ms   median")
    run_dir = tmp_path / "outputs" / "evaluate" / "run"
    assert (run_dir / "pictures" / "utterance.png").stat().st_size > 0
    # What the training itself reported.
    transcripts = "transcripts/tones.tsv"
    assert (run_dir / transcripts).read_text() == (trained / transcripts).read_text()

    # The errors of the utterances add up to those of the set.
    results = json.loads((run_dir / "results.json").read_text())
    total = results["test_sets"]["tones"]
    rows = [json.loads(line) for line in (run_dir / "errors" / "tones.jsonl").open()]
    assert len(rows) == 6 and "CER %" in out and total["rtf"] > 0
    for unit in ("words", "characters"):
        for kind in ("substitutions", "deletions", "insertions", "reference"):
            assert total[unit][kind] == sum(row[unit][kind] for row in rows)
        errors = sum(total[unit][kind] for kind in ("substitutions", "deletions", "insertions"))
        assert total[unit]["rate"] == errors / total[unit]["reference"]
    assert total["duration_s"] == pytest.approx(sum(row["duration_s"] for row in rows), abs=0.01)


def test_the_search_is_chosen_on_the_command_line(
    tmp_path, console, trained, data_overrides, tones
):
    def transcripts(name, *overrides):
        (tmp_path / name).mkdir()
        checkpoint = f"checkpoint={trained}/checkpoints/best.ckpt"
        arguments = [checkpoint, *data_overrides, "trainer.accelerator=cpu", *overrides]
        console(main, tmp_path / name, *arguments, "~callbacks.utterance_picture")
        run_dir = tmp_path / name / "outputs" / "evaluate" / "run"
        search = json.loads((run_dir / "results.json").read_text())["search"]
        return (run_dir / "transcripts" / "tones.tsv").read_text(), search

    _, search = transcripts("greedy", "search.max_symbols_per_frame=1")
    assert search["max_symbols_per_frame"] == 1
    found, search = transcripts("beam", "search=beam", "search.beam=2", "search.score_window=9")
    assert (search["beam"], search["score_window"], search["max_symbols_per_frame"]) == (2, 9, 3)
    recognizer = Recognizer.from_checkpoint(
        trained / "checkpoints" / "best.ckpt", search=partial(BeamSearch, beam=2, score_window=9)
    )
    assert recognizer.search.topology.name == "regular"
    rows = [line.split("\t") for line in found.splitlines()[1:]]
    for id_, _, text in rows:
        (expected,) = recognizer.transcribe([read_audio(tones / f"{id_}.wav")])
        assert text == expected
    same, search = transcripts("former", "search=modified_beam", "search.beam=2")
    assert search["_target_"] == "transducer_toolkit.decoding.BeamSearch"
    assert len(same.splitlines()) == len(rows) + 1


def test_hotwords_and_language_models_are_options_of_the_search(
    tmp_path, console, trained, evaluate, capsys
):
    checkpoint = trained / "checkpoints" / "best.ckpt"
    (tmp_path / "names.txt").write_text("cbc\t3\n")
    (tmp_path / "lm.arpa").write_text(
        "\\data\\\nngram 1=3\n\n\\1-grams:\n-9\ta\n-0.1\tb\n-9\tc\n\n\\end\\\n"
    )

    def texts(*overrides):
        evaluate(checkpoint, *overrides)
        rows = (tmp_path / "outputs/evaluate/run/transcripts/tones.tsv").read_text().splitlines()
        return [row.split("\t")[2] for row in rows[1:]]

    for search in ("search.max_symbols_per_frame=1", "search=modified_beam"):
        plain = texts(search)
        named = texts(search, "search.hotwords=names.txt", "search.hotwords_score=5")
        assert sum(text.count("cbc") for text in named) > sum(text.count("cbc") for text in plain)
        # Phrases may be given on the command line, and the kinds may be combined.
        listed = texts(search, "search.hotwords=[cbc]", "search.hotwords_score=15")
        assert listed == named
        both = texts(
            *(search, "search.lm=lm.arpa", "search.lm_weight=5"),
            *("search.internal_lm=model", "search.internal_lm_weight=0.1"),
        )
        assert set("".join(both)) <= set("b ")

    for override, message in {
        "search.hotwords=none.txt": "no hotword file at none.txt",
        "search.lm=names.txt": "names.txt, line 1: expected \\data\\,",
        "search.lm_weight=0.5": "lm_weight: expected lm, too",
        "search.hotwords=[ax]": "hotwords[0]: character 'x'",
    }.items():
        complaint = refused(console, tmp_path, capsys, f"checkpoint={checkpoint}", *FAST, override)
        assert message in complaint and "Traceback" not in complaint


def test_weights_are_tuned_by_a_sweep(tmp_path, console, trained):
    (tmp_path / "names.txt").write_text("cbc\n")
    arguments = [f"checkpoint={trained}/checkpoints/best.ckpt", *FAST, "--multirun"]
    options = ["search=modified_beam", "search.hotwords=names.txt", "search.hotwords_score=0,20"]
    console(main, tmp_path, *arguments, *options)
    found = {}
    for path in tmp_path.rglob("results.json"):
        score = json.loads(path.read_text())["search"]["hotwords_score"]
        found[score] = "cbc" in (path.parent / "transcripts" / "tones.tsv").read_text()
    assert found == {0: False, 20: True}


def test_evaluate_needs_a_checkpoint(tmp_path, console, data_overrides, capsys):
    with pytest.raises(SystemExit):
        console(main, tmp_path, *data_overrides)
    assert "checkpoint" in capsys.readouterr().err
