import report
from report import Spread, circumstances, noise_warning, quantile, table


def test_spread_is_least_median_most() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(1.0, 2.0, 3.0)
    assert Spread.of(iter([1234.0, 1235.0])).text(1) == "1,234.0 – 1,234.5 – 1,235.0"


def test_quantile_is_a_value_that_was_measured() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [quantile(values, share) for share in (0.0, 0.5, 0.9, 0.99, 1.0)] == [1, 50, 90, 99, 100]
    assert quantile([7.0], 0.99) == 7


def test_table_fills_short_rows() -> None:
    assert table(("a", "b", "c"), [("x", "1", "2"), ("y", "absent")]).splitlines() == [
        "| a | b | c |",
        "| --- | ---: | ---: |",
        "| x | 1 | 2 |",
        "| y | absent |  |",
    ]


def test_circumstances_say_where_and_how() -> None:
    assert circumstances().keys() == {"machine", "system", "load", "commit", "command", "date"}
    assert f"{report.cores()} cores" in circumstances()["machine"]


def test_noise_is_confessed() -> None:
    assert noise_warning(0.02) == []
    assert "0.90 cores" in noise_warning(0.9)[0]
