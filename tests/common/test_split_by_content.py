"""With a privacy ledger, which examples are held out for testing is decided for each by itself."""

from fedmmkt.common.config import DataConfig, NodeConfig
from fedmmkt.common.datasets import load_splits


def splits_of(path, rows):
    path.write_text("text,label\n" + "".join(f"note {row},{'ab'[row % 2]}\n" for row in rows))
    node = NodeConfig(data_path=str(path), privacy_ledger="ledger.jsonl")
    splits = load_splits(node.own_data(DataConfig()), 0)
    return [set(part["text"]) for part in (splits.train, splits.test)]


def test_one_example_less_moves_no_other(tmp_path):
    train, test = splits_of(tmp_path / "all.csv", range(40))
    fewer_train, fewer_test = splits_of(tmp_path / "fewer.csv", [row for row in range(40) if row != 7])

    assert (fewer_train, fewer_test) == (train - {"note 7"}, test - {"note 7"})
    assert len(train) + len(test) == 40
    assert 1 <= len(test) <= 20  # A fifth is expected.


def test_too_few_examples_are_told_in_the_nodes_own_log_alone(tmp_path, caplog):
    train, test = splits_of(tmp_path / "one.csv", [0])

    assert len(train) + len(test) == 1
    assert "test-fraction 0.2 leaves nothing to train or test on 1 examples" in caplog.text
