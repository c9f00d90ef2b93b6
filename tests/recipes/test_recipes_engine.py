"""The engine of `vkd distill` on a task of seconds: files, bits after any interruption, ranks, statistics, errors."""

import csv
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import processes

pytest.importorskip("lightning_fabric", reason="needs the extra [recipes]: lightning-fabric")
pytest.importorskip("yaml", reason="needs the extra [recipes]: pyyaml")
pytest.importorskip("safetensors", reason="needs the extra [recipes]: safetensors")
pytest.importorskip("scipy", reason="needs the extra [recipes]: scikit-learn")
pytest.importorskip("matplotlib", reason="needs the extra [recipes]: matplotlib")
pytest.importorskip("tqdm", reason="needs the extra [recipes]: tqdm")
pytest.importorskip("tensorboard", reason="needs the extra [recipes]: tensorboard")

import toy_task

import vkd_kernels as vk
from vkd_kernels import cli
from vkd_kernels.recipes import ablate, compare, devices, engine, loading, log, report, runs, tasks
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.tasks import Metric

TESTS = Path(__file__).parents[1]
ARMS = ["--arms", "alone", "longer", "linear", "vkd"]


def vkd(*words):
    return cli.main([str(word) for word in words])


def distill(folder, *words):
    return vkd("distill", "toy_task", "--output", folder, "--jobs", 0, "--quiet", *words)


def start(command, *words, **options):
    """The command in a process group of its own, as a terminal starts it; it ends with its test."""
    environment = {"PYTHONPATH": f"{TESTS}/helpers:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    return processes.popen([sys.executable, *command, *map(str, words)], env=environment, **options)


VKD = ("-m", "vkd_kernels.cli", "distill", "toy_task")


def wait_for(process, condition):
    deadline = time.monotonic() + 200
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def outcome(folder):
    """What must come out the same, bit for bit: everything but clocks and the machine."""
    clocks = {"seconds", "cpu_seconds", "images_per_second"}
    found = json.loads((folder / "metrics.json").read_text())
    lines = {
        str(path.relative_to(folder)): [
            {k: v for k, v in json.loads(line).items() if k not in clocks} for line in path.read_text().splitlines()
        ]
        for path in folder.rglob("metrics.jsonl")
    }
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return [{k: v for k, v in r.items() if k not in clocks} for r in found["runs"]], lines, weights


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine") / "run"
    assert distill(folder, *ARMS) == 0
    return folder


class StopAt(runs.Worker):
    """Asks a training to stop before a step."""

    def __init__(self, step):
        self.left = step

    signal = signal.SIGTERM

    def should_stop(self):
        self.left -= 1
        return self.left < 0

    def report(self, task, images, expected=None):
        pass


def train(folder, worker=None, **values):
    """One arm of the toy task, here; values are keys with __ for the dot."""
    config = configs.replace(toy_task.Config(), {k.replace("__", "."): v for k, v in values.items()})
    worker = worker or StopAt(10**9)
    if not (folder / "teacher").exists():
        compare.train_teacher("toy_task", config, 0, folder, None, worker)
    compare.train_arm("toy_task", config, "vkd", 0, folder, None, worker)
    return runs.load_json(folder / "vkd" / "seed-00" / "result.json")


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_run_writes_its_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["machine"]["torch"] == torch.__version__ and metrics["config"]["optim.steps"] == 30
    assert [(r["seed"], r["arm"]) for r in metrics["runs"]] == [(s, a) for s in (0, 1) for a in ARMS[1:]]
    assert [r["steps"] for r in metrics["runs"]] == [30, 45, 30, 30] * 2
    assert metrics["runs"][3]["curve"][-1] == [30, metrics["runs"][3]["error"]]
    with open(finished / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["error"]) for row in rows] == [r["error"] for r in metrics["runs"]]
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    for arm in ARMS[1:]:
        folder = finished / arm / "seed-01"
        values, _ = configs.read_yaml(folder / "config.yaml")
        assert values["arm"] == arm and values["seed"] == 1 and values["distill.weight"] == float(arm in "linear vkd")
        lines = runs.load_json_lines(folder / "metrics.jsonl")
        with open(folder / "metrics.csv", newline="") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == [line["step"] for line in lines]
        assert (folder / "figures" / "outputs.txt").exists()
    assert not list(finished.rglob("checkpoint.pt")) and not list(finished.rglob("*.partial-*"))


def test_metrics_lines_hold_losses_rates_evaluations_and_diagnostics(finished):
    lines = runs.load_json_lines(finished / "vkd" / "seed-00" / "metrics.jsonl")
    losses = [line for line in lines if "train/total" in line]
    assert [line["step"] for line in losses] == [7, 14, 21, 28, 30] and losses[0]["images"] == 56
    assert all(line["train/total"] == pytest.approx(line["train/task"] + line["train/features"]) for line in losses)
    assert losses[-1]["lr"] == pytest.approx(1e-2 * toy_task.Config().optim.rate(29, 30))
    evaluations = [line for line in lines if "eval/error" in line]
    assert [line["step"] for line in evaluations] == [10, 20, 30]
    assert all(line["diagnostics/max |PᵀP - I|"] < 1e-5 for line in evaluations)


def test_the_student_is_stored_alone(finished):
    state = runs.load_safetensors(finished / "vkd" / "seed-00" / "student.safetensors")
    student = toy_task.Net(5)
    student.load_state_dict(state)
    assert set(state) == set(student.state_dict())


def test_table_and_words(finished):
    text = (finished / "table.txt").read_text()
    for part in ("test error", "minus student alone", "better in", "p Holm", "max |PᵀP - I|", "CPU s", "(baseline)"):
        assert part in text.split("\n\n")[0]
    assert "lower is better. 2 seeds" in text and "V_kD is on average" in text and "significant at 0.05" in text
    assert "Teachers: 3.142" in text and "student alone, equal time: " in text


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, run__tensorboard=True)
    board = EventAccumulator(str(tmp_path / "vkd" / "seed-00" / "tensorboard"))
    board.Reload()
    assert {"train/total", "eval/error", "lr"} <= set(board.Tags()["scalars"])
    assert [event.step for event in board.Scalars("eval/error")] == [10, 20, 30]


# ---- stopping and continuing -----------------------------------------------------------------------------------------


def test_ctrl_c_in_worker_processes_then_resume_gives_the_same_bits(finished, tmp_path):
    folder = tmp_path / "run"
    process = start(VKD, *ARMS, "--output", folder, "--jobs", 2, "run.slow=0.1")
    wait_for(process, lambda: any(path.stat().st_size for path in folder.glob("*/*/metrics.jsonl")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert f"vkd distill toy_task --resume --output {folder}" in errors and "Traceback" not in errors
    assert not (folder / "metrics.json").exists()
    saved = [runs.load_tensors(path)["counters"]["step"] for path in folder.rglob("checkpoint.pt")]
    assert any(0 < step < 45 for step in saved), "the interruption missed every loop: nothing is tested"

    assert distill(folder, "--resume", "run.slow=0") == 0
    assert outcome(folder) == outcome(finished)
    assert distill(folder, "--resume", "--seeds", 1, "--arms", "vkd") == 0  # done already: reported anew
    assert len(json.loads((folder / "metrics.json").read_text())["runs"]) == 1


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    process = start(VKD, *ARMS, "--output", folder, "--jobs", 0, "run.slow=0.05", "run.save_every=3")
    checkpoint = folder / "alone" / "seed-00" / "checkpoint.pt"
    wait_for(process, lambda: checkpoint.exists() and runs.load_tensors(checkpoint)["counters"]["step"] >= 6)
    process.kill()
    process.communicate(timeout=100)
    (checkpoint.parent / "checkpoint.pt.partial-1").write_bytes(b"half")  # what it may have been writing
    with open(checkpoint.parent / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "tra')
    step = runs.load_tensors(checkpoint)["counters"]["step"]
    assert 6 <= step < 30

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            toy_task.Toy, "batches", lambda self, start, f=toy_task.Toy.batches: (seen.append(start), f(self, start))[1]
        )
        assert distill(folder, "--resume", "run.slow=0") == 0
    assert seen[0] == step and seen[1:] == [0] * 7
    assert outcome(folder) == outcome(finished)
    assert not list(folder.rglob("*.partial-*"))


@pytest.mark.parametrize("step", [0, 1, 9, 29])
def test_a_stop_before_any_step_continues_to_the_same_bits(tmp_path, finished, step):
    with pytest.raises(runs.Interrupted) as stop:
        train(tmp_path, StopAt(step))
    assert stop.value.exit_code == 128 + signal.SIGTERM
    saved = runs.load_tensors(tmp_path / "vkd" / "seed-00" / "checkpoint.pt")  # with weights_only
    assert saved["counters"]["step"] == step
    result = train(tmp_path)
    assert result["error"] == runs.load_json(finished / "vkd" / "seed-00" / "result.json")["error"]
    name = "vkd/seed-00/student.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_sigterm_saves_and_exits_with_143(tmp_path, monkeypatch, capsys):
    plain = toy_task.Toy.step

    def step(self, fit, batch):
        if fit.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, fit, batch)

    monkeypatch.setattr(toy_task.Toy, "step", step)
    assert distill(tmp_path / "run", "--arms", "vkd") == 143
    assert "--resume" in capsys.readouterr().err
    assert runs.load_tensors(tmp_path / "run/vkd/seed-00/checkpoint.pt")["counters"]["step"] == 13
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_refuses_another_configuration_but_takes_seeds_arms_and_run(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert distill(folder, "--seeds", 1, "--arms", "alone") == 0
    assert distill(folder, "--resume", "optim.steps=31", "optim.lr=1", "run.log_every=5") == 2
    message = capsys.readouterr().err
    assert "optim.lr is 0.01 there and 1 here; optim.steps is 30 there and 31 here" in message and "run." not in message
    assert distill(folder, "--resume", "--seeds", 2, "--arms", *ARMS[1:], "run.eval_every=10") == 0
    assert outcome(folder) == outcome(finished)


def test_a_folder_with_a_run_is_not_overwritten(finished, capsys):
    before = (finished / "metrics.json").read_bytes()
    assert distill(finished) == 2
    assert "add --resume" in capsys.readouterr().err
    assert (finished / "metrics.json").read_bytes() == before


def test_resume_begins_a_run_where_there_is_none_unless_a_folder_was_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(compare, "run", lambda e, folder, *_, resumed, **__: (begun.append((folder, resumed)), "")[1])
    assert vkd("distill", "toy_task", "--resume") == 0
    compare.start_folder(
        Path("runs/toy_task"),
        compare.resolve(compare.DISTILL, "toy_task", None, None, [], None, None, None, None),
        False,
    )
    assert vkd("distill", "toy_task", "--resume") == 0
    assert vkd("distill", "toy_task") == 0
    default = Path("runs/toy_task")
    assert begun == [(default, False), (default, True), (Path("runs/toy_task-2"), False)]
    assert vkd("distill", "toy_task", "--resume", "--output", "elsewhere") == 2
    assert "elsewhere holds no run" in capsys.readouterr().err and not Path("elsewhere").exists()


@pytest.mark.parametrize("content", ["", "{", "a: 1", "task: detection", "task: toy_task\noptim: {steps: 3}"])
def test_resume_refuses_a_damaged_or_foreign_folder(tmp_path, capsys, content):
    (tmp_path / "config.yaml").write_text(content)
    assert distill(tmp_path, "--resume") == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["config.yaml"]


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_are_stopped_resumed_and_give_what_one_process_gives(tmp_path):
    words = ["--arms", "vkd", "linear", "--seeds", 1, "student.dropout=0", "distill.normalization=batch_norm"]
    words += ["student.batch_norm=true", "optim.accumulate=2", "optim.clip_norm=0.5", "optim.steps=40"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *VKD)
    two, one = tmp_path / "two", tmp_path / "one"
    process = start(launcher, *words, "--output", two, "run.slow=0.1")
    wait_for(process, lambda: (two / "vkd/seed-00/metrics.jsonl").exists())
    process.terminate()
    _, errors = process.communicate(timeout=100)
    assert f"--resume --output {two}" in errors, errors  # once, although both ranks stopped
    assert errors.count("--resume --output") == 1
    step = runs.load_tensors(two / "vkd/seed-00/checkpoint.pt")["counters"]["step"]
    assert 0 <= step < 40 and step % engine.STOP_EVERY == 0

    process = start(launcher, "--resume", "--output", two, "run.slow=0")
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert printed.count("test error") >= 1 and printed.count("running in") + printed.count("resuming in") == 1
    assert distill(one, *words) == 0
    (found, _, _), (expected, _, _) = outcome(two), outcome(one)
    for a, b in zip(found, expected, strict=True):
        assert a["error"] == pytest.approx(b["error"], rel=1e-4)
        assert a["diagnostics"] == pytest.approx(b["diagnostics"], abs=1e-6)
    theirs, ours = (runs.load_safetensors(f / "vkd/seed-00/student.safetensors") for f in (two, one))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)
    lines, wanted = (runs.load_json_lines(f / "vkd/seed-00/metrics.jsonl") for f in (two, one))
    assert [line["step"] for line in lines] == [line["step"] for line in wanted]
    for a, b in zip(lines, wanted, strict=True):
        assert a.keys() == b.keys() and a.get("train/total", 0) == pytest.approx(b.get("train/total", 0), rel=1e-3)


# ---- pieces of the loop ----------------------------------------------------------------------------------------------


def test_accumulated_parts_give_what_the_whole_batch_gives(tmp_path):
    whole = train(tmp_path / "a", student__dropout=0.0)
    parts = train(tmp_path / "b", student__dropout=0.0, optim__accumulate=4)
    assert parts["error"] == pytest.approx(whole["error"], rel=1e-4)
    with pytest.raises(OptionError, match=r"optim\.batch_size: 8 images are not equal parts"):
        train(tmp_path / "c", optim__accumulate=3)


def test_mixed_precision_keeps_batches_and_the_projection_exact(tmp_path):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append((x.dtype, y.dtype))
            return y

    fabric = devices.make_fabric(engine.Run(accelerator="cpu"), engine.Optim(steps=1, precision="bf16-mixed"))
    output = fabric.setup_module(Spy(3, 3))(torch.ones(2, 3))
    assert seen == [(torch.float32, torch.bfloat16)] and output.dtype == torch.float32
    result = train(tmp_path, optim__precision="bf16-mixed")
    assert result["diagnostics"]["max |PᵀP - I|"] < 1e-5
    assert result["error"] == pytest.approx(train(tmp_path / "32")["error"], rel=0.1)
    with pytest.raises(OptionError, match="16-mixed needs a GPU"):
        train(tmp_path / "16", optim__precision="16-mixed")


def test_float16_with_a_loss_scale_clips_and_continues_to_the_same_bits(tmp_path):
    """What a GPU does with 16-mixed, on a CPU, whose accelerator the configuration refuses for it."""
    config = configs.replace(toy_task.Config(), {"optim.precision": "16-mixed", "optim.clip_norm": 0.1})

    def once(folder, worker):
        fabric = devices.Fabric(accelerator="cpu", devices=1, plugins=[devices.Autocast("16-mixed", device="cpu")])
        if not folder.exists():
            compare.train_teacher("toy_task", config, 0, folder, fabric, worker)
        compare.train_arm("toy_task", config, "vkd", 0, folder, fabric, worker)
        return fabric.strategy.precision.scaler, (folder / "vkd/seed-00/student.safetensors").read_bytes()

    scaler, weights = once(tmp_path / "a", runs.Worker())
    with pytest.raises(runs.Interrupted):
        once(tmp_path / "b", StopAt(20))
    again, same = once(tmp_path / "b", runs.Worker())
    assert same == weights and again.state_dict() == scaler.state_dict()
    assert (
        scaler.state_dict()["_growth_tracker"] > 0
        and runs.load_json(tmp_path / "a/vkd/seed-00/result.json")["error"] < 1
    )


def test_a_loss_that_is_not_finite_ends_the_training_and_spares_the_checkpoint(tmp_path, monkeypatch):
    plain = toy_task.Distiller.forward
    calls = []

    def forward(self, batch):
        calls.append(1)
        return {name: loss * float("nan" if len(calls) > 12 else 1) for name, loss in plain(self, batch).items()}

    monkeypatch.setattr(toy_task.Distiller, "forward", forward)
    with pytest.raises(runs.RunError, match="not finite around step 14"):
        train(tmp_path)
    saved = runs.load_tensors(tmp_path / "vkd/seed-00/checkpoint.pt")
    assert saved["counters"]["step"] == 9 and all(value.isfinite().all() for value in saved["model"].values())


def test_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    for steps, warmup, rise in [(1, 0.0, 0), (10, 0.1, 1), (100, 0.3, 30), (100, 5, 5)]:
        optim = engine.Optim(lr=2.0, min_lr=0.02, warmup=warmup, steps=steps)
        rates = [optim.rate(step, steps) for step in range(steps)]
        peak = max(rise - 1, 0)
        assert rates.index(max(rates)) == peak and rates[peak] == 1.0
        assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
        assert optim.rate(steps, steps) == pytest.approx(0.01 if steps > rise else 1.0)
    assert engine.Optim(schedule="constant", steps=9, warmup=2).rate(8, 9) == 1.0


def test_steps_are_given_or_follow_from_epochs():
    assert engine.Optim(steps=7).total_steps(1000) == 7
    assert engine.Optim(epochs=2.5, batch_size=10).total_steps(109) == 25
    for values in ({}, {"steps": 1, "epochs": 1.0}):
        with pytest.raises(OptionError, match="exactly one must be above 0"):
            engine.Optim(**values)
    with pytest.raises(OptionError, match=r"optim\.min_lr"):
        engine.Optim(steps=1, lr=1e-3, min_lr=1e-2)


def test_weight_decay_spares_the_projection_biases_and_what_modules_say():
    class Student(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.token = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"token"}

    model = nn.ModuleDict({"student": Student(), "loss": vk.OrthoProjLoss(4, 6, scale="learned")})
    decayed, spared = engine.parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3 and [tuple(p.shape) for p in decayed["params"]] == [(4, 3)]
    assert spared["weight_decay"] == 0 and len(spared["params"]) == len(list(model.parameters())) - 1


def test_split_cuts_tensors_and_lists_and_keeps_the_form():
    batch = {"x": torch.arange(4), "y": ([1, 2, 3, 4], torch.arange(8).view(4, 2)), "name": "n"}
    first, second = engine.split(batch, 2)
    assert first["x"].tolist() == [0, 1] and second["y"][0] == [3, 4] and second["y"][1].tolist() == [[4, 5], [6, 7]]
    assert first["name"] == second["name"] == "n" and engine.split(batch, 1)[0] is batch
    with pytest.raises(OptionError, match=r"optim\.accumulate: 3 parts of a batch of 4"):
        engine.split(batch, 3)


def test_moving_average_follows_parameters_and_copies_buffers():
    student = nn.BatchNorm1d(2)
    ema = engine.Ema(student, 0.5)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(7.0)
    ema.update(student, 10**6)
    assert ema.average.weight.tolist() == [2.0, 2.0] and ema.average.running_mean.tolist() == [7.0, 7.0]
    ema.update(student, 0)  # early: weight 0.9
    assert ema.average.weight.tolist() == pytest.approx([2.9, 2.9])
    assert not ema.average.training and not any(p.requires_grad for p in ema.average.parameters())


class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index, torch.rand(())


def test_loaded_batches_depend_on_seed_and_step_alone():
    fabric = devices.make_fabric(engine.Run(accelerator="cpu"), engine.Optim(steps=1))

    def take(start, count, **options):
        stream = loading.batches(Items(), fabric, batch_size=4, seed=3, start=start, **options)
        return [[x.tolist() for x in next(stream)] for _ in range(count)]

    whole = take(0, 5)
    assert take(3, 2) == whole[3:] and take(1, 2, workers=1) == whole[1:3]
    epochs = [sorted(whole[0][0] + whole[1][0]), sorted(whole[2][0] + whole[3][0])]
    assert all(len(set(rows)) == 8 for rows in epochs) and whole[0] != whole[2]
    with pytest.raises(OptionError, match="only 10 training images"):
        next(loading.batches(Items(), fabric, batch_size=11, seed=0))


# ---- what can go wrong -----------------------------------------------------------------------------------------------


def test_a_full_disk_says_so_and_the_last_checkpoint_is_intact(tmp_path, finished):
    with pytest.raises(runs.Interrupted):
        train(tmp_path, StopAt(10))
    checkpoint = tmp_path / "vkd/seed-00/checkpoint.pt"
    before = checkpoint.read_bytes()
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limit[1]))  # every write beyond it fails
    try:
        with pytest.raises(
            runs.RunError, match=r"cannot write .*checkpoint\.pt: File too large; what was there before"
        ):
            train(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.read_bytes() == before and not list(tmp_path.rglob("*.partial-*"))
    train(tmp_path)
    name = "vkd/seed-00/student.safetensors"
    assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert distill(tmp_path / "file" / "run") == 2
    assert "vkd: error: cannot write" in capsys.readouterr().err


def test_a_checkpoint_of_another_architecture(tmp_path):
    with pytest.raises(runs.Interrupted):
        train(tmp_path, StopAt(3))
    with pytest.raises(runs.RunError, match=r"checkpoint\.pt: model is of another architecture: .*size mismatch"):
        train(tmp_path, student__width=6)
    with pytest.raises(runs.RunError, match=r"checkpoint\.pt: ema is missing|ema"):
        runs.save_tensors(
            tmp_path / "vkd/seed-00/checkpoint.pt",
            {k: v for k, v in runs.load_tensors(tmp_path / "vkd/seed-00/checkpoint.pt").items() if k != "ema"},
        )
        train(tmp_path)


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "result.json").write_text('{"error": 9')
    with pytest.raises(runs.RunError, match=r"result\.json.*delete this file"):
        runs.load_json(tmp_path / "result.json")
    runs.save_tensors(tmp_path / "x.pt", {"a": torch.arange(5)})
    assert runs.load_tensors(tmp_path / "x.pt")["a"].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:100])
    with pytest.raises(runs.RunError, match=r"x\.pt.*delete this file"):
        runs.load_tensors(tmp_path / "x.pt")
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(runs.RunError, match=r"cannot read .*x\.safetensors"):
        runs.load_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nx\n{"step": 3}\n')
    with pytest.raises(runs.RunError, match=r"metrics\.jsonl, line 2"):
        log.Log(tmp_path, 3, False)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    runs.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError(28, "No space left on device")

    with pytest.raises(runs.RunError, match=r"cannot write .*file: No space left on device"):
        runs.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_folders_are_locked(tmp_path):
    with runs.locked(tmp_path), pytest.raises(runs.RunError, match="in use"), runs.locked(tmp_path):
        pass
    with runs.locked(tmp_path):
        pass


def test_an_error_in_a_training_is_the_commands(tmp_path, capsys):
    assert distill(tmp_path / "run", f"data.missing={tmp_path}/nowhere") == 2
    assert f"vkd: error: data.missing: there is no folder {tmp_path}/nowhere" in capsys.readouterr().err
    (tmp_path / "nowhere").mkdir()  # put right, it continues
    assert distill(tmp_path / "run", "--resume", "--seeds", 1) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "alone", "vdk"], "--arms: unknown 'vdk'; choose from alone"),
        (["--arms", "alone", "alone"], "--arms: the same arm twice"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--jobs", "-1"], "--jobs: must be at least 0, got -1"),
        (["--baseline", "linear", "--arms", "vkd"], "--baseline: 'linear' is not one of this run's arms: vkd"),
        (["--recipe", "paper"], "--recipe: unknown 'paper'; toy_task has none"),
        (["--config", "nothing.yaml"], "cannot read nothing.yaml"),
        (["optim.step=3"], "unknown key 'optim.step'; did you mean 'optim.steps'?"),
        (["lr=3"], "unknown key 'lr'; did you mean 'optim.lr'?"),
        (["optim.steps=0"], "optim.steps=0 and optim.epochs=0: exactly one must be above 0"),
        (["teacher.width=101"], "teacher.width: at most 100, got 101"),
        (["optim.precision=8-mixed"], "optim.precision: must be one of 32-true, bf16-mixed, 16-mixed"),
        (["optim.precision=16-mixed"], "16-mixed needs a GPU"),
    ],
)  # fmt: skip
def test_bad_words_name_their_option(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", "toy_task", "--jobs", "0", "--quiet", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("result.json"))


def test_unknown_tasks_and_missing_packages(tmp_path, capsys, monkeypatch):
    assert vkd("distill", "detectoin") == 2
    assert "unknown task 'detectoin'; did you mean 'detection'?" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", "toy_task", "--jobs", 0) == 2
    assert "tqdm is missing: pip install 'vkd_kernels[recipes]'" in capsys.readouterr().err


# ---- the other commands ----------------------------------------------------------------------------------------------


def test_help_shows_every_value(capsys):
    assert vkd("distill", "toy_task", "--help", "optim.lr=0.5") == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in configs.keys(toy_task.Config):
        assert f" {key.name}=" in text
    assert "teacher.width=12 channels; >= 1 [as wide as it needs to be]" in text
    assert "optim.lr=0.5 peak learning rate; > 0 [command line]" in text
    assert "--resume" in text and "student alone, equal time" in text


def test_dry_run_prints_configuration_models_and_steps_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert vkd("distill", "toy_task", "--dry-run", "student.width=7", "--arms", "longer", "vkd") == 0
    text = capsys.readouterr().out
    assert "student: {width: 7, dropout: 0.1, batch_norm: false}" in text and "features: [7, 12]" in text
    assert "steps: 45" in text and "student: 87 parameters" in text
    assert not list(tmp_path.iterdir())


def test_recipes_files_and_overrides_in_that_order(tmp_path, monkeypatch):
    recipe, file = tmp_path / "paper.yaml", tmp_path / "mine.yaml"
    recipe.write_text("seeds: 3\noptim:\n  lr: 5e-4  # the paper\n  steps: 100\nstudent: {width: 9}\n")
    file.write_text("optim: {steps: 50}\n")
    monkeypatch.setattr(tasks, "recipes", lambda name: {"paper": recipe})
    found = compare.resolve(compare.DISTILL, "toy_task", "paper", file, ["student.width=4"], None, None, None, None)
    assert (found.config.optim.lr, found.config.optim.steps, found.config.student.width) == (5e-4, 50, 4)
    assert found.origins == {"optim.lr": "the paper", "optim.steps": str(file), "student.width": "command line"}
    assert list(found.arms) == ["vkd"] and found.seeds == 3 and found.baseline == "vkd"
    recipe.write_text("optim: {stepps: 3}\n")
    with pytest.raises(OptionError, match=r"paper\.yaml: unknown key 'optim\.stepps'; did you mean 'optim\.steps'"):
        compare.resolve(compare.DISTILL, "toy_task", "paper", None, [], None, None, None, None)


def test_ablate(tmp_path, capsys):
    assert vkd("ablate", "toy_task", "--output", tmp_path / "a", "--jobs", 0, "--quiet", "optim.steps=6") == 0
    text = (tmp_path / "a" / "table.txt").read_text()
    assert text in capsys.readouterr().out + "\n"
    first = text.split("\n\n")[0].splitlines()
    assert first[0].split() == ["test", "error", *ablate.NORMALIZATIONS]
    assert [line.split()[0] for line in first[2:]] == list(ablate.PROJECTIONS)
    assert "minus orthogonal, layer_norm" in text and "Holm's correction for 11 comparisons" in text
    summary = json.loads((tmp_path / "a" / "metrics.json").read_text())["summary"]
    assert list(summary) == [f"{p}-{n}" for p in ablate.PROJECTIONS for n in ablate.NORMALIZATIONS]
    assert (tmp_path / "a" / "figure.png").read_bytes().startswith(b"\x89PNG")
    config, _ = configs.read_yaml(tmp_path / "a" / "linear-whiten" / "seed-01" / "config.yaml")
    assert config["distill.projection"] == "linear" and config["distill.normalization"] == "whiten"


def test_evaluate_measures_the_stored_student_again(finished, tmp_path, capsys):
    assert vkd("evaluate", finished, "--output", tmp_path / "found.json") == 0
    assert capsys.readouterr().out.count("seed") == 8
    recorded = {(r["arm"], r["seed"]): r["error"] for r in json.loads((finished / "metrics.json").read_text())["runs"]}
    assert {(r["arm"], r["seed"]): r["error"] for r in runs.load_json(tmp_path / "found.json")} == recorded
    assert vkd("evaluate", finished / "vkd" / "seed-00", "student.width=6") == 2
    assert "student.safetensors is of another architecture" in capsys.readouterr().err
    assert vkd("evaluate", tmp_path / "nowhere") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert vkd("evaluate", tmp_path) == 2
    assert "holds no student" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "torch-export"])
def test_export_writes_the_student_alone(finished, tmp_path, capsys, kind):
    run = finished / "vkd" / "seed-00"
    assert vkd("export", run, "--format", kind, "--output", tmp_path / "student") == 0
    assert "differ from the student's by at most 0" in capsys.readouterr().out
    student = toy_task.Net(5).eval()
    student.load_state_dict(runs.load_safetensors(run / "student.safetensors"))
    x = torch.randn(2, 6)
    if kind == "torch-export":
        loaded = torch.export.load(str(tmp_path / "student")).module()
        torch.testing.assert_close(loaded(x), student(x))
    else:
        assert runs.load_safetensors(tmp_path / "student").keys() == student.state_dict().keys()
    assert vkd("export", finished) == 2
    assert "choose one" in capsys.readouterr().err


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_paired_difference_is_scipys_paired_t_test():
    from scipy import stats

    a, b = [95.2, 93.1, 96.0, 94.4, 95.9], [93.9, 93.3, 94.1, 93.0, 95.1]
    found, truth = report.paired_difference(a, b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(truth.pvalue, rel=1e-9)
    assert found["mean"] == pytest.approx(1.04) and found["seeds_better"] == 4 and found["better"]
    lower = report.paired_difference(a, b, higher_is_better=False)
    assert lower["p"] == found["p"] and lower["seeds_better"] == 1 and not lower["better"]


def test_paired_difference_without_spread():
    assert report.paired_difference([1.0], [0.5])["p"] is None
    assert report.paired_difference([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert report.paired_difference([2.0, 3.0], [1.0, 2.0])["p"] == 0.0
    with pytest.raises(ValueError, match="pair up"):
        report.paired_difference([1.0], [1.0, 2.0])


def test_holms_correction():
    assert report.holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert report.holm([0.5, 0.9]) == [1.0, 1.0] and report.holm([]) == []


def results(values):
    return [
        {"arm": arm, "seed": seed, "m": value, "diagnostics": {}, "steps": 1, "seconds": cost, "cpu_seconds": cost,
         "images_per_second": 1.0}
        for arm, (cost, *found) in values.items()
        for seed, value in enumerate(found)
    ]  # fmt: skip


def test_the_words_follow_the_numbers_in_both_directions():
    values = {"base": (1.0, 90, 91, 92), "long": (1.5, 91, 95, 90), "vkd": (2.0, 93, 94, 95.1)}
    names = {arm: arm for arm in values}
    for higher in (True, False):
        metric = Metric("m", "a metric", higher_is_better=higher)
        summary = report.summarise(results(values), list(values), metric)
        text = report.in_words(summary, names, metric, "base", ["vkd"], {"long": 1.5}, [{"m": 99.0}] * 3)
        said = "better than" if higher else "NOT better than"
        assert f"  {said} base: +3.0 points, better for {3 if higher else 0} of 3 seeds; significant at 0.05" in text
        assert f"  {said} long: +2.0 points, better for {2 if higher else 1} of 3 seeds; not significant" in text
        assert f"{'higher' if higher else 'lower'} is better" in text and "Teachers: 99.0" in text
        assert "LESS than (so this is no comparison at equal time)" in text
        assert "+3.0 ± 0.1" in report.table(summary, names, metric, "base")


def test_significant_alone_is_told_from_significant_after_correction():
    values = {
        "vkd": (1.0, 1.0, 2.0, 3.1, 4.0),
        "a": (1.0, 0.8, 1.6, 2.7, 3.2),
        "b": (1.0, 1, 2, 3, 4.3),
        "c": (1, 5, 2, 1, 3),
    }
    metric = Metric("m", "a metric")
    summary = report.summarise(results(values), list(values), metric)
    difference = summary["vkd"]["versus"]["a"]
    assert difference["p"] < 0.05 < difference["p_holm"]
    text = report.in_words(summary, {a: a for a in values}, metric, "a", ["vkd"], {})
    assert "significant at 0.05 by itself, not after Holm's correction" in text


def test_ablation_verdicts():
    values = {
        "orthogonal-layer_norm": (1, 1.0, 2.0, 3.1),
        "linear-whiten": (1, 5.0, 6.0, 7.1),
        "none-none": (1, 3, 1, 2),
    }
    metric = Metric("m", "a metric")
    summary = report.summarise(results(values), list(values), metric)
    text = ablate.verdicts(summary, {a: a for a in values}, "orthogonal-layer_norm")
    assert "better than it: linear-whiten\n" in text and "worse than it: none\n" in text
    assert "not significantly different from it: none-none" in text


def test_info(capsys):
    assert vkd("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ops"]
