"""The calls for a machine with a GPU, rehearsed: a first real call must not fail on its plumbing."""

import json
import os
import sys
import tarfile
import time
import types

import pytest
import torch

from benchmarks import records, report
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
    assert all(f"call {call}: at most {limit_s} s" in text for call, limit_s in plan.LIMIT_S.items())


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--records", str(tmp_path)]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_without_a_commit_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records, "commit", lambda: None)
    assert command.main(["--records", str(tmp_path)]) == 2
    assert "VKD_COMMIT=" in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_every_file_and_case_that_the_plan_names_exists():
    from benchmarks import bench_cayley, bench_ortho_proj_loss, bench_training_step

    assert all((records.ROOT / path).exists() for path in plan.KERNEL_TESTS + plan.GPU_TESTS)
    listed = (
        (bench_ortho_proj_loss, plan.LOSS_ROWS),
        (bench_cayley, plan.CAYLEY_ROWS),
        (bench_training_step, plan.STEP_ROWS),
    )
    for module, rows in listed:
        names = [case.name for case in module.cases("cuda")]
        rehearsed = [case.name for case in module.cases("cuda", rehearse=True)]
        assert set(rehearsed) <= set(names)
        planned = [name for call in plan.LIMIT_S for _, name in rows[call]]
        assert planned and len(planned) == len(set(planned))
        assert all(names.count(name) == rehearsed.count(name) == 1 for name in planned)


@pytest.mark.parametrize("call", plan.LIMIT_S)
def test_every_step_is_reached_however_long_the_others_take(call):
    limits = [max(step.limit_s for step in group) for group in plan.groups(call, records.RUNS, rehearse=False)]
    assert sum(limits) <= plan.LIMIT_S[call]


def test_every_claim_is_measured_before_what_no_claim_rests_on():
    """The cases that report.py has targets for are in the first two calls."""
    claimed = [name for call in (1, 2) for rows in (plan.LOSS_ROWS, plan.CAYLEY_ROWS) for _, name in rows[call]]
    claimed += [name for _, name in plan.STEP_ROWS[2]]
    assert all(any(name in target.what for name in claimed) for target in report.GPU_TARGETS)
    names = [step.name for group in plan.groups(2, records.RUNS, rehearse=False) for step in group]
    assert not any("sanitizer" in name or "profile" in name for name in names)


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
    tmp_path = tmp_path / "unknown-commit"
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
    (path,) = tmp_path.glob("*/call1.json")
    assert json.loads(path.read_text())["steps"][0]["outcome"] == "late"


@pytest.mark.parametrize("left_s, outcome", [(19, "late"), (21, "passed")])
def test_a_step_starts_with_half_its_limit_at_least(left_s, outcome):
    result = runner.run_step(step("one", "pass", limit_s=40), left_s, rehearse=False)
    assert result["outcome"] == outcome and (outcome != "late" or result["summary"] == "only 19 s were left")


def test_each_commit_has_a_folder(tmp_path, monkeypatch):
    """A call that is repeated extends its commit's records; a later commit overwrites nothing."""
    groups = [[step("one", "print('fine')")]]
    monkeypatch.setattr(plan, "groups", lambda call, folder, rehearse: groups)
    for call, commit in ((1, "a" * 40), (2, "a" * 40), (1, "a" * 40), (1, "b" * 40)):
        monkeypatch.setattr(records, "environment", lambda commit=commit: {"commit": commit, "time": time.time()})
        assert runner.run_call(call, tmp_path, rehearse=False)
    device = records.device_folder()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")) == [
        "aaaaaaaaaaaa/call1.json",
        "aaaaaaaaaaaa/call2.json",
        f"aaaaaaaaaaaa/records/{device}/call1.json",
        f"aaaaaaaaaaaa/records/{device}/call2.json",
        "bbbbbbbbbbbb/call1.json",
        f"bbbbbbbbbbbb/records/{device}/call1.json",
    ]
    before = (tmp_path / "bbbbbbbbbbbb" / "call1.json").read_text()
    monkeypatch.setattr(records, "environment", lambda: {"commit": "b" * 40, "torch": "later", "extension": "built"})
    for path in tmp_path.glob("b*/records/*/*.json"):
        records.write(path, json.loads(path.read_text()) | {"environment": {"torch": "earlier", "extension": None}})
    with pytest.raises(SystemExit, match=r"version's: torch. Nothing was overwritten: give another folder"):
        runner.run_call(2, tmp_path, rehearse=False)
    assert (tmp_path / "bbbbbbbbbbbb" / "call1.json").read_text() == before


def test_the_commit_of_a_tree_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setenv("VKD_COMMIT", "abc123")
    assert records.commit() == "abc123"


def test_a_wrong_kernel_fails_the_smoke_test(tmp_path, monkeypatch):
    monkeypatch.setattr(smoke, "loss_and_gradients", lambda inputs, loss="", backend="": [inputs[0].detach().double()])
    monkeypatch.setattr(smoke, "relative_error", lambda value, truth: float("nan"))
    assert smoke.main(["right", "--rehearse", "--records", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*/smoke.json")
    assert json.loads(path.read_text())["steps"]["right"]["wrong"]


def test_a_nan_gradient_fails_the_trainings_and_is_written(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import training

    def nan_gradients(spec, inputs):
        return by_reference(spec, inputs) + 0.0 * (inputs.student - inputs.student.detach()).sum().sqrt()

    by_reference = training.by_reference
    monkeypatch.setattr(training, "KINDS", [("mse", False)])
    monkeypatch.setattr(training, "implementations", lambda semi_orthogonal: {"broken": nan_gradients})
    assert training.main(["--rehearse", "--steps", "2", "--records", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("*/training.json")
    (kind,) = json.loads(path.read_text())["kinds"].values()
    assert kind["side_by_side"]["worst_errors"]["broken"][1] == "nan"
    assert [line.split(" is off")[0] for line in kind["side_by_side"]["wrong"]] == ["broken: student"]
    assert kind["on_its_own"]["final_losses"]["broken"]["last"] == "nan"


def test_any_nvidia_chip_is_compiled_for(monkeypatch):
    """Also one that the table of the ahead-of-time tests has not: an L4, say."""
    triton = pytest.importorskip("triton")
    from benchmarks.gpu import warm

    targets = []
    monkeypatch.setattr(warm, "launched", lambda name, chip: [((), {}, {})])
    monkeypatch.setattr(warm.aot, "source", lambda *launch: targets.append(launch[-1]) or (None, {}))
    monkeypatch.setattr(triton, "compile", lambda code, target, options: None)
    assert warm.compile_one(("pooled bf16", "sm_89")) == ("pooled bf16", None)
    assert [target.arch for target in targets] == [89]


EVERY_PROGRAM = """
from benchmarks.gpu import warm
for name in warm.programs():
    kernels = {kernel.__name__ for kernel, _, _ in warm.launched(name, "sm_90")}
    print(name, "|", *kernels)
"""


@pytest.mark.slow
def test_what_the_calls_launch_is_compiled_before(tmp_path):
    """Their losses, run without a GPU, reach the launches of the kernels that are compiled then."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = processes.run_python("-c", EVERY_PROGRAM, cwd=records.ROOT, env=environment, seconds=600)
    assert result.returncode == 0, result.stdout + result.stderr
    kernels = {name: set(words.split()) for name, words in (line.split(" | ") for line in result.stdout.splitlines())}
    expected = {
        "right (512, 192, 3024) torch.bfloat16 mse": {"loss_tile", "gradient_tiles"},
        "right (4096, 192, 3024) torch.bfloat16 cosine": {"loss_tile", "cosine_rows", "scale_gradients"},
        "detection 34000": {"scatter_tiles", "scatter_gradients", "loss_tile", "scale_gradients"},
        "detection 600": {"scatter_tiles", "scatter_gradients", "loss_tile", "gradient_tiles"},
        "row-stationary": {"row_stationary"},
        "once small 0": {"loss_tile", "gradient_tiles"},
    }
    assert all(launched <= kernels[name] for name, launched in expected.items()), kernels
    assert all(kernels.values()) and len(kernels) > 40


def test_a_smoke_test_that_is_cut_short_keeps_its_results(tmp_path, monkeypatch):
    def endless(rehearse):
        yield {"first": 1.0}
        yield {"first": 1.0, "second": 2.0}
        raise KeyboardInterrupt

    monkeypatch.setitem(smoke.STEPS, "right", endless)
    with pytest.raises(KeyboardInterrupt):
        smoke.main(["right", "--records", str(tmp_path)])
    (path,) = tmp_path.glob("*/smoke.json")
    kept = json.loads(path.read_text())["steps"]["right"]
    assert kept.pop("seconds") >= 0 and kept == {"first": 1.0, "second": 2.0}


def test_results_of_a_smoke_test_are_written_one_by_one(monkeypatch):
    monkeypatch.setattr(smoke, "median_us", lambda function, repeats: 1.0)
    monkeypatch.setattr(smoke, "TOKEN_COLUMNS", (192, 384))
    counts = [sum(map(len, times.values())) for times in smoke.tile_choices(rehearse=True)]
    assert counts == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(smoke, "relative_error", lambda value, truth: 0.0)
    monkeypatch.setattr(smoke, "loss_and_gradients", lambda *arguments: [])
    assert [len(result["errors"]) for result in smoke.right(rehearse=True)] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("call", plan.LIMIT_S)
def test_the_calls_run_on_a_cpu(call, tmp_path, monkeypatch):
    """Every step of the call, tiny, through Triton's interpreter; a step's process need not import PyTorch anew."""
    pytest.importorskip("triton")
    popen = types.SimpleNamespace(**vars(runner.subprocess) | {"Popen": processes.Python})
    monkeypatch.setattr(runner, "subprocess", popen)
    status = command.main(["--call", str(call), "--rehearse", "--records", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    steps = json.loads((folder / f"call{call}.json").read_text())["steps"]
    bad = [(s["name"], s["outcome"], s["tail"][-6:]) for s in steps if s["outcome"] != "passed"]
    assert status == 0 and len(steps) >= 3 and not bad, bad
    with tarfile.open(folder / f"call{call}-records.tgz") as tar:
        assert any(name.endswith("ortho_proj_loss.json") for name in tar.getnames())
