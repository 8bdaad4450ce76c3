import numpy as np
import pytest

from fedmmkt.server_app.record.variety import Variety, variety


def column(*values):
    return np.array(values, dtype=np.float64)[:, None]


def test_each_measure_by_hand():
    real, generated = column(0, 1, 3, 10), column(0.5, 0.6, 20)

    found = variety(generated, real, neighbours=1)

    # Balls of the real images: 0 +- 1, 1 +- 1, 3 +- 2, 10 +- 7; of the generated ones: +- 0.1, +- 0.1, +- 19.4.
    # 0.5 and 0.6 lie in the first two; 20 in none. Of the real ones, 1, 3 and 10 lie in the ball of 20 (0.6 to 39.4).
    assert found == Variety(precision=2 / 3, recall=3 / 4, density=4 / 3, coverage=2 / 4)


def test_what_fades_into_averages_keeps_precision_and_loses_recall_and_coverage():
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 8))

    alike, same = variety(0.2 * rng.normal(size=(200, 8)), real), variety(rng.normal(size=(200, 8)), real)

    assert alike.precision >= same.precision
    assert alike.recall < 0.1 < 0.7 < same.recall
    assert alike.coverage < same.coverage


def test_few_images_have_fewer_neighbours_and_one_has_none():
    assert variety(column(0, 1), column(0, 1, 2)) == variety(column(0, 1), column(0, 1, 2), neighbours=1)
    assert variety(column(0), column(0, 1)) is None


@pytest.mark.parametrize("count", [2, 50])
def test_the_real_images_themselves_are_perfect(count):
    real = np.random.default_rng(0).normal(size=(count, 4))

    found = variety(real, real)

    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
