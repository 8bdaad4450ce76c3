import pytest

from fedmmkt.deploy.budget import main


def test_a_new_budget_is_shown(tmp_path, capsys):
    path = tmp_path / "private" / "ledger.jsonl"

    assert main(["new", str(path), "--epsilon", "4", "--runs", "2"]) == 0
    made = capsys.readouterr().out
    assert main(["show", str(path)]) == 0

    assert capsys.readouterr().out == made
    assert made.splitlines() == [
        "budget   epsilon 4 at delta 1e-05, for 2 run(s); per one example, added or removed",
        "spent    epsilon 0.000, by 0 answer(s)",
        "runs     none",
    ]
    assert oct(path.parent.stat().st_mode)[-3:] == "700"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--epsilon", "0"], "--epsilon is 0; allowed: above 0, up to 1000"),
        (["--epsilon", "nan"], "--epsilon is nan; allowed: above 0, up to 1000"),
        (["--epsilon", "1", "--delta", "1"], "--delta is 1; allowed: above 0, below 1"),
        (["--epsilon", "1", "--runs", "0"], "--runs is 0; allowed: 1 or more"),
    ],
)
def test_impossible_budgets_are_refused(tmp_path, capsys, options, text):
    assert main(["new", str(tmp_path / "ledger"), *options]) == 2

    assert capsys.readouterr().err.strip() == text
    assert not (tmp_path / "ledger").exists()


def test_a_ledger_is_never_replaced(tmp_path, capsys):
    main(["new", str(tmp_path / "ledger"), "--epsilon", "1"])

    assert main(["new", str(tmp_path / "ledger"), "--epsilon", "9"]) == 2

    assert "is there already; allowed: another name, or move the old ledger away first" in capsys.readouterr().err
