"""What a run is said to show: paired statistics, tables, words."""

import pytest

from vkd_kernels.recipes import report
from vkd_kernels.recipes.task import Metric


def results(values):
    return [
        {
            "arm": arm,
            "seed": seed,
            "m": value,
            "diagnostics": {},
            "steps": 1,
            **dict.fromkeys(("seconds", "cpu_seconds", "images_per_second"), cost),
        }
        for arm, (cost, *found) in values.items()
        for seed, value in enumerate(found)
    ]


def test_paired_difference_is_scipys_paired_t_test():
    from scipy import stats

    a, b = [95.2, 93.1, 96.0, 94.4, 95.9], [93.9, 93.3, 94.1, 93.0, 95.1]
    difference = report.paired_difference(a, b)
    assert difference["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert difference["mean"] == pytest.approx(1.04) and difference["seeds_better"] == 4 and difference["better"]
    lower = report.paired_difference(a, b, higher_is_better=False)
    assert lower["p"] == difference["p"] and lower["seeds_better"] == 1 and not lower["better"]


def test_paired_difference_without_spread():
    assert report.paired_difference([1.0], [0.5])["p"] is None
    assert report.paired_difference([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert report.paired_difference([2.0, 3.0], [1.0, 2.0])["p"] == 0.0
    with pytest.raises(ValueError):
        report.paired_difference([1.0], [1.0, 2.0])


def test_holms_correction():
    assert report.holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0] and report.holm([]) == []


def test_the_words_follow_the_numbers_in_both_directions():
    values = {"base": (1.0, 90, 91, 92), "long": (1.5, 91, 95, 90), "vkd": (2.0, 93, 94, 95.1)}
    names = {arm: arm for arm in values}
    for higher in (True, False):
        metric = Metric("m", "a metric", higher_is_better=higher)
        summary = report.summarize(results(values), list(values), metric)
        text = report.in_words(
            summary, names, metric, "base", focus=["vkd"], longer=["long"], teachers=[{"m": 99.0}] * 3
        )
        said = "better than" if higher else "NOT better than"
        assert f"  {said} base: +3.0 points, better for {3 if higher else 0} of 3 seeds; significant at 0.05" in text
        assert f"  {said} long: +2.0 points, better for {2 if higher else 1} of 3 seeds; not significant" in text
        assert f"{'higher' if higher else 'lower'} is better" in text and "Teachers: 99.0" in text
        assert "LESS than (so this is no comparison at equal time)" in text
        assert "+3.0 ± 0.1" in report.table(summary, names, metric, "base")


def test_significant_alone_is_told_from_significant_after_correction():
    values = {"vkd": (1.0, 1.0, 2.0, 3.1, 4.0), "a": (1.0, 0.8, 1.6, 2.7, 3.2)}
    values |= {"b": (1.0, 1, 2, 3, 4.3), "c": (1, 5, 2, 1, 3)}
    metric = Metric("m", "a metric")
    summary = report.summarize(results(values), list(values), metric)
    difference = summary["vkd"]["versus"]["a"]
    assert difference["p"] < 0.05 < difference["p_holm"]
    text = report.in_words(summary, {a: a for a in values}, metric, "a", focus=["vkd"], longer=[])
    assert "significant at 0.05 by itself, not after Holm's correction" in text
