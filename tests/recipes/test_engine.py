"""`vkd distill` on a task of seconds: files, the same bits after any interruption, ranks, pieces of the loop."""

import argparse
import hashlib
import json
import os
import signal

import pytest
import torch
import toy_task
from torch import nn

import vkd_kernels
from tests.recipes.toy import ARMS, TOY, VKD, distill, outcome, start, stopped_before, train, wait_for
from vkd_kernels.files import partial_files
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes import engine, jobs, report, runs, task
from vkd_kernels.recipes.runs import RunError

STUDENT = "vkd/seed-00/student.safetensors"


def lines_of(folder):
    return [*map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def step_of(checkpoint):
    return runs.load(checkpoint)["step"]


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["machine"]["torch"] == torch.__version__ and metrics["config"]["optim.steps"] == 30
    assert [(r["seed"], r["arm"]) for r in metrics["runs"]] == [(s, a) for s in (0, 1) for a in ARMS]
    assert [r["steps"] for r in metrics["runs"]] == [30, 45, 30, 30] * 2
    assert metrics["runs"][3]["curve"][-1] == [30, metrics["runs"][3]["error"]]
    assert (finished / "figure.png").read_bytes().startswith(b"\x89PNG")
    for arm in ARMS:
        folder = finished / arm / "seed-01"
        values = configs.read_yaml(folder / "config.yaml")
        assert float(values["distill.weight"]) == float(arm in ("linear", "vkd"))
        assert (folder / "figures" / "outputs.txt").exists()
    assert not list(finished.rglob("checkpoint.pt")) and not partial_files(finished)
    lines = lines_of(finished / "vkd" / "seed-00")
    losses = [line for line in lines if "train/total" in line]
    assert [line["step"] for line in losses] == [7, 14, 21, 28, 30]
    assert all(line["train/total"] == pytest.approx(line["train/task"] + line["train/features"]) for line in losses)
    assert losses[-1]["lr"] == pytest.approx(1e-2 * toy_task.Config().optim.rate(29, 30))
    assert all(line["diagnostics/max |PᵀP - I|"] < 1e-5 for line in lines if "eval/error" in line)
    toy_task.Net(5).load_state_dict(runs.load_weights(finished / STUDENT))  # alone, without the projection
    text = (finished / "table.txt").read_text()
    for part in ("test error", "minus alone", "better in", "p Holm", "max |PᵀP - I|", "CPU s", "(baseline)", "2 seeds"):
        assert part in text


# ---- stopping and continuing -----------------------------------------------------------------------------------------


def test_ctrl_c_in_worker_processes_then_resume_gives_the_same_bits(finished, tmp_path):
    folder = tmp_path / "run"
    process = start(VKD, *("--arms", *ARMS, "--output", folder, "--jobs", 2, "run.slow=0.1"))
    wait_for(process, lambda: any(folder.rglob("checkpoint.pt")))
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130, errors
    assert f"vkd distill {TOY} --resume --output {folder}" in errors and "Traceback" not in errors
    assert "/10 [" in errors and "leaked" not in errors  # a bar over the trainings; no semaphores of killed workers
    assert any(0 < step_of(path) < 45 for path in folder.rglob("checkpoint.pt")), "the interruption missed every loop"
    assert distill(folder, "--resume", "run.slow=0") == 0
    assert outcome(folder) == outcome(finished)


def test_kill_9_loses_only_the_steps_since_the_last_checkpoint(finished, tmp_path):
    folder = tmp_path / "run"
    process = start(VKD, *("--arms", *ARMS, "--output", folder, "--jobs", 0, "run.slow=0.05", "run.save_every=3"))
    checkpoint = folder / "alone" / "seed-00" / "checkpoint.pt"
    wait_for(process, lambda: checkpoint.exists() and step_of(checkpoint) >= 6)
    process.kill()
    _, errors = process.communicate(timeout=100)
    assert "alone 0:" in errors and "/30 [" in errors  # a bar over the steps
    (checkpoint.parent / "checkpoint.pt.partial-host-1").write_bytes(b"half")  # what it may have been writing
    draft = checkpoint.parent / "thesis.partial-draft-2.tex"
    draft.write_text("precious")
    (checkpoint.parent / "metrics.jsonl").write_text('{"step": 7}\ngarbage\n{"step": 8, "tra')  # and a damaged disk
    assert distill(folder, "--resume", "run.slow=0") == 0
    assert outcome(folder) == outcome(finished)
    assert not partial_files(folder) and draft.read_text() == "precious"


def test_sigterm_exits_with_143(tmp_path, monkeypatch, capsys):
    plain = toy_task.Toy.step

    def step(self, loop, batch):
        if loop.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, loop, batch)

    monkeypatch.setattr(toy_task.Toy, "step", step)
    folder = tmp_path / "a run"
    assert distill(folder, "--arms", "vkd") == 143
    assert f"vkd distill {TOY} --resume --output '{folder}'\n" in capsys.readouterr().err
    assert step_of(folder / "vkd/seed-00/checkpoint.pt") == 9
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_refuses_another_configuration_but_extends_seeds_and_arms(finished, tmp_path, capsys):
    folder = tmp_path / "run"
    assert distill(folder, "--seeds", 1, "--arms", "alone,longer") == 0
    assert distill(folder, "--resume", "optim.steps=31", "optim.lr=1", "run.log_every=5") == 2
    message = capsys.readouterr().err
    assert "optim.lr is 0.01 there and 1.0 here; optim.steps is 30 there and 31 here" in message
    assert "run." not in message
    assert distill(folder, "--resume", "--first-seed", 1) == 2
    assert distill(folder, "--resume", "--seeds", 2, *("--arms", "linear", "vkd", "run.eval_every=10")) == 0
    assert outcome(folder) == outcome(finished)
    for seeds, message in (
        (1, f"--seeds: {folder} has 2 seeds already, got 1; leave it out"),
        (0, "seeds: must be gr"),
    ):
        assert distill(folder, "--resume", "--seeds", seeds) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "mine.yaml").write_text("seeds: 1\n")
    assert distill(folder, "--resume", "--config", tmp_path / "mine.yaml") == 2
    assert f"seeds of {tmp_path / 'mine.yaml'}: {folder} has 2 seeds already, got 1" in capsys.readouterr().err
    assert distill(folder, "--resume", "--arms", "vkd", "--baseline", "linear") == 0  # nothing is dropped
    assert len(json.loads((folder / "metrics.json").read_text())["runs"]) == 8
    assert "minus linear" in (folder / "table.txt").read_text()


def test_resume_refuses_weights_that_were_replaced(tmp_path, capsys):
    folder, weights = tmp_path / "run", tmp_path / "student.safetensors"
    first, second = (toy_task.Net(5).state_dict() for _ in range(2))
    runs.save_safetensors(weights, first)
    words = ("--arms", "vkd", "optim.steps=2", f"student.weights={weights}")
    assert distill(folder, *words, "--seeds", 1) == 0
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert json.loads((folder / "metrics.json").read_text())["files"] == {str(weights): digest}

    runs.save_safetensors(weights, second)
    assert distill(folder, "--resume", "--seeds", 2) == 2
    said = capsys.readouterr().err
    assert f"--resume: {weights} is no longer the file with which {folder} was begun" in said and digest[:16] in said
    assert not (folder / "vkd" / "seed-01").exists()

    runs.save_safetensors(weights, first)
    assert distill(folder, "--resume", "--seeds", 2) == 0


def test_resume_refuses_an_arm_that_was_trained_with_other_values(tmp_path, monkeypatch, capsys):
    assert distill(tmp_path, "--seeds", 1, "--arms", "alone", "optim.steps=2") == 0
    other = task.Arm("student alone", {"distill.weight": 0.0, "optim.lr": 0.5, "run.log_every": 1})
    monkeypatch.setattr(toy_task.Toy, "arms", {**toy_task.Toy.arms, "alone": other})
    assert distill(tmp_path, "--resume", "--seeds", 2) == 2
    message = capsys.readouterr().err
    assert "the arm alone is another one than in" in message and "optim.lr is 0.01 there and 0.5 here." in message
    assert not (tmp_path / "alone" / "seed-01").exists()


def test_resume_refuses_a_typed_value_that_it_would_not_give_to_every_arm(tmp_path, monkeypatch, capsys):
    match = task.Arm("match", {**toy_task.Toy.arms["vkd"].changes, "distill.scale": "match"})
    monkeypatch.setattr(toy_task.Toy, "arms", {**toy_task.Toy.arms, "match": match})
    assert distill(tmp_path, "--seeds", 1, "--arms", "alone", "optim.steps=2") == 0
    assert distill(tmp_path, "--resume", "--arms", "match", "distill.scale=1.0") == 2
    assert "--resume: in the arm match distill.scale is match there and 1.0 here" in capsys.readouterr().err
    assert distill(tmp_path, "--resume", "--arms", "match") == 0


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path, capsys):
    words = ("--seeds", 1, "--arms", "alone", "optim.steps=0", "optim.epochs=2")
    assert distill(tmp_path / "a", *words, "optim.warmup=16") == 2
    assert "optim.warmup: 16, but there are only 16 steps, of optim.epochs=2; lower it" in capsys.readouterr().err
    assert distill(tmp_path / "b", *words, "optim.warmup=0", "optim.ema_start=99") == 2
    assert "optim.ema_start: 99, but there are only 16 steps" in capsys.readouterr().err


def test_a_run_names_every_machine_and_version_that_trained_a_part_of_it(tmp_path, monkeypatch):
    first, second, third = ({"cpu": name, "commit": name} for name in "abc")
    folder, few = tmp_path / "run", ("--arms", "alone", "optim.steps=2")

    def resumed_on(machine, *words):
        monkeypatch.setattr(report, "machine", lambda: machine)
        assert distill(folder, *words) == 0
        metrics = json.loads((folder / "metrics.json").read_text())
        return metrics["machine"], metrics.get("machines"), (folder / "table.txt").read_text()

    *machines, text = resumed_on(first, *few, "--seeds", 1)
    assert machines == [first, None] and "machines" not in text
    assert resumed_on(third, "--resume")[:2] == (first, None)  # nothing was trained there
    *machines, text = resumed_on(second, "--resume", "--seeds", 2)
    assert machines == [first, [first, second]] and "Trained on 2 machines, versions of the code or numbers of" in text
    for path in folder.rglob("machines.json"):  # as earlier versions left a run
        path.unlink()
    assert resumed_on(third, "--resume")[:2] == (first, None)
    with stopped_before(1):
        monkeypatch.setattr(report, "machine", lambda: second)
        assert distill(folder, "--resume", "--seeds", 3) == 143
    assert resumed_on(third, "--resume")[:2] == (
        first,
        [first, second, third],
    )  # one began a training


def test_a_resumed_training_goes_on_with_its_clocks(tmp_path):
    with stopped_before(10), pytest.raises(jobs.Interrupted):
        train(tmp_path)
    path = tmp_path / "vkd/seed-00/checkpoint.pt"
    runs.save_tensors(path, runs.load(path) | {"seconds": 1e6, "cpu_seconds": 2e6})
    result = train(tmp_path)
    assert 1e6 < result["seconds"] < 2e6 < result["cpu_seconds"]


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_are_stopped_resumed_and_give_what_one_process_gives(tmp_path):
    words = ["--arms", "vkd", "--seeds", 1, "student.dropout=0", "distill.normalization=batch_norm"]
    words += ["optim.clip_norm=0.5", "optim.steps=40"]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *VKD)
    two, one = tmp_path / "two", tmp_path / "one"
    process = start(launcher, *words, "--output", two, "run.slow=0.1")
    wait_for(process, lambda: (two / "vkd/seed-00/checkpoint.pt").exists())
    process.terminate()
    _, errors = process.communicate(timeout=200)
    assert errors.count(f"--resume --output {two}") == 1, errors  # once, although both ranks stopped
    assert 0 < step_of(two / "vkd/seed-00/checkpoint.pt") < 40
    process = start(launcher, "--resume", "--output", two, "run.slow=0")
    printed, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    assert printed.count("resuming in") == 1 and r"max |P\u1d40P - I|" in printed  # on a terminal without Unicode
    assert distill(one, *words) == 0
    (ours, _, _), (expected, _, _) = outcome(two), outcome(one)
    assert ours[0]["error"] == pytest.approx(expected[0]["error"], rel=1e-4)
    theirs, weights = (runs.load_weights(f / STUDENT) for f in (two, one))
    for name, value in weights.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-3, atol=1e-4)


def test_every_rank_draws_its_own_numbers(tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(engine, "seed_all", lambda *numbers: seeds.append(numbers))
    monkeypatch.setattr(engine.Fabric, "global_rank", property(lambda fabric: 1))
    train(tmp_path, optim__steps=2)
    assert seeds[-2:] == [(0, 0, 1), (0, 1, 1)]  # seed, step, rank


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_ranks_evaluate_with_the_running_statistics_of_the_first(ema, tmp_path, monkeypatch):
    class Normed(toy_task.Net):
        def __init__(self, width, dropout=0.0):
            super().__init__(width, dropout)
            self.norm = nn.BatchNorm1d(width)

    def evaluate(self, student):
        means.append(student.norm.running_mean.tolist())
        return {"error": 0.0}

    means = []
    monkeypatch.setattr(toy_task, "Net", Normed)
    monkeypatch.setattr(toy_task.Toy, "evaluate", evaluate)
    monkeypatch.setattr(engine.Fabric, "world_size", property(lambda fabric: 2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(7))  # the other rank's
    train(tmp_path, distill__weight=0.0, optim__steps=2, optim__ema=ema)
    assert means == [[7.0] * 5]


# ---- pieces of the loop ----------------------------------------------------------------------------------------------


def test_mixed_precision_keeps_batches_and_the_projection_exact(tmp_path):
    seen = []

    class Spy(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            seen.append((x.dtype, y.dtype))
            return y

    fabric = engine.make_fabric(task.Run(accelerator="cpu"), task.Optim(steps=1, precision="bf16-mixed"))
    fabric.setup_module(Spy(3, 3))(torch.ones(2, 3))
    assert seen == [(torch.float32, torch.bfloat16)]
    assert train(tmp_path, optim__precision="bf16-mixed")["diagnostics"]["max |PᵀP - I|"] < 1e-5


def test_a_loss_that_is_not_finite_ends_the_training_and_spares_the_checkpoint(tmp_path, monkeypatch):
    plain, calls = toy_task.Distiller.forward, []

    def forward(self, batch):
        calls.append(1)
        return {name: loss * float("nan" if len(calls) > 12 else 1) for name, loss in plain(self, batch).items()}

    monkeypatch.setattr(toy_task.Distiller, "forward", forward)
    with pytest.raises(RunError, match="step 14: the loss '.*' is not finite"):
        train(tmp_path)
    saved = runs.load(tmp_path / "vkd/seed-00/checkpoint.pt")
    assert saved["step"] == 9 and all(value.isfinite().all() for value in saved["model"].values())


@pytest.mark.parametrize("step", [30, 9])
def test_weights_that_the_last_step_before_saving_breaks_are_not_saved(tmp_path, monkeypatch, step):
    """The loss of the step that breaks them is finite."""
    plain = engine.Loop.apply

    def apply(self, name):
        plain(self, name)
        if self.step + 1 == step:
            with torch.no_grad():
                self.task.student.head.bias[0] = float("inf")

    monkeypatch.setattr(engine.Loop, "apply", apply)
    with pytest.raises(RunError, match=f"step {step}: the weight 'student.head.bias' is not finite"):
        train(tmp_path, optim__ema=0.0, run__eval_every=0)
    folder = tmp_path / "vkd/seed-00"
    assert not (folder / "result.json").exists() and not (folder / "student.safetensors").exists()
    assert (folder / "checkpoint.pt").exists() == (step == 30)


def test_learning_rate_rises_to_its_peak_and_falls_to_its_end():
    for steps, warmup, rise in [(1, 0.0, 0), (10, 0.1, 1), (100, 0.3, 30), (100, 5, 5)]:
        optim = task.Optim(lr=2.0, min_lr=0.02, warmup=warmup, steps=steps)
        rates = [optim.rate(step, steps) for step in range(steps)]
        peak = max(rise - 1, 0)
        assert rates.index(max(rates)) == peak and rates[peak] == 1.0
        assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
        assert optim.rate(steps, steps) == pytest.approx(0.01 if steps > rise else 1.0)
    assert task.Optim(schedule="constant", steps=9, warmup=2).rate(8, 9) == 1.0


def test_clipping_and_betas_reach_the_optimizer(tmp_path):
    options = {"plain": {}, "clipped": {"optim__clip_norm": 1e-3}, "betas": {"optim__betas": "0.1,0.2"}}
    errors = {name: train(tmp_path / name, optim__steps=5, **values)["error"] for name, values in options.items()}
    assert len({*errors.values()}) == 3, errors


def of_epochs(**data):
    return configs.replace(toy_task.Config(), {"optim.steps": 0, "optim.epochs": 4, **data})


def test_an_incomplete_batch_of_an_epoch_is_left_out(tmp_path):
    config = of_epochs(**{"data.rows": 60})  # of batches of 8
    context = task.Context(engine.make_fabric(config.run, config.optim), tmp_path, seed=0)
    assert toy_task.Toy(config, context).steps == 4 * 7
    with pytest.raises(RunError, match=r"^optim\.batch_size: 8, but there are only 7 training images"):
        _ = toy_task.Toy(of_epochs(**{"data.rows": 7}), context).steps


def test_an_arm_that_trains_longer_has_more_epochs():
    assert toy_task.Toy.arms["longer"].apply(of_epochs(), {}).optim.epochs == 6


@pytest.mark.parametrize(("normalization", "eps"), [("whiten", 1e-3), ("batch_norm", 1e-5)])
def test_the_default_eps_is_that_of_the_normalization(normalization, eps):
    assert task.DistillConfig(normalization=normalization).feature_loss(2, 3).eps == eps
    assert task.DistillConfig(normalization=normalization, eps=0.5).feature_loss(2, 3).eps == 0.5


def test_the_moving_average_warms_up_or_is_a_copy_until_its_start():
    def decays(**values):
        average = engine.moving_average(nn.Linear(1, 1), task.Optim(steps=1, ema=0.9999, **values))
        return [average.get_decay(step) for step in (0, 1, 999, 1000, 125_000)]

    assert decays(ema_start=1000) == [0, 0, 0, 0.9999, 0.9999]
    assert decays(ema_start=1) == [0, *[0.9999] * 4]
    assert decays() == pytest.approx([0, 0, 0.99, 0.99, 0.9996], abs=1e-4)


def test_weight_decay_spares_the_projection_biases_and_what_modules_say():
    class Student(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.token = nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self):
            return {"token"}

    loss = vkd_kernels.OrthoProjLoss(4, 6, scale="learned")
    groups = task.parameter_groups(nn.ModuleDict({"student": Student(), "loss": loss}), 0.3)
    decayed = [tuple(p.shape) for group in groups if group["weight_decay"] for p in group["params"]]
    assert decayed == [(4, 3)]


@pytest.mark.parametrize("names", [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_weights_of_a_checkpoint_that_has_an_average_are_those_of_the_average(names, tmp_path):
    """DeiT's and timm's."""
    model, average = names
    content = {model: {"w": torch.zeros(1)}, average: {"w": torch.ones(1)}, "args": argparse.Namespace(lr=1e-3)}
    torch.save(content, tmp_path / "x.pth")
    assert runs.load_weights(tmp_path / "x.pth") == {"w": 1}
