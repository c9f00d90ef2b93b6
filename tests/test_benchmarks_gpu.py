"""The two calls for a machine with a GPU, rehearsed: a first real call must not fail on its plumbing."""

import json
import sys
import tarfile
import time
import types

import pytest
import torch

from benchmarks import records
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import plan, runner, smoke
from tests.helpers import processes


def step(name, code, limit_s=20, **options):
    return plan.Step(name, [sys.executable, "-c", code], limit_s, **options)


def test_the_plan_is_listed_without_a_gpu(capsys):
    assert command.main(["--list"]) == 0
    text = capsys.readouterr().out
    for words in ("build", "warm", "bench_cayley", "bench_ortho_proj_loss", "bench_training_step", "memcheck", "ncu"):
        assert words in text
    assert "at most 350 s" in text and "at most 290 s" in text


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--records", str(tmp_path)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_every_file_and_case_that_the_plan_names_exists():
    from benchmarks import bench_cayley, bench_ortho_proj_loss

    assert all((records.ROOT / path).exists() for path in plan.KERNEL_TESTS + plan.GPU_TESTS)
    for module, rows in ((bench_ortho_proj_loss, plan.LOSS_ROWS), (bench_cayley, plan.CAYLEY_ROWS)):
        names = [case.name for case in module.cases("cuda")]
        for _, part in rows[1] + rows[2]:
            assert any(part in name for name in names), part
        rehearsed = [case.name for case in module.cases("cuda", rehearse=True)]
        assert set(rehearsed) <= set(names)
        assert all(any(part in name for name in rehearsed) for _, part in rows[1] + rows[2])


def test_the_limits_of_a_call():
    """What is most valuable is reached even where every step before it takes its whole limit."""
    for call, valuable in ((1, "pooled 512"), (2, "compute-sanitizer racecheck")):
        spent = 0
        for group in plan.groups(call, records.RUNS, rehearse=False):
            spent += max(step.limit_s for step in group)
            if any(valuable in step.name for step in group):
                break
        assert spent <= plan.LIMIT_S[call] + 60, (call, spent)


def test_one_steps_failure_loses_nothing(tmp_path, monkeypatch):
    endless = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).wait()"
    )
    groups = [
        [step("good", "print('fine')"), step("beside", "print('too')")],
        [step("bad", "print('reason'); raise SystemExit(3)")],
        [step("endless", endless, limit_s=5)],
        [step("absent", "", missing="no such tool")],
        [step("last", "print('still here')")],
    ]
    monkeypatch.setattr(plan, "groups", lambda call, folder, rehearse: groups)
    monkeypatch.setattr(records, "environment", lambda: {"device": "some GPU"})
    began = time.monotonic()
    assert not runner.run_call(1, tmp_path, rehearse=False)
    assert time.monotonic() - began < 55  # nobody waited for the endless step's child
    steps = json.loads((tmp_path / "call1.json").read_text())["steps"]
    assert [(s["name"], s["outcome"], s["summary"]) for s in steps] == [
        ("good", "passed", "fine"),
        ("beside", "passed", "too"),
        ("bad", "failed", "reason"),
        ("endless", "timed out", ""),
        ("absent", "skipped", "no such tool"),
        ("last", "passed", "still here"),
    ]
    assert steps[2]["returncode"] == 3
    assert "reason" in (tmp_path / "call1.log").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


def test_a_late_step_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "groups", lambda call, folder, rehearse: [[step("one", "pass")]])
    monkeypatch.setattr(records, "environment", dict)
    monkeypatch.setitem(plan.LIMIT_S, 1, 0)
    assert not runner.run_call(1, tmp_path, rehearse=False)
    assert json.loads((tmp_path / "call1.json").read_text())["steps"][0]["outcome"] == "late"


def test_the_commit_of_a_tree_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("VKD_COMMIT", "abc123")
    assert records.commit() == "abc123"


def test_a_wrong_kernel_fails_the_smoke_test(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "loss_and_gradients", lambda inputs, loss="", backend="": [inputs[0].detach().double()])
    monkeypatch.setattr(smoke, "relative_error", lambda value, truth: float("nan"))
    assert smoke.main(["right", "--rehearse", "--records", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "smoke.json").read_text())["steps"]["right"]["wrong"]


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_the_calls_run_on_a_cpu(call, tmp_path, monkeypatch):
    """Every step of the call, tiny, through Triton's interpreter; a step's process need not import PyTorch anew."""
    pytest.importorskip("triton")
    popen = types.SimpleNamespace(**vars(runner.subprocess) | {"Popen": processes.Python})
    monkeypatch.setattr(runner, "subprocess", popen)
    status = command.main(["--call", str(call), "--rehearse", "--records", str(tmp_path)])
    report = json.loads((tmp_path / f"call{call}.json").read_text())
    bad = [(s["name"], s["outcome"], s["tail"][-6:]) for s in report["steps"] if s["outcome"] != "passed"]
    assert status == 0 and len(report["steps"]) >= 6 and not bad, bad
    with tarfile.open(tmp_path / f"call{call}-records.tgz") as tar:
        assert any(name.endswith("ortho_proj_loss.json") for name in tar.getnames())
