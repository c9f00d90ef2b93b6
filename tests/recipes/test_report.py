"""What a run is said to show: paired statistics and the table."""

import pytest

from vkd_kernels.recipes import report
from vkd_kernels.recipes.task import Metric


def results(values):
    cost = {"diagnostics": {}, "curve": [(1, 2.0)], "steps": 1, "seconds": 1.0, "cpu_seconds": 1.0}
    return [
        {"arm": arm, "seed": seed, "m": value, **cost}
        for arm, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def test_without_git_the_commit_is_not_known(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert report.machine()["commit"] is None


def test_a_machine_is_noted_with_the_number_of_ranks_where_there_are_several(monkeypatch):
    assert "ranks" not in report.machine()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert report.machine()["ranks"] == 2


def test_paired_difference_is_scipys_paired_t_test():
    from scipy import stats

    a, b = [95.2, 93.1, 96.0, 94.4, 95.9], [93.9, 93.3, 94.1, 93.0, 95.1]
    difference = report.paired_difference(a, b)
    assert difference["p"] == pytest.approx(stats.ttest_rel(a, b).pvalue, rel=1e-9)
    assert difference["mean"] == pytest.approx(1.04) and difference["seeds_better"] == 4 and difference["better"]
    lower = report.paired_difference(a, b, higher_is_better=False)
    assert lower["p"] == difference["p"] and lower["seeds_better"] == 1 and not lower["better"]
    assert report.paired_difference([1.0], [0.5])["p"] is None  # without spread there is nothing to test
    assert report.paired_difference([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert report.paired_difference([2.0, 3.0], [1.0, 2.0])["p"] == 0.0


def test_holms_correction():
    assert report.holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0] and report.holm([]) == []


@pytest.mark.parametrize("higher", [True, False])
def test_the_table_compares_seed_by_seed_with_the_baseline(higher):
    values = {"base": (90.0, 91, 92), "long": (91.0, 95, 90), "vkd": (93.0, 94, 95.1)}
    metric = Metric("m", "a metric", higher_is_better=higher)
    summary = report.summarize(results(values), {arm: arm for arm in values}, metric, "base")
    text = report.table(summary, metric, "base")
    base, long, vkd = (line.split() for line in text.splitlines()[2:5])
    assert base[:5] == ["base", "91.0", "±", "1.0", "(baseline)"]
    assert vkd[:8] == ["vkd", "94.0", "±", "1.1", "+3.0", "±", "0.1", "3/3" if higher else "0/3"]
    assert long[7] == ("2/3" if higher else "1/3")
    ps = [summary[arm]["minus_baseline"][key] for key in ("p", "p_holm") for arm in ("long", "vkd")]
    assert ps[2:] == pytest.approx(report.holm(ps[:2])) and vkd[8:10] != long[8:10]
    assert f"{'higher' if higher else 'lower'} is better" in text and "3 seeds" in text
    alone = report.summarize(results({"a": [1.0]}), {"a": "a"}, metric, "a")
    assert "no test" in report.table(alone, metric, "a")


def test_a_summary_has_the_worst_diagnostics_and_means_of_the_curves_and_costs():
    of_seeds = results({"a": [1.0, 2.0, 3.0]})
    for result, x in zip(of_seeds, (1.0, 5.0, 3.0), strict=True):
        result |= {"diagnostics": {"error": x}, "curve": [(1, x), (2, 2 * x)], "seconds": 10 * x, "cpu_seconds": 20 * x}
    summary = report.summarize(of_seeds, {"a": "a"}, Metric("m", "a metric"), "a")["a"]
    assert summary["diagnostics"] == {"error": 5.0}
    assert summary["curve"] == [(1, 3.0), (2, 6.0)]
    assert (summary["seconds"], summary["cpu_seconds"]) == (30.0, 60.0)
