"""What a round needs several times is computed once."""

from fedmmkt.common.config import RunConfig
from fedmmkt.server_app.app import build_strategy


def test_the_same_answers_are_aggregated_once_in_a_round(tiny_run, make_grid):
    """Soft targets are of all three clients, scores of the image client. Without image clients, both are of all."""
    for models, expected in (("cnn,text,dual", [1, 3]), ("text,text,dual", [3])):
        run_config = tiny_run(models.replace(",", "-"), rounds=1, client__models=models, data__partitioner="iid")
        strategy = build_strategy(RunConfig.from_flower(run_config), 1)
        original, groups = strategy.aggregate_logits, []

        def counted(answers, prompted_N, original=original, groups=groups):
            groups.append(len(answers))
            return original(answers, prompted_N)

        strategy.aggregate_logits = counted
        strategy.start(make_grid(run_config, nodes=3))

        assert sorted(groups) == expected
