"""The benchmarks' own arithmetic: costs, gate, memory, report (test_benchmarks_sampling.py has the sampling)."""

import dataclasses
import json
import math
import os
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    bench_cayley,
    bench_feature_store,
    bench_ortho_proj_loss,
    bench_semi_orthogonal,
    bench_training_step,
    floors,
    harness,
    orthogonal_maps,
    records,
    report,
)
from benchmarks.harness import Candidate, Case
from tests.helpers import processes
from vkd_kernels.ops.ortho_proj_loss import dispatch

RATES = {"copy_bytes_per_s": 1e10, "matmul_flops_per_s": {"float32": 1e11}}


def test_cost_of_the_loss_counts_its_products_and_tensors():
    n, s, t = 5, 3, 7
    student, teacher, weight = torch.zeros(n, s), torch.zeros(n, t), torch.zeros(t, s)
    product = 2 * n * s * t  # each of X Pᵀ, G P, Gᵀ X: a multiplication and an addition per element of the cube
    read = student.nbytes + teacher.nbytes + weight.nbytes
    written = student.nbytes + weight.nbytes
    assert floors.loss_cost(n, s, t, 4) == (3 * product, read + written)
    half = floors.loss_cost(n, s, t, 2)
    assert half.bytes == (read + student.nbytes) // 2 + weight.nbytes  # the weight's gradient stays float32


def test_cost_of_cayley_is_that_of_the_products_it_is_timed_against():
    counted = FlopCounterMode(display=False)
    calls = bench_cayley.own_products(bench_cayley.weight_and_upstream((2, 10, 4), "cpu", 0))
    with counted:
        calls.backward(calls.forward())
    assert floors.cayley_cost(10, 4, batch=2).flops == counted.get_total_flops()
    assert floors.cayley_cost(10, 4, batch=2).bytes == 4 * 4 * 2 * 10 * 4


def test_floor_is_the_slower_of_compute_and_memory():
    assert floors.Cost(10**11, 10**9).floor_seconds(RATES, "float32") == 1.0
    assert floors.Cost(10**10, 10**10).floor_seconds(RATES, "float32") == 1.0
    assert floors.Cost(1, 2).times(3) == (3, 6)


def test_ceilings_are_rates():
    rates = floors.ceilings("cpu", (torch.float32,))
    assert 1e8 < rates["copy_bytes_per_s"] < 1e13
    assert 1e8 < rates["matmul_flops_per_s"]["float32"] < 1e15


@pytest.mark.parametrize("error", [0.2, math.nan, math.inf])
def test_gate_refuses(error):
    harness.gate({"output": 0.09}, {"output": 0.1})
    with pytest.raises(harness.WrongOutput, match="output is off by .* [(]limit 1e-01[)]"):
        harness.gate({"output": error}, {"output": 0.1})


def test_a_nan_gradient_is_wrong_wherever_it_stands():
    good, bad = torch.ones(3), torch.full((3,), math.nan)
    for gradients in ([good, bad], [bad, good]):
        errors = harness.compare(good, gradients, (good, [good, good]))
        with pytest.raises(harness.WrongOutput, match="^gradients is off by nan"):
            harness.gate(errors, {"output": 0.1, "gradients": 0.1})


@pytest.mark.parametrize("writes", [True, False])
def test_a_graph_is_held_to_what_its_replay_writes(writes, monkeypatch):
    """The eager call before the capture is right in both."""

    def capture(runner):
        def replay():
            if writes:
                output.data.fill_(12.0), gradients[0].fill_(3.0)

        runner.captured = output, gradients = runner.first()
        runner.replay = replay

    monkeypatch.setattr(harness.Runner, "capture", capture)
    graph = case(("graph", 3))
    graph.candidates[0].graph = True
    result = harness.measure(graph, "cpu", RATES, seconds=0.01, memory=False)
    assert bool(harness.failures(result)) is not writes
    assert writes or "output is off by nan" in result["rows"][0]["wrong"]


def case(*candidates, passes=harness.PASSES):
    """y = 3 x with its gradient 3."""

    def check(truth, output, gradients):
        return harness.compare(output, gradients, truth)

    def candidate(name, factor, **options):
        def build(x):
            return harness.autograd_calls(lambda: (factor * x).sum(), [x], torch.ones(()))

        return Candidate(name, build, check, **options)

    def truth(x):
        return 3 * x.detach().double().sum(), [torch.full_like(x, 3, dtype=torch.float64)]

    return Case(
        name="three",
        parameters={"n": 4},
        dtype="float32",
        cost=floors.Cost(10**6, 8),
        inputs=lambda seed: torch.ones(4).requires_grad_(),
        input_bytes=16,
        candidates=[candidate(*c) if isinstance(c, tuple) else c for c in candidates],
        limits={"output": 1e-6, "gradients": 1e-6},
        passes=passes,
        truth=truth,
    )


def broken(x):
    raise RuntimeError("no such kernel\nand a long story")


def test_a_wrong_candidate_gets_no_time():
    absent = Candidate("absent", lambda x: None, unavailable="not installed")
    result = harness.measure(
        case(("right", 3), ("wrong", 3.001), Candidate("broken", broken), absent), "cpu", RATES, seconds=0.01
    )
    json.dumps(result)
    rows = {name: [row for row in result["rows"] if row["candidate"] == name] for name in ("right", "wrong", "broken")}
    assert {row["pass"] for row in rows["right"]} == set(harness.PASSES)
    assert all(row["median_s"] > 0 and row["samples"] >= 3 for row in rows["right"])
    assert rows["wrong"] == [{"candidate": "wrong", "wrong": rows["wrong"][0]["wrong"]}]
    assert "output is off by 3.3e-04" in rows["wrong"][0]["wrong"]
    assert rows["broken"] == [{"candidate": "broken", "failed": "RuntimeError: no such kernel"}]
    assert len(harness.failures(result)) == 2
    assert {"candidate": "absent", "skipped": "not installed"} in result["rows"]
    both = next(row for row in rows["right"] if row["pass"] == "both")
    assert both["share_of_floor"] == pytest.approx(1e-5 / both["median_s"])
    assert both["errors"] == {"output": 0.0, "gradients": 0.0}
    assert not any("raw" in row for row in harness.without_samples(result)["rows"])


def test_a_case_is_chosen_by_its_very_name(tmp_path, monkeypatch, capsys):
    """Not by a part of it, which others have too."""
    monkeypatch.setattr(floors, "ceilings", lambda device, dtypes: RATES)
    named = [dataclasses.replace(case(("right", 3)), name=name) for name in ("5 x 3", "maps 5 x 3", "5 x 3 x 2")]

    def main(*words):
        arguments = ["--seconds", "0", "--records", str(tmp_path), *words]
        return harness.main("cayley", lambda device: named, lambda device: (), arguments)

    assert main("--case", "5 x 3") == 0
    (measured,) = records.read(tmp_path)[records.device_folder()]["cayley"]["cases"]
    assert measured["case"] == "5 x 3"
    with pytest.raises(SystemExit):
        main("--case", "5 x")
    assert "there is no '5 x' on this device, but 5 x 3, maps 5 x 3, 5 x 3 x 2" in capsys.readouterr().err


def test_peak_memory_counts_temporaries_and_results():
    x = torch.ones(1 << 18)

    def function():
        a = x + 1  # 1 MiB
        b = a + 1  # 2 MiB
        del a
        return b + 1  # 2 MiB

    assert harness.peak_bytes(function, "cpu") == pytest.approx(2 * x.nbytes, abs=1 << 16)


def test_chunked_loss_needs_less_memory_than_the_reference():
    n, s, t = 1600, 8, 6000
    assert n * t > dispatch.CHUNKED_FROM, "where the library goes by chunks"
    one = bench_ortho_proj_loss.loss_case("token", n, s, t, "layer_norm", 1, dtype=torch.float32, device="cpu")
    one.candidates, one.passes = one.candidates[:2], ("both",)
    one.truth = lambda inputs: None  # their values are tested elsewhere
    for candidate in one.candidates:
        candidate.check = None
    result = harness.measure(one, "cpu", RATES, seconds=0.0, least=1)
    peak = {row["candidate"]: row["peak_bytes_beyond_gradients"] for row in result["rows"]}
    assert peak["vkd_kernels"] < 32 << 20
    assert peak["eager"] > 2.9 * (4 * n * t), "projected, normalised and the gradient"


TINY_STEP = bench_training_step.CPU_SIZE._replace(student_options=(("depth", 1),), image=32, batch=2)


@pytest.mark.parametrize("kind, rows", [("pooled", 2), ("token", 8)])
def test_training_step(kind, rows):
    """Every candidate takes its step; with features it has the loss that the definition gives in float64."""
    one = bench_training_step.step_case(TINY_STEP, kind, "cpu")
    assert one.parameters["n"] == rows and one.cost.flops > 0
    setting = one.inputs(0)
    before = [p.detach().clone() for p in setting.student.parameters()]
    truth = one.truth(setting)
    assert truth["student alone"] < truth["no feature loss"] < truth["vkd_kernels"] == truth["composition"]
    for candidate in one.candidates:
        calls = candidate.build(setting)
        for _ in range(2):
            output = calls.forward()
            assert all(p.grad is None for p in setting.student.parameters())
            calls.backward(output)
            harness.gate(candidate.check(truth, output, None), one.limits)
    assert all(torch.equal(a, b) for a, b in zip(before, setting.student.parameters(), strict=True))


def test_training_step_without_timm(monkeypatch):
    monkeypatch.setattr(bench_training_step.importlib.util, "find_spec", lambda name: None)
    result = harness.measure(bench_training_step.step_case(TINY_STEP, "token", "cpu"), "cpu", RATES, 0.01)
    assert [row["skipped"] for row in result["rows"]] == ["timm is not installed"] * 4


def test_no_share_of_a_floor_that_counts_more_than_a_candidate_does():
    """The student alone has no teacher, whose forward pass is part of the floor."""
    one = dataclasses.replace(case(("right", 3)), has_shares=False)
    (row,) = [row for row in harness.measure(one, "cpu", RATES, 0.0)["rows"] if row["pass"] == "both"]
    assert "share_of_floor" not in row and row["errors"]
    assert not bench_training_step.step_case(TINY_STEP, "pooled", "cpu").has_shares
    assert not bench_feature_store.store_case(bench_feature_store.CPU_SIZE).has_shares
    share = report.CASE_HEADER.index("of the floor")
    measured = {"case": "a", "rows": [row | {"share_of_floor": 7.98}]}
    assert [report.case_rows(measured, shown)[0][share] for shown in (True, False)] == ["798%", ""]
    facts = {"environment": records.environment()}
    for benchmark in report.WITHOUT_SHARES:
        device = a_record(benchmark, {"a": measured["rows"]})
        text = report.markdown({"cpu": {benchmark: device[benchmark] | facts}}, {})
        assert "| a | right |" in text and "798%" not in text


def test_no_committed_page_has_a_share_above_one():
    page = (records.RESULTS / "README.md").read_text()
    assert all(int(share) <= 100 for share in re.findall(r"\| (\d+)% \|", page))


def test_a_step_with_a_store_has_the_loss_of_the_live_teacher(tmp_path):
    pytest.importorskip("timm", reason="needs timm")
    size = bench_feature_store.CPU_SIZE._replace(teacher_options=(("depth", 1),), image=56, batch=2, stored=4)
    result = harness.measure(bench_feature_store.store_case(size), "cpu", RATES, 0.01, memory=False)
    assert not harness.failures(result)
    rows = {row["candidate"]: row for row in result["rows"]}
    assert rows["store"]["errors"]["loss"] > 0  # of float16, so it was compared with the live teacher's
    assert {*rows} == {*bench_feature_store.NAMES} and all(row["median_s"] > 0 for row in rows.values())


@pytest.fixture(scope="module")
def tiny_records(tmp_path_factory):
    """Real records of tiny cases of every kind that the report knows."""
    folder = tmp_path_factory.mktemp("records")
    orthogonal_maps.main(["--t", "40", "--s", "8", "--seconds", "0.01", "--records", str(folder)])
    cayley = records.Record("cayley", folder, RATES)
    shapes = [((6, 4, 4), None), ((9, 4), "t"), ((12, 4), "t"), ((12, 3), "s"), ((2, 4, 4), "batch")]
    for shape, scaling in shapes:
        result = harness.measure(bench_cayley.map_case(shape, "cpu", scaling=scaling), "cpu", RATES, 0.01, memory=False)
        assert not harness.failures(result)
        cayley.add(harness.without_samples(result))
    loss = records.Record("ortho_proj_loss", folder, RATES)
    for one in (
        bench_ortho_proj_loss.loss_case("pooled", 8, 5, 7, "layer_norm", 1, dtype=torch.float32, device="cpu"),
        bench_ortho_proj_loss.loss_case("detection", 20, 6, 6, "batch_norm", 2, dtype=torch.float32, device="cpu"),
        bench_ortho_proj_loss.module_case(8, 5, 7, "cpu"),
    ):
        one.candidates = [candidate for candidate in one.candidates if candidate.name != "torch.compile"]
        result = harness.measure(one, "cpu", RATES, 0.01)
        assert not harness.failures(result)
        loss.add(harness.without_samples(result))
    step = records.Record("training_step", folder, RATES)
    result = harness.measure(bench_training_step.step_case(TINY_STEP, "token", "cpu"), "cpu", RATES, 0.01)
    assert not harness.failures(result)
    step.add(harness.without_samples(result))
    return folder


def test_report_renders_records(tiny_records):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    folder = records.device_folder()
    text = report.write(tiny_records).read_text()
    for words in (
        f"## {folder}",
        "pooled 8 x 5 -> 7",
        "OrthoProjLoss",
        "composition",
        "torch householder",
        "of the floor",
        "Added by the feature loss, token deit_tiny_patch16_224 from regnety_002, 2 images: vkd_kernels ",
    ):
        assert words in text
    plots = {p.name for p in (tiny_records / folder).glob("*.png")}
    assert plots == {"share_of_floor.png", "cayley_scaling.png"}, "no N to plot time against at 192 -> 3024"
    assert all(f"({folder}/{name})" in text for name in plots)
    if folder == "cpu":
        share = "token 100352 x 192 -> 3024 bfloat16: share of the floor"
        assert f"{share} | ≥ 36 % | — | {report.NOT_MEASURED}" in text


def a_record(benchmark, rows_by_case):
    cases = [{"case": c, "rows": rows, "plot": {}} for c, rows in rows_by_case.items()]
    return {benchmark: {"benchmark": benchmark, "cases": cases}}


def test_report_says_who_served(tmp_path):
    """Rows of vkd_kernels without the extension, by a chosen backend, or of a tree that nobody compared."""
    facts = records.environment()
    expected = {
        "Without the compiled extension**, so that PyTorch stands in for it: no compiler.": {
            "extension": {"missing": "no compiler"}
        },
        "VKD_KERNELS_BACKEND=torch** chose": {"requested": "torch"},
        "commit abc, by the caller's word (no checkout)": {"commit": "abc", "dirty": None},
    }
    for words, change in expected.items():
        (line, _) = report.environment_lines({"environment": facts | change})
        assert words in line


def test_report_judges_targets():
    def both(name, seconds):
        return {"candidate": name, "pass": "both", "median_s": seconds, "share_of_floor": 0.5}

    rows = [both("vkd_kernels", 1e-3), both("torch householder", 0.2501), both("torch cayley", 0.0799)]
    rows += [both(bench_cayley.OWN_PRODUCTS, 0.39e-3)]
    device = a_record("orthogonal_maps", {"3024 x 192": rows})
    shown = {target.what: target.shown(device) for target in report.CPU_TARGETS}
    start = "orthogonal map 3024 x 192: "
    assert shown[start + "faster than torch householder"] == ("250.1 x", "yes")
    assert shown[start + "faster than torch cayley"] == ("79.9 x", "**no**")
    assert shown[start + "faster than torch matrix_exp"] == ("—", "not in the record")
    assert shown[start + "time over that of its own float32 products"] == ("2.564 x", "**no**")
    device = a_record("ortho_proj_loss", {"token 100352 x 768 -> 3024 bfloat16": [both("vkd_kernels", 1e-3)]})
    (of_768,) = [of_size for of_size in report.TOKEN_TARGETS if of_size.s == 768]
    assert of_768.targets()[0].shown(device) == ("50 %", "**no**")  # of the 56 % that the model says


def test_the_closed_form_is_compared_with_the_fastest_that_ran():
    rows = {"vkd_kernels": 1e-3, "closed form, inv_ex": 8e-3, "closed form, lu": 4e-3}
    cases = {"3024 x 192": [{"candidate": name, "pass": "both", "median_s": s} for name, s in rows.items()]}
    shown = {target.what: target.shown(a_record("cayley", cases)) for target in report.GPU_TARGETS}
    assert shown["Cayley 3024 x 192: faster than the closed form on torch.linalg"] == ("4 x", "**no**")


def test_a_graphs_time_is_judged_in_microseconds():
    row = {"candidate": report.GRAPH, "pass": "both", "median_s": 180e-6}
    device = a_record("cayley", {"3024 x 192": [row]})
    assert report.graph_time("3024 x 192", 150).shown(device) == ("180 µs", "**no**")
    assert report.graph_time("3024 x 192", 200).shown(device) == ("180 µs", "yes")


def test_one_case_on_a_busy_machine_makes_the_record_doubtful():
    def record(*shares):
        return {"cases": [{"others_cpu_share": share} for share in shares]}

    assert report.is_of_busy_machine(record(0.0, 0.2))
    assert not report.is_of_busy_machine(record(0.0, None)) and not report.is_of_busy_machine({})


def test_every_target_is_of_a_case_and_candidate_that_the_benchmarks_have():
    """A renamed case or candidate would leave its target silently unmeasured."""
    listed = {
        module: {c.name: [candidate.name for candidate in c.candidates] for c in module.cases("cuda")}
        for module in (bench_cayley, bench_ortho_proj_loss, bench_training_step)
    }
    device = {}
    for module, cases in listed.items():
        rows = {
            name: [
                {
                    "candidate": c,
                    "pass": "both",
                    "median_s": 1.0,
                    "share_of_floor": 1.0,
                    "launches": 1,
                    "peak_bytes_beyond_gradients": 1,
                }
                for c in candidates
            ]
            for name, candidates in cases.items()
        }
        device |= a_record(module.__name__.rpartition("bench_")[2], rows)
    assert all(target.measure(device) is not None for target in report.GPU_TARGETS)
    maps = rows_of("3024 x 192", listed[bench_cayley]) + rows_of("maps 3024 x 192", listed[bench_cayley])
    device = a_record("orthogonal_maps", {"3024 x 192": maps})
    six = {c.name: [candidate.name for candidate in c.candidates] for c in bench_cayley.cases("cpu")}
    device |= a_record("cayley", {"6 x 256 x 256": rows_of("6 x 256 x 256", six)})
    tokens = {c.name: [candidate.name for candidate in c.candidates] for c in bench_ortho_proj_loss.cases("cpu")}
    device |= a_record("ortho_proj_loss", {report.CPU_TOKEN: rows_of(report.CPU_TOKEN, tokens)})
    without_z = {c.name: [candidate.name for candidate in c.candidates] for c in bench_semi_orthogonal.cases("cpu")}
    device |= a_record("semi_orthogonal", {name: rows_of(name, without_z) for name in without_z})
    assert all(target.measure(device) is not None for target in report.CPU_TARGETS)


def rows_of(name, cases):
    return [
        {"candidate": candidate, "pass": "both", "median_s": 1.0, "peak_bytes_beyond_gradients": 1}
        for candidate in cases[name]
    ]


def test_pytest_benchmark_tabulates_the_recorded_samples(tmp_path):
    words = [
        "-m",
        "pytest",
        "benchmarks/",
        "--benchmark-only",
        "-q",
        "-k",
        "batch and 16",
        "--seconds",
        "0.01",
        "--records",
        str(tmp_path / "records"),
        f"--benchmark-json={tmp_path}/table.json",
        "-p",
        "no:cacheprovider",
    ]
    if torch.cuda.is_available():
        pytest.skip("names a case of the CPU's list")
    # Under xdist the plugin that is to tabulate would switch itself off: a user's own command does not run there.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    result = processes.run_python(*words, cwd=records.ROOT, env=environment, seconds=600)
    assert result.returncode == 0, result.stdout + result.stderr
    table = json.loads((tmp_path / "table.json").read_text())["benchmarks"]
    (measured,) = records.read(tmp_path / "records")["cpu"]["cayley"]["cases"]
    medians = {row["candidate"]: row["median_s"] for row in measured["rows"]}
    assert {entry["name"].split("-")[1] for entry in table} == set(medians)
    for entry in table:
        assert entry["stats"]["median"] == pytest.approx(medians[entry["name"].split("-")[1]], rel=1e-6)
