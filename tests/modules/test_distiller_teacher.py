"""FeatureDistiller's teacher: frozen, apart from the module, with inputs of its own; the meta device."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import CNN, IMAGES, SEVERAL, TOKENS_TO_MAP, ViT, loss_like, make, outputs_of

# -------------------------------------------------------------------------------------------------- the frozen teacher


def test_the_teacher_is_frozen_and_apart():
    teacher = CNN()
    distiller = make(teacher=teacher)
    assert distiller.teacher is teacher
    assert not any(p.requires_grad for p in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    distiller.train()
    distiller(IMAGES)
    assert not teacher.training
    teacher.train()  # even so
    distiller(IMAGES)
    assert not teacher.training and distiller.student.training
    recording = []
    teacher.fc.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    distiller(IMAGES.clone().requires_grad_())
    assert recording == [False]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    ids = {id(p) for p in teacher.parameters()}
    assert not ids & {id(p) for p in distiller.parameters()}
    assert all(name.startswith(("student.", "pair_losses.")) for name in distiller.state_dict())


def frozen_trunk():
    trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)).requires_grad_(False)
    trunk[1].eval()
    return trunk


def on(trunk, width):
    return nn.Sequential(trunk, nn.Conv2d(6, width, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_trunk_may_be_shared(compiled):
    """The teacher runs it in eval mode, the student in its own mode, and neither changes it."""
    trunk = frozen_trunk()
    state = copy.deepcopy(trunk.state_dict())
    distiller = make([{"student": "", "teacher": "", "name": "x"}], on(trunk, 8), on(trunk, 12))
    expected = distiller.teacher.eval()(IMAGES)
    trunk[3].train()
    run = torch.compile(distiller, backend="eager") if compiled else distiller
    torch.manual_seed(1)
    output, losses = run(IMAGES)
    assert trunk[3].training
    torch.testing.assert_close(losses["x"], loss_like(distiller, "x", 8, 12)(output, expected))
    losses["x"].backward()
    assert distiller.student[1].weight.grad.abs().sum() > 0 and distiller.teacher[1].weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in trunk.state_dict().items())
    assert copy.deepcopy(distiller)(IMAGES)[1]["x"].isfinite()


def test_a_shared_part_that_training_would_change_is_refused():
    trunk = frozen_trunk()
    trunk[0].bias.requires_grad_()
    with pytest.raises(ValueError, match=r"teacher shares '0\.0\.bias' with the student, and it requires a gradient"):
        make([{"student": "", "teacher": "", "name": "x"}], on(trunk, 8), on(trunk, 12))
    assert trunk[0].bias.requires_grad
    trunk[0].bias.requires_grad_(False)
    distiller = make([{"student": "", "teacher": "dino:", "name": "x"}], on(trunk, 8), {"dino": on(trunk, 12)})
    trunk[1].train()
    with pytest.raises(ValueError, match=r"teacher 'dino' shares '0\.1', a BatchNorm2d in training mode, with the"):
        distiller(IMAGES)
    trunk[1].eval()
    distiller(IMAGES)
    distiller.student.requires_grad_()  # unfrozen later
    with pytest.raises(ValueError, match=r"teacher 'dino' shares '0\.0\.weight' with the student, and it requires"):
        distiller(IMAGES)


@pytest.mark.parametrize("outer", [False, True])
def test_a_teacher_moves_that_shares_parts_with_the_student(outer):
    """Also where a module around the distiller, as Lightning's, has moved the student before: then it is on two."""
    trunk = frozen_trunk()
    student, teacher = on(trunk, 8), on(trunk, 12)
    distiller = make([{"student": "", "teacher": "", "name": "x"}], student, teacher)
    module = nn.ModuleDict({"student": student, "distiller": distiller}) if outer else distiller
    module.to("meta")
    assert all(tensor.is_meta for tensor in (*teacher.parameters(), *teacher.buffers()))


def test_the_teacher_keeps_its_dtype_and_follows_the_device():
    distiller = make(teacher=CNN().bfloat16())
    assert distiller(IMAGES)[1]["total"].dtype == torch.float32  # images are cast for it
    distiller.to(torch.float64)
    assert {p.dtype for p in distiller.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in distiller.parameters()} == {torch.float64}
    assert distiller(IMAGES.double())[1]["total"].dtype == torch.float64
    distiller.to("meta")
    assert {p.device.type for p in (*distiller.parameters(), *distiller.teacher.parameters())} == {"meta"}


def test_16_bit_students_have_float32_projections():
    distiller = make(student=ViT().bfloat16(), example_input=IMAGES[:1].bfloat16())
    assert distiller.projection("norm->relu").dtype == torch.float32
    assert distiller(IMAGES.bfloat16())[1]["total"].isfinite()


def test_another_input_for_the_teacher():
    """Another resolution, as a tensor, a tuple or keywords; the example as well. It is cast for the teacher."""
    large = F.interpolate(IMAGES, scale_factor=2)
    for given in (large, (large,), {"images": large}):
        options = {"example_input": IMAGES, "example_teacher_input": given, "logit_weight": 1.0}
        distiller = make(teacher=CNN().bfloat16(), **options).eval()
        output, losses = distiller(IMAGES, teacher_input=given)
        torch.testing.assert_close(output, distiller.student(IMAGES))
        x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"]
        outputs = outputs_of(distiller.teacher, ["relu", "fc"], large.bfloat16())
        expected = loss_like(distiller, "norm->relu", 6, 10)(x[:, 1:].mean(1), outputs["relu"].mean((2, 3)))
        torch.testing.assert_close(losses["norm->relu"], expected)
        expected = F.kl_div(F.log_softmax(output, 1), F.softmax(outputs["fc"].float(), 1), reduction="batchmean")
        torch.testing.assert_close(losses["logits"], expected)


def test_stored_outputs_of_the_teacher():
    """The teacher is then what returns what it is given: features of one tap, or of several with the logits."""
    running = make(SEVERAL, logit_weight=0.5)
    stored = outputs_of(running.teacher, ["relu", "conv", "fc"], IMAGES)

    class Stored(nn.Module):
        def forward(self, **outputs):
            return outputs

    pairs = [{**pair, "teacher": "", "teacher_output": pair["teacher"]} for pair in SEVERAL]
    options = {"logit_weight": 0.5, "teacher_logits": "fc", "example_input": IMAGES, "example_teacher_input": stored}
    distiller = make(pairs, running.student, Stored(), **options)
    distiller.load_state_dict(running.state_dict())
    torch.testing.assert_close(distiller(IMAGES, teacher_input=stored), running(IMAGES))

    pair = {**TOKENS_TO_MAP, "teacher": "", "dims": (6, 10), "name": "a"}
    alone = make([pair], running.student, nn.Identity(), example_input=None)
    got = alone(IMAGES, teacher_input=stored["relu"])[1]["a"]
    expected = loss_like(alone, "a", 6, 10)(
        outputs_of(alone.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1), stored["relu"].mean((2, 3))
    )
    torch.testing.assert_close(got, expected)


# ----------------------------------------------------------------------------------------------------- the meta device


def test_built_on_the_meta_device():
    with torch.device("meta"):
        distiller = make(SEVERAL, example_input=torch.empty(1, 3, 8, 8))
    assert all(p.is_meta for p in (*distiller.parameters(), *distiller.teacher.parameters(), *distiller.buffers()))
    distiller.to_empty(device="cpu")
    models = ViT(), CNN()
    distiller.student.load_state_dict(models[0].state_dict())
    distiller.teacher.load_state_dict(models[1].state_dict())  # undefined till now, as the student's
    for tensor in (*distiller.pair_losses.parameters(), *distiller.pair_losses.buffers()):
        nn.init.constant_(tensor, torch.nan if tensor.is_floating_point() else 0)  # what to_empty() may leave
    distiller.reset_parameters()
    for name in ("a", "b", "c", "wide"):
        p = distiller.projection(name)
        torch.testing.assert_close(vk.diagnostics.orthogonality_error(p).item(), 0.0, rtol=0, atol=1e-5)
    assert distiller.pair_losses.of("c").scale.item() == pytest.approx((10 / 6) ** 0.5)
    built = make(SEVERAL, *models)
    built.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(distiller(IMAGES)[1], built(IMAGES)[1])


def test_a_teacher_without_values_is_refused_until_it_has_some():
    teacher = CNN()
    with torch.device("meta"):
        empty = CNN()
    distiller = make([{**TOKENS_TO_MAP, "dims": (6, 10), "name": "a"}], teacher=empty, example_input=None)
    with pytest.raises(ValueError, match=r"^teacher is on the meta device and has no values: load its weights"):
        distiller(IMAGES)
    empty.load_state_dict(teacher.state_dict(), assign=True)
    live = make([{**TOKENS_TO_MAP, "name": "a"}], distiller.student, teacher)
    live.load_state_dict(distiller.state_dict())
    torch.testing.assert_close(distiller.eval()(IMAGES)[1]["a"], live.eval()(IMAGES)[1]["a"])


def test_a_teacher_with_weights_keeps_them_when_the_student_starts_on_the_meta_device():
    with torch.device("meta"):
        student = ViT()
    teacher = CNN()
    before = copy.deepcopy(teacher.state_dict())
    example = torch.empty(1, 3, 8, 8, device="meta")
    distiller = make(student=student, teacher=teacher, example_input=example, example_teacher_input=IMAGES[:1])
    assert distiller.pair_losses.of("norm->relu").projection.unconstrained.is_meta
    distiller.to_empty(device="cpu").reset_parameters()
    distiller.student.load_state_dict(ViT().state_dict())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert distiller(IMAGES)[1]["total"].isfinite()


def test_reset_parameters_leaves_the_models_alone():
    distiller = make(SEVERAL)
    before = copy.deepcopy(distiller.state_dict())
    nn.init.zeros_(distiller.pair_losses.of("c").scale)
    distiller.reset_parameters()
    after = distiller.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed - {name for name in changed if name.endswith("map.signs")} == {
        f"pair_losses.[{n}].projection.unconstrained" for n in ("a", "b", "c", "wide")
    }
