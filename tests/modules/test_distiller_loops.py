"""FeatureDistiller in the loops people have: hooks, optimizers, copies, compiled, checkpointed, on two ranks."""

import copy
import glob
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vkd_kernels as vk
from tests.helpers import processes
from tests.helpers.distillers import CNN, IMAGES, SEVERAL, TOKENS_TO_MAP, ViT, gradients, hooks_on, make

# --------------------------------------------------------------------------------------------------------------- hooks


def test_hooks_are_gone_after_each_pass_also_a_failed_one():
    distiller = make()
    for model in (distiller.student, distiller.teacher):
        distiller(IMAGES)
        assert hooks_on(model) == 0
        with pytest.raises(RuntimeError):
            distiller(torch.randn(2, 7, 8, 8))
        assert hooks_on(model) == 0
    distiller(IMAGES)


def test_attached_hooks_stay_until_removed_and_do_nothing_outside():
    distiller = make()
    expected = distiller(IMAGES)[1]["total"]
    with distiller:
        assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 1
        distiller.student(IMAGES)  # validation between steps is not seen
        torch.testing.assert_close(distiller(IMAGES)[1]["total"], expected)
        twin = copy.deepcopy(distiller)
        torch.testing.assert_close(twin(IMAGES)[1]["total"], expected)
        twin.remove()
        assert hooks_on(twin.student) == hooks_on(twin.teacher) == 0 and hooks_on(distiller.student) == 1
    assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 0
    assert distiller.attach().attach() is distiller and hooks_on(distiller.student) == 1
    distiller.remove()
    assert hooks_on(distiller.student) == 0


def test_modules_that_run_twice_or_never_are_refused():
    class Twice(ViT):
        def forward(self, images):
            return super().forward(images) + super().forward(images)

    with pytest.raises(RuntimeError, match=r"'norm->relu': the output of student module 'norm'.*ran 2 times"):
        make(student=Twice())
    with pytest.raises(RuntimeError, match="student module 'blocks'.*ran 0 times"):
        student = ViT()
        student.blocks.forward = None
        student.norm = nn.Sequential(nn.LayerNorm(6), nn.Identity())
        student.norm.add_module("unused", nn.Identity())
        student.forward = lambda images: student.norm(student.embed(images).flatten(2).mT)
        make([{**TOKENS_TO_MAP, "student": "blocks"}], student)


def test_features_changed_in_place_are_refused():
    with pytest.raises(RuntimeError, match="teacher module 'bn' was changed in place afterwards"):
        make([{**TOKENS_TO_MAP, "teacher": "bn"}])


# ---------------------------------------------------------------------------------------------------------- -optimizers


def named(spared):
    """The names themselves; those in brackets also stand there as patterns."""
    names = {name for name in spared if "[[]" not in name}
    assert spared == names | {glob.escape(name) for name in names}
    return names


def test_parameter_groups():
    student = ViT()
    student.head.weight.requires_grad_(False)
    distiller = make(SEVERAL, student)
    decayed, spared = distiller.parameter_groups(weight_decay=0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in distiller.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        "student.embed.weight",
        "student.blocks.0.0.weight",
        "student.blocks.1.0.weight",
    }
    trained = {name for name, p in distiller.named_parameters() if p.requires_grad}
    assert {names[id(p)] for g in (decayed, spared) for p in g["params"]} == trained
    assert len(decayed["params"]) + len(spared["params"]) == len(trained)
    assert named(distiller.no_weight_decay()) == {
        "student.cls_token",
        "pair_losses.[c].scale",
        *(f"pair_losses.[{n}].projection.unconstrained" for n in ("a", "b", "c", "wide")),
    }
    torch.optim.AdamW([decayed, spared])


def test_training_with_accumulated_gradients_brings_the_loss_down():
    distiller = make(SEVERAL, logit_weight=1.0)
    optimizer = torch.optim.AdamW(distiller.parameter_groups(weight_decay=0.05), lr=1e-2)
    totals = []
    for _ in range(30):
        for part in IMAGES.split(3):
            total = distiller(part)[1]["total"] * len(part) / len(IMAGES)
            total.backward()
        totals.append(total.item())
        optimizer.step()
        optimizer.zero_grad()
    assert totals[-1] < 0.8 * totals[0]
    whole = make([TOKENS_TO_MAP], logit_weight=1.0).eval()
    want = gradients(whole, whole(IMAGES)[1]["total"])
    whole.zero_grad()
    for part in IMAGES.split(3):
        (whole(part)[1]["total"] * len(part) / len(IMAGES)).backward()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------- the loops people have


def test_copies_pickles_and_state_dicts():
    distiller = make(SEVERAL, logit_weight=1.0)
    expected = distiller(IMAGES)[1]["total"]
    other = make(SEVERAL, teacher=distiller.teacher, logit_weight=1.0)
    other.pair_losses.reset_parameters()
    stream = io.BytesIO()
    torch.save(distiller.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for twin in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller)), other):
        assert torch.equal(twin(IMAGES)[1]["total"], expected)
    twin = copy.deepcopy(distiller)
    gradients(twin, twin(IMAGES)[1]["total"])
    assert twin.teacher is not distiller.teacher and all(p.grad is None for p in distiller.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    distiller = make([{**TOKENS_TO_MAP, "normalization": "none"}], logit_weight=1.0)
    expected = distiller(IMAGES)[1]
    with torch.autocast("cpu", dtype=dtype):
        output, losses = distiller(IMAGES)
        p = distiller.projection("norm->relu")
    assert output.dtype == dtype and p.dtype == torch.float32
    torch.testing.assert_close(p.T @ p, torch.eye(6), rtol=0, atol=1e-5)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, expected[name], rtol=0.05, atol=0.01)
    assert all(g.isfinite().all() for g in gradients(distiller, losses["total"]).values())


@pytest.mark.parametrize("full_graph", [False, True])
def test_compile(full_graph):
    """With the hooks attached all of it is one graph; without, putting them on is the one break before that graph."""
    torch._dynamo.reset()
    distiller = make(SEVERAL, logit_weight=1.0)
    output, losses = distiller(IMAGES)
    want = gradients(distiller, losses["total"])
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    if full_graph:
        distiller.attach()
    compiled = torch.compile(distiller, backend=backend, fullgraph=full_graph)
    for _ in range(10):  # recompilation in every step would end in an error of Dynamo's or in eager mode
        got, compiled_losses = compiled(IMAGES)
    assert len(graphs) == 1
    torch.testing.assert_close(got, output)
    torch.testing.assert_close(compiled_losses, losses)
    for name, gradient in gradients(distiller, compiled_losses["total"]).items():
        torch.testing.assert_close(gradient, want[name])
    distiller.remove()
    assert hooks_on(distiller.student) == hooks_on(distiller.teacher) == 0


def test_compiled_models_inside():
    torch._dynamo.reset()
    distiller = make()
    expected = distiller(IMAGES)[1]["total"]
    distiller.student = torch.compile(distiller.student, backend="aot_eager")
    torch.testing.assert_close(distiller(IMAGES)[1]["total"], expected)
    assert named(distiller.no_weight_decay()) == {
        "student._orig_mod.cls_token",
        "pair_losses.[norm->relu].projection.unconstrained",
    }


def test_activation_checkpointing():
    class Checkpointed(ViT):
        def forward(self, images):
            return checkpoint(super().forward, images, use_reentrant=False)

    want, got = make(), make(student=Checkpointed())
    got.load_state_dict(want.state_dict())
    got.teacher.load_state_dict(want.teacher.state_dict())
    want = gradients(want, want(IMAGES)[1]["total"])
    got = gradients(got, got(IMAGES)[1]["total"])
    assert want.keys() == got.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_of_a_distiller_counts_a_step_once(use_reentrant):
    """Balanced losses, a teacher left out now and then, running statistics: as without checkpointing."""
    pairs = [
        {**TOKENS_TO_MAP, "teacher": f"{name}:relu", "name": name, "normalization": targets}
        for name, targets in (("a", vk.Standardization(10, momentum=0.1)), ("b", "layer_norm"))
    ]
    want = make(pairs, teacher={"a": CNN(), "b": CNN()}, balance="running_mean", drop_best=0.5)
    got = copy.deepcopy(want)
    for step in range(3):
        images = (IMAGES + step).requires_grad_()
        expected = gradients(want, want(images)[1]["total"])
        value = checkpoint(lambda x: got(x)[1]["total"], images, use_reentrant=use_reentrant)
        torch.testing.assert_close(gradients(got, value), expected)
        torch.testing.assert_close(dict(got.state_dict()), dict(want.state_dict()), rtol=0, atol=0)


def test_functional_call_and_inference_mode():
    distiller, other = make(), make()
    nn.init.normal_(other.pair_losses.of("norm->relu").projection.unconstrained)
    got = torch.func.functional_call(distiller, dict(other.named_parameters()), (IMAGES,))[1]["total"]
    torch.testing.assert_close(got, other(IMAGES)[1]["total"])
    with torch.inference_mode():
        torch.testing.assert_close(distiller(IMAGES)[1]["total"], make()(IMAGES)[1]["total"])


# ----------------------------------------------------------------------------------------------------------- two ranks

IN_RANKS = [
    {**TOKENS_TO_MAP, "name": "a", "scale": "learned"},
    {**TOKENS_TO_MAP, "name": "b", "student": "blocks.1", "normalization": "batch_norm", "weight": 0.5, "eps": 1e-2},
    {"student": "head", "teacher": "fc", "name": "c", "normalization": "whiten", "eps": 1e-1},
]


def double(group=None):
    torch.manual_seed(0)
    images = IMAGES.double()
    options = {"logit_weight": 0.7, "temperature": 2.0, "example_input": images[:1], "process_group": group}
    return make(IN_RANKS, ViT().double(), CNN().double(), **options), images


def sharded(module):
    for block in module.student.blocks:
        fully_shard(block)
    return fully_shard(module)


def worker(rank):
    whole, images = double()
    mask = torch.tensor([True, True, False, True, True])
    expected = whole(images, masks={"a": mask, "logits": mask})[1]
    want = gradients(whole, expected["total"])
    mine = slice(0, 2) if rank == 0 else slice(2, 5)
    for wrap in (DistributedDataParallel, sharded):
        module, _ = double(dist.group.WORLD)
        ranks = wrap(module)  # kept, for it holds what reduces the gradients
        losses = ranks(images[mine], masks={"a": mask[mine], "logits": mask[mine]})[1]
        torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-12)
        got = gradients(module, losses["total"])
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            whole_gradient = got[name].full_tensor() if wrap is sharded else got[name]
            torch.testing.assert_close(whole_gradient, gradient, rtol=1e-8, atol=1e-11)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_equal_one_process(tmp_path):
    processes.run_ranks(worker, tmp_path)
