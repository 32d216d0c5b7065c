# SPDX-License-Identifier: Apache-2.0
import json
import logging

from tests.training.callbacks.test_non_finite import batch_of
from transducer_toolkit.training.callbacks.unreadable import CountUnreadable


def test_each_utterance_is_written_once_and_counted(tmp_path, caplog):
    path = tmp_path / "run" / "unreadable.jsonl"
    counter = CountUnreadable(path, num_logged=1)
    reasons = [{}, {"a": "utterance 'a': empty"}, {"a": "utterance 'a': empty", "b": "gone"}]
    with caplog.at_level(logging.WARNING):
        for index, unreadable in enumerate(reasons):
            batch = batch_of(index)
            batch.unreadable = unreadable
            counter.on_train_batch_start(None, None, batch, index)
        counter.on_train_epoch_end(None, None)
    rows = [json.loads(line) for line in path.open()]
    assert rows == [{"id": "a", "reason": "utterance 'a': empty"}, {"id": "b", "reason": "gone"}]
    messages = [record.getMessage() for record in caplog.records]
    expected = f"2 utterances could not be read, see {path}"
    assert messages == ["skipped: utterance 'a': empty", expected]
    resumed = CountUnreadable(path)
    resumed.load_state_dict(counter.state_dict())
    resumed.on_train_batch_start(None, None, batch, 0)
    assert len(path.read_text().splitlines()) == 2
