"""Standard errors and verdicts against values computed by hand."""

import pytest

from fedmmkt.server_app.report.noise import Share, mean_share, share, verdict


def test_the_error_of_a_share_is_binomial_with_four_samples_added():
    # (0.5 * 96 + 2) / 100 = 0.5; sqrt(0.25 / 100) = 0.05.
    assert share(0.5, 96) == Share(0.5, pytest.approx(0.05))
    # (96 + 2) / 100 = 0.98; sqrt(0.98 * 0.02 / 100) = 0.014.
    assert share(1.0, 96) == Share(1.0, pytest.approx(0.014))
    assert share(0.5, None) == Share(0.5, None)


def test_the_error_of_a_mean_is_the_mean_error():
    assert mean_share([Share(0.2, 0.01), Share(0.6, 0.03)]) == Share(pytest.approx(0.4), pytest.approx(0.02))
    assert mean_share([Share(0.2, 0.01), Share(0.6)]) == Share(pytest.approx(0.4), None)
    assert mean_share([]) is None


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        # Twice sqrt(0.03^2 + 0.04^2) is 0.1.
        (Share(0.5, 0.03), Share(0.61, 0.04), "better"),
        (Share(0.5, 0.03), Share(0.39, 0.04), "worse"),
        (Share(0.5, 0.03), Share(0.59, 0.04), "within noise"),
        (Share(0.5, 0.03), Share(0.9), ""),
        (None, Share(0.9, 0.04), ""),
    ],
)
def test_a_change_counts_beyond_two_errors_of_the_difference(before, after, expected):
    assert verdict(before, after) == expected
