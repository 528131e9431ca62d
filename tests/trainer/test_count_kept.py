"""How many patches stay visible: exact, whatever the ratio rounds to in binary."""

import pytest

from fastmim.config import ConfigError, count_kept

# ---- masks


@pytest.mark.parametrize(
    "total, ratio, kept",
    [(196, 0.75, 49), (64, 0.75, 16), (9, 0.75, 2), (10, 0.9, 1), (49, 0.65, 17), (49, 0.75, 12), (196, 0.65, 68),
     (100, 0.71, 29), (1000, 0.999, 1), (100000, 1e-5, 99999), (7, 0.0, 7), (256, 0.75, 64)],
)  # fmt: skip
def test_count_kept_is_the_exact_floor(total, ratio, kept):
    assert count_kept(total, ratio) == kept


def test_count_kept_equals_integer_arithmetic_for_all_percentages():
    for total in (9, 10, 49, 64, 196, 256, 1000):
        for percent in range(100):
            kept = total * (100 - percent) // 100
            if kept:
                assert count_kept(total, percent / 100) == kept, (total, percent)


@pytest.mark.parametrize("total, ratio", [(196, 1.0), (196, -0.1), (4, 0.9)])
def test_count_kept_refuses_to_keep_nothing_or_too_much(total, ratio):
    with pytest.raises(ConfigError, match="ratio"):
        count_kept(total, ratio)
