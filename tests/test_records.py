"""Records: what is written, of which commit, and what is refused."""

import json

import pytest
import torch

from benchmarks import lowest_versions, records
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


def test_every_record_is_of_a_commit():
    for path in records.RESULTS.glob("*/*.json"):
        assert json.loads(path.read_text())["environment"]["dirty"] in (False, None), path
    for path in records.RESULTS.glob("*.json"):  # of recipes, and of the lowest versions
        content = json.loads(path.read_text())
        assert not content.get("machine", content)["commit"].endswith("-dirty"), path


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


@pytest.mark.parametrize(
    "name, folder",
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA GeForce RTX 4090", "rtx-4090")],
)
def test_folder_of_a_gpu(name, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert records.device_folder() == folder
