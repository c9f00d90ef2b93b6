"""The digits task of `vkd distill classification`, in seconds: files, statistics, resuming, errors."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra [recipes]: scikit-learn")
pytest.importorskip("matplotlib", reason="needs the extra [recipes]: matplotlib")
pytest.importorskip("tqdm", reason="needs the extra [recipes]: tqdm")

from vkd_kernels import cli
from vkd_kernels.recipes import classification, data, runs
from vkd_kernels.recipes import classification_report as report

# Two seeds, three arms, long enough to be interrupted in the middle of a loop, short enough for a test.
TINY = ["--seeds", "2", "--arms", "alone", "logits", "vkd", "--steps", "60", "--teacher-steps", "30", "--views", "2"]
TINY += ["--teacher-widths", "8", "16", "--width", "16", "--depth", "1", "--save-every", "7"]


def command(*arguments):
    return [sys.executable, "-m", "vkd_kernels.recipes.classification", "--jobs", "2", *map(str, arguments)]


def outcome(folder):
    """What must come out the same, bit for bit: everything but clocks and the machine."""
    metrics = json.loads((folder / "metrics.json").read_text())
    clocks = {"seconds", "cpu_seconds", "images_per_second"}
    return [{k: v for k, v in r.items() if k not in clocks} for r in metrics["runs"] + metrics["teachers"]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe") / "run"
    process = subprocess.run(command("--output", folder, *TINY), capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The same run, stopped by Ctrl-C (the signal goes to the whole process group) inside some student's loop."""
    folder = tmp_path_factory.mktemp("recipe") / "interrupted"
    process = subprocess.Popen(
        command("--output", folder, *TINY), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 100
    while not list(folder.glob("seed-*/*[!r].ckpt")) and process.poll() is None:  # not the teacher's
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return folder, process.returncode, errors


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_run_writes_its_files(finished):
    folder, _ = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"]["steps"] == 60 and metrics["machine"]["torch"] == torch.__version__
    assert [(r["seed"], r["arm"]) for r in metrics["runs"]] == [
        (s, a) for s in (0, 1) for a in ("alone", "logits", "vkd")
    ]
    assert all(r["curve"][-1][0] == 60 and 0 <= r["accuracy"] <= 100 for r in metrics["runs"])
    assert metrics["summary"]["vkd"]["above"]["logits"]["seeds"] == 2
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["accuracy"]) for row in rows] == [r["accuracy"] for r in metrics["runs"]]
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.rglob("*.ckpt")) and not list(folder.rglob("*.partial-*"))


def test_table_has_its_columns_and_the_verdict_in_words(finished):
    folder, printed = finished
    text = (folder / "table.txt").read_text()
    assert text in printed
    for column in ("accuracy %", "above logit distillation", "p < 0.05", "max |PᵀP - I|", "steps", "CPU s"):
        assert column in text.splitlines()[0]
    for arm in ("alone", "logits", "vkd"):
        assert any(line.startswith(classification.ARMS[arm].label) for line in text.splitlines())
    assert "V_kD as published (scale 1) is on average" in text and "significant at 0.05" in text


def test_projection_stays_orthonormal_and_is_reported_only_where_there_is_one(finished):
    for run in json.loads((finished[0] / "metrics.json").read_text())["runs"]:
        assert (run["orthogonality_error"] is None) == (run["arm"] != "vkd")
        assert run["arm"] != "vkd" or run["orthogonality_error"] < 1e-5


def test_orthogonality_error_measures_the_linear_projection_too():
    assert classification.orthogonality_error(classification.LinearProjLoss(4, 8)) > 1e-2
    assert classification.orthogonality_error(classification.make_feature_loss(classification.ARMS["vkd"], 4, 8)) < 1e-6
    assert classification.orthogonality_error(None) is None


# ---- stopping and continuing -----------------------------------------------------------------------------------------


def test_ctrl_c_leaves_checkpoints_and_says_how_to_continue(interrupted):
    folder, code, errors = interrupted
    assert code == 130, errors
    assert f"--resume --output {folder}" in errors and "Traceback" not in errors
    assert not (folder / "metrics.json").exists()


def test_resume_gives_the_same_bits(finished, interrupted):
    folder, _, _ = interrupted
    if not (folder / "metrics.json").exists():
        steps = [runs.load_tensors(path)["progress"]["step"] for path in folder.glob("seed-*/*.ckpt")]
        assert any(0 < step < 60 for step in steps), "the interruption missed every loop: nothing is tested"
    again = subprocess.run(
        command("--resume", "--output", folder, "--jobs", 1), capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    assert outcome(folder) == outcome(finished[0])


def test_a_stop_before_the_first_step_leaves_a_checkpoint(tmp_path):
    class Stopped:
        def should_stop(self):
            return True

        def report(self, task, images):
            pass

    config = classification.Config(teacher_widths=(8, 16), teacher_steps=3)
    with pytest.raises(runs.Interrupted) as stop:
        classification.train_teacher(config, 0, tmp_path, Stopped())
    assert stop.value.exit_code == 130
    assert runs.load_tensors(tmp_path / "seed-00" / "teacher.ckpt")["progress"]["step"] == 0


def test_resume_refuses_another_configuration(finished, capsys):
    folder, _ = finished
    assert (
        cli.main(["distill", "classification", "--resume", "--output", str(folder), "--steps", "61", "--lr", "1"]) == 2
    )
    assert "--steps is 60 there and 61 here; --lr is 0.003 there and 1.0 here" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(finished, capsys):
    before = (finished[0] / "metrics.json").read_bytes()
    assert cli.main(["distill", "classification", "--output", str(finished[0])]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert (finished[0] / "metrics.json").read_bytes() == before


def test_resume_without_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    begun = []
    monkeypatch.setattr(classification, "run", lambda config, folder, **_: begun.append((config.steps, folder)))
    for _ in range(2):  # begins one, then continues it
        assert cli.main(["distill", "classification", "--resume", "--steps", "7"]) == 0
    assert begun == [(7, classification.DEFAULT_OUTPUT)] * 2
    assert cli.main(["distill", "classification", "--resume", "--output", "elsewhere"]) == 2
    assert "elsewhere holds no run" in capsys.readouterr().err
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {"steps": 3}, "torch": "0"}'])
def test_resume_refuses_a_damaged_or_foreign_folder(tmp_path, capsys, content):
    (tmp_path / "config.json").write_text(content)
    assert cli.main(["distill", "classification", "--resume", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "--resume" in message and str(tmp_path) in message


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "alone.json").write_text('{"accuracy": 9')
    with pytest.raises(runs.RunError, match=r"alone\.json.*delete this file"):
        runs.load_json(tmp_path / "alone.json")
    runs.save_tensors(tmp_path / "x.ckpt", {"a": torch.arange(5)})
    assert runs.load_tensors(tmp_path / "x.ckpt")["a"].tolist() == [0, 1, 2, 3, 4]
    (tmp_path / "x.ckpt").write_bytes((tmp_path / "x.ckpt").read_bytes()[:100])
    with pytest.raises(runs.RunError, match=r"x\.ckpt.*delete this file"):
        runs.load_tensors(tmp_path / "x.ckpt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    runs.write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(runs.RunError, match="disk full"):
        runs.write_atomically(path, fail)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_folders_are_numbered_and_locked(tmp_path):
    default = tmp_path / "run"
    assert runs.free_folder(default) == default
    runs.start_folder(default, {})
    assert runs.free_folder(default) == tmp_path / "run-2" and runs.newest_folder(default) == default
    if os.name == "posix":
        with runs.locked(default), pytest.raises(runs.RunError, match="in use"), runs.locked(default):
            pass


# ---- statistics and data ---------------------------------------------------------------------------------------------


def test_paired_difference_is_scipys_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    a, b = [95.2, 93.1, 96.0, 94.4, 95.9], [93.9, 93.3, 94.1, 93.0, 95.1]
    found, truth = report.paired_difference(a, b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(truth.pvalue, rel=1e-9)
    assert found["p"] == pytest.approx(0.04312, abs=1e-5) and found["significant"]
    assert found["mean"] == pytest.approx(1.04) and found["seeds_above"] == 4
    assert report.paired_difference(b, a)["p"] == pytest.approx(found["p"])


def test_paired_difference_without_spread():
    assert report.paired_difference([1.0], [0.5])["p"] is None
    assert not report.paired_difference([1.0], [0.5])["significant"]
    assert report.paired_difference([1.0, 2.0], [1.0, 2.0])["p"] == 1.0
    assert report.paired_difference([2.0, 3.0], [1.0, 2.0])["significant"]
    with pytest.raises(ValueError, match="pair up"):
        report.paired_difference([1.0], [1.0, 2.0])


def test_the_words_follow_the_numbers():
    runs_ = [
        {"arm": arm, "seed": seed, "accuracy": accuracy, "orthogonality_error": None, "steps": 1, "seconds": cost,
         "cpu_seconds": cost}
        for arm, accuracies, cost in [("logits", (90, 91, 92), 1.0), ("logits-longer", (91, 95, 90), 1.5),
                                      ("vkd", (89, 90, 90.9), 2.0), ("vkd-match", (93, 94, 95.1), 2.0)]
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    arms = ("logits", "logits-longer", "vkd", "vkd-match")
    metrics = {"summary": report.summarise(runs_, arms), "teachers": [{"accuracy": 99.0}] * 3}
    published, match = report.in_words(metrics, {arm: arm for arm in arms}).split("vkd-match is on average")
    assert "NOT above logits: -1.0 points, above for 0 of 3 seeds; significant" in published
    assert "  above logits: +3.0 points, above for 3 of 3 seeds; significant" in match
    assert "above logits-longer: +2.0 points, above for 2 of 3 seeds; not significant" in match
    assert "LESS than" in match  # "equal time" that was not


def test_split_keeps_test_images_out_of_the_pool():
    split = data.load_digits(3, pool=1000, labels_per_class=10)
    assert len(split.pool) == 1000 and len(split.test) == 797 and split.labelled == 100
    assert torch.bincount(split.pool_labels[:100]).tolist() == [10] * 10
    everything = torch.cat([split.pool, split.test]).flatten(1).unique(dim=0)
    assert len(everything) == len(torch.cat([split.pool.flatten(1).unique(dim=0), split.test.flatten(1).unique(dim=0)]))
    assert not torch.equal(split.pool, data.load_digits(4, pool=1000, labels_per_class=10).pool)


def test_random_affine():
    images, none = torch.randn(5, 1, 8, 8), {"rotation": 0, "scale": 0, "shift": 0, "shear": 0}
    still = data.random_affine(images, torch.Generator().manual_seed(0), **none)
    torch.testing.assert_close(still, images, rtol=0, atol=1e-5)
    moved = data.random_affine(torch.zeros(64, 1, 8, 8), torch.Generator().manual_seed(0), **{**none, "shift": 2.0})
    background = -data.PIXEL_MEAN / data.PIXEL_STD
    assert moved.min() >= background - 1e-6 and torch.isclose(moved, torch.tensor(background)).any()


def test_one_cycle_rises_to_its_peak_and_falls_to_zero():
    for steps, warmup in [(1, 0.5), (10, 0.1), (100, 0.3)]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        schedule, rates = classification.one_cycle(optimizer, steps, warmup), []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        peak = max(1, round(steps * warmup)) - 1
        assert rates.index(max(rates)) == peak and rates[peak] == 2.0 and min(rates) > 0
        assert rates == sorted(rates[: peak + 1]) + sorted(rates[peak + 1 :], reverse=True)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0 if steps > 1 else 2.0)


def test_arms_share_a_decay_rule_that_spares_the_projection():
    config = classification.Config()
    loss = classification.make_feature_loss(classification.ARMS["vkd"], config.width, 192)
    student = classification.models.TinyViT(width=48, depth=2, heads=4, mlp_ratio=2, patch=2, classes=10)
    optimizer, _ = classification.make_optimizer(config, student, loss, 10)
    decayed, kept = (group["params"] for group in optimizer.param_groups)
    assert optimizer.param_groups[0]["weight_decay"] == 0.05 and optimizer.param_groups[1]["weight_decay"] == 0
    assert {id(p) for p in loss.parameters()} <= {id(p) for p in kept}
    assert all(p.ndim >= 2 for p in decayed) and not any(p is student.position for p in decayed)
    assert len(decayed) + len(kept) == len(list(student.parameters())) + len(list(loss.parameters()))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "alone", "vdk"], "--arms: unknown 'vdk'; choose from alone"),
        (["--arms", "alone", "alone"], "--arms: the same arm twice"),
        (["--steps", "0"], "--steps: must be at least 2, got 0"),
        (["--lr", "0"], "--lr: must be above 0, got 0.0"),
        (["--lr", "nan"], "--lr: must be above 0, got nan"),
        (["--warmup", "1"], "--warmup: must be below 1"),
        (["--heads", "5"], "--heads: 5 does not divide --width 48"),
        (["--patch", "3"], "--patch: unknown 3"),
        (["--pool", "1797"], "--pool: 1797 of 1797"),
        (["--labels-per-class", "100"], "--labels-per-class: 100"),
        (["--jobs", "0"], "--jobs: must be at least 1"),
        (["--baseline", "none"], "--baseline: 'none'"),
        (["--arms", "vkd", "--baseline", "alone"], "--baseline: 'alone' is not one of this run's arms: vkd"),
    ],
)
def test_bad_values_name_their_option(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["distill", "classification", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_name_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(classification, "find_spec", lambda name: None if name in ("sklearn", "tqdm") else object())
    assert cli.main(["distill", "classification"]) == 2
    assert "scikit-learn and tqdm missing: pip install 'vkd_kernels[recipes]'" in capsys.readouterr().err


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["distill", "classification", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(classification.Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "(default: 24 48 96 192)" in text and "--resume" in text


def test_info(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ops"]
