"""Records: what is written, of which commit, and what is refused."""

import json

import pytest
import torch

from benchmarks import lowest_versions, records, report
from tests.test_benchmarks import RATES


def test_records_round_trip(tmp_path):
    record = records.Record("cayley", tmp_path, RATES)
    record.add({"case": "5 x 3", "rows": []})
    record.add({"case": "6 x 3", "rows": []})
    folder = records.device_folder()
    content = records.read(tmp_path)[folder]["cayley"]
    assert content == record.content
    assert [c["case"] for c in content["cases"]] == ["5 x 3", "6 x 3"]
    facts = content["environment"]
    assert facts["torch"] == torch.__version__ and facts["cores"] >= 1 and facts["threads"] == torch.get_num_threads()
    assert facts["dirty"] is None or facts["dirty"] == bool(facts["changed"])
    assert [p.name for p in (tmp_path / folder).iterdir()] == ["cayley.json"]


def test_no_record_is_published_from_a_changed_tree(tmp_path, monkeypatch):
    facts = {**records.environment(), "dirty": True, "changed": ["vkd_kernels/loss.py"]}
    monkeypatch.setattr(records, "environment", lambda: facts)
    with pytest.raises(SystemExit, match=r"changed tree: vkd_kernels/loss.py. Commit first, or write to .*runs/"):
        records.Record("cayley", records.RESULTS, RATES)
    records.Record("cayley", tmp_path, RATES).add({"case": "5 x 3", "rows": []})


def test_the_committed_page_says_what_the_records_say():
    devices = records.read(records.RESULTS)
    plots = {
        device: [
            f"{device}/{title}.png" for title in report.FIGURES if (records.RESULTS / device / f"{title}.png").exists()
        ]
        for device in devices
    }
    assert (records.RESULTS / "README.md").read_text() == report.markdown(devices, plots)


def test_every_record_is_of_a_commit():
    for path in records.RESULTS.glob("*/*.json"):
        facts = json.loads(path.read_text())["environment"]
        assert facts["dirty"] in (False, None) and facts["commit"], path
    for path in records.RESULTS.glob("*.json"):  # of recipes, and of the lowest versions
        content = json.loads(path.read_text())
        machines = content.get("machines", [content.get("machine", content)])
        assert not any(machine["commit"].endswith("-dirty") for machine in machines), path


def test_the_outcome_of_the_lowest_versions_counts_what_ran(tmp_path):
    (tmp_path / "report.xml").write_text(
        "<testsuite><testcase classname='a' name='one'/><testcase classname='a' name='two'><failure/></testcase>"
        "<testcase classname='a' name='three'><skipped message='no GPU'/></testcase></testsuite>"
    )
    outcome = lowest_versions.outcome(tmp_path / "report.xml")
    assert outcome == {"passed": 1, "failed": ["a.two"], "skipped": {"no GPU": 1}}


def test_a_record_in_pieces(tmp_path, monkeypatch):
    """Of one commit and machine, with the ceilings of the first piece; a case that comes again replaces the first."""
    records.Record("cayley", tmp_path, RATES).add({"case": "a", "rows": [1]})
    second = records.Record("cayley", tmp_path, {}, extend=True)
    second.add({"case": "b", "rows": []})
    second.add({"case": "a", "rows": [2]})
    content = records.read(tmp_path)[records.device_folder()]["cayley"]
    assert second.ceilings == content["ceilings"] == RATES
    assert content["cases"] == [{"case": "a", "rows": [2]}, {"case": "b", "rows": []}]
    monkeypatch.setattr(records, "environment", lambda: content["environment"] | {"commit": "another", "time": "later"})
    with pytest.raises(SystemExit, match="another machine's or version's: commit"):
        records.Record("cayley", tmp_path, RATES, extend=True)
    assert records.Record("cayley", tmp_path, RATES).content["cases"] == []


def write(folder, name, **content):
    """A record as a call on a GPU writes it, into <folder>/gpu."""
    environment = {
        "commit": "a" * 40,
        "dirty": False,
        "torch": "2.14",
        "extension": {"compiler": "GNU 12.2.0"},
        "time": str(folder),
    }
    facts = environment | {"device": "some GPU", "cores": 16, "threads": 8} | content.pop("environment", {})
    records.write(folder / "gpu" / f"{name}.json", {"benchmark": name, "environment": facts, **content})


def case(name, seconds):
    row = {"candidate": "vkd_kernels", "pass": "both", "median_s": seconds, "p10_s": seconds, "p90_s": seconds}
    rows = [row | {"share_of_floor": 0.1 / seconds}]
    return {"case": name, "dtype": "float32", "flops": 0, "bytes": 10**9, "floor_s": 0.1, "plot": {}, "rows": rows}


def two_calls(folder):
    """What two calls leave: every kind of record, and the cases of one benchmark in both."""
    first, second = folder / "call1-records", folder / "call2-records"
    step = {"name": "build", "outcome": "passed", "seconds": 1.0, "limit_s": 9, "summary": "done"}
    for number, call in enumerate((first, second), start=1):
        write(call, f"call{number}", steps=[step], rehearsal=False)
    write(first, "ortho_proj_loss", ceilings=RATES, cases=[case("a", 0.2), case("b", 0.4)])
    slower = RATES | {"copy_bytes_per_s": 5e9}
    write(second, "ortho_proj_loss", ceilings=slower, cases=[case("b", 0.5), case("c", 0.8)])
    write(first, "smoke", steps={"right": {"wrong": []}})
    write(second, "smoke", steps={"tile_choices": {}})
    write(first, "training", steps=300, kinds={})
    return [first, second]


def test_records_of_two_calls_are_merged_by_case(tmp_path):
    records.main([*map(str, two_calls(tmp_path)), "--into", str(tmp_path / "results")])
    device = records.read(tmp_path / "results")["gpu"]
    assert {*device} == {"call1", "call2", "ortho_proj_loss", "smoke", "training"}
    assert {*device["smoke"]["steps"]} == {"right", "tile_choices"}
    loss = device["ortho_proj_loss"]
    rows = {measured["case"]: measured["rows"][0] for measured in loss["cases"]}
    assert {name: row["median_s"] for name, row in rows.items()} == {"a": 0.2, "b": 0.5, "c": 0.8}
    assert loss["ceilings"] == RATES
    assert all(row["share_of_floor"] == pytest.approx(0.1 / row["median_s"]) for row in rows.values())


def test_records_of_another_commit_are_not_merged(tmp_path):
    sources, target = two_calls(tmp_path), tmp_path / "results"
    write(target, "smoke", steps={}, environment={"commit": "b" * 40})
    with pytest.raises(SystemExit, match="smoke.json is another machine's or version's: commit. Nothing was overwr"):
        records.merge(sources, target)
    assert [path.name for path in target.rglob("*.json")] == ["smoke.json"]


def test_the_report_renders_what_it_knows_of_two_calls(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "plot", lambda *arguments: [])
    records.merge(two_calls(tmp_path), tmp_path / "results")
    text = report.write(tmp_path / "results").read_text()
    assert "### gpu: call1" in text and "| build | passed | 1 of 9 s | done |" in text
    assert "| c | vkd_kernels |" in text
    for name in ("smoke", "training"):
        assert f"No table is made of this record: [{name}.json](gpu/{name}.json)." in text


@pytest.mark.parametrize(
    "name, folder",
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
)
def test_folder_of_a_gpu(name, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert records.device_folder() == folder
