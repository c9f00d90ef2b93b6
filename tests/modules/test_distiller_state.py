"""FeatureDistiller's state dict, in which projections belong to names; sums and denominators of accumulated batches."""

import copy

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import (
    IMAGES,
    OPTIONS,
    SEVERAL,
    TOKENS_TO_MAP,
    ViT,
    gradients,
    make,
    outputs_of,
)

# --------------------------------------------------------------------------------------- projections belong to names


def equal_projections(ours, theirs, names):
    return all(torch.equal(ours.projection(name), theirs.projection(name)) for name in names)


def test_pairs_in_another_order_load_into_their_own_projections():
    trained = make(SEVERAL)
    resumed = make(SEVERAL[::-1])
    resumed.load_state_dict(trained.state_dict())
    assert equal_projections(resumed, trained, OPTIONS)
    torch.testing.assert_close(resumed(IMAGES)[1]["c"], make_like(resumed, SEVERAL)(IMAGES)[1]["c"])


def make_like(distiller, pairs):
    other = make(pairs, distiller.student, distiller.teacher)
    other.load_state_dict(distiller.state_dict(), strict=False)
    return other


def test_a_pair_of_equal_shape_added_to_a_checkpoint_leaves_the_others_alone():
    trained = make(SEVERAL[1:])
    more = make(SEVERAL)
    keys = more.load_state_dict(trained.state_dict(), strict=False)
    assert {key.split("]")[0] for key in keys.missing_keys} == {"pair_losses.[a"} and not keys.unexpected_keys
    assert equal_projections(more, trained, ["b", "c", "wide"])


AWKWARD = ["keys", "forward", "[a]", "a.b", "a%2Eb", "a%2eb", "%", "a->b", "training", "Block 3: Größe"]


def test_names_with_dots_and_names_of_attributes_are_told_apart():
    pairs = [{**TOKENS_TO_MAP, "name": name} for name in AWKWARD]
    trained, resumed = make(pairs), make(pairs[::-1])
    resumed.load_state_dict(trained.state_dict())
    assert equal_projections(resumed, trained, AWKWARD)
    assert dict(resumed.named_parameters()).keys() == dict(trained.named_parameters()).keys()
    assert all(resumed.get_parameter(name) is parameter for name, parameter in resumed.named_parameters())
    assert set(resumed(IMAGES)[1]) == {*AWKWARD, "total"}


def saved_by_version_0_1(distiller, names):
    """What distillers saved before projections had names: stacked by shape, scales by the pair's index."""
    state = {key: value for key, value in distiller.state_dict().items() if key.startswith("student.")}
    for shape in ("10x6", "3x6"):
        of_shape = [distiller.pair_losses.of(n) for n in names if tuple(distiller.projection(n).shape) == SHAPES[shape]]
        if of_shape:
            state[f"projections.{shape}.unconstrained"] = torch.stack([p.projection.unconstrained for p in of_shape])
            state[f"projections.{shape}.map.signs"] = torch.stack([p.projection.map.signs for p in of_shape])
    for index, name in enumerate(names):
        if isinstance(distiller.pair_losses.of(name).scale, nn.Parameter):
            state[f"scales.{index}"] = distiller.pair_losses.of(name).scale.detach()
    return state


SHAPES = {"10x6": (10, 6), "3x6": (3, 6)}


def test_checkpoints_of_version_0_1_load_where_shapes_say_which_pair_is_which():
    pairs = [SEVERAL[3], SEVERAL[0]]
    trained, resumed = make(pairs), make(pairs[::-1])
    resumed.load_state_dict(saved_by_version_0_1(trained, ["wide", "a"]))
    assert equal_projections(resumed, trained, ["a", "wide"])
    inside = nn.ModuleDict({"distiller": make(pairs)})
    state = saved_by_version_0_1(trained, ["wide", "a"])
    inside.load_state_dict({f"distiller.{key}": value for key, value in state.items()})
    assert equal_projections(inside["distiller"], trained, ["a", "wide"])


def test_checkpoints_of_version_0_1_are_an_error_where_several_pairs_share_a_shape():
    trained, resumed = make(SEVERAL), make(SEVERAL[::-1])
    nn.init.constant_(trained.pair_losses.of("c").scale, 7.0)
    state = saved_by_version_0_1(trained, ["a", "b", "c", "wide"])
    before = copy.deepcopy(resumed.state_dict())
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"which pair is which.*converted_state_dict\(state_dict, names\)"):
            resumed.load_state_dict(state, strict=strict)
    assert all(torch.equal(v, before[k]) for k, v in resumed.state_dict().items() if k.startswith("pair_losses"))
    resumed.load_state_dict(resumed.converted_state_dict(state, ["a", "b", "c", "wide"]))
    assert equal_projections(resumed, trained, OPTIONS) and resumed.pair_losses.of("c").scale == 7
    with pytest.raises(ValueError, match=r"3x6.*1 projections, but of names these have the shape: \[\]"):
        resumed.converted_state_dict(state, ["a", "b", "c"])
    with pytest.raises(ValueError, match="names must be one of 'wide', 'c', 'b', 'a'; got 'd'"):
        resumed.converted_state_dict(state, ["a", "b", "d", "wide"])


@pytest.mark.parametrize("kind", ["linear", "identity"])
def test_projections_to_compare_with(kind):
    pairs = [{**pair, "projection": kind} if pair["name"] in "ab" else pair for pair in SEVERAL]
    distiller = make(pairs)
    x = outputs_of(distiller.student, ["norm"], IMAGES)["norm"][:, 1:].mean(1)
    y = outputs_of(distiller.teacher, ["relu"], IMAGES)["relu"].mean((2, 3))
    p = distiller.projection("a")
    assert kind == "linear" or torch.equal(p, torch.eye(10, 6))
    expected = vk.functional.ortho_proj_loss(x, y, p, scale=(10 / 6) ** 0.5, loss="mse")
    torch.testing.assert_close(distiller(IMAGES)[1]["a"], expected)
    spared = {id(p) for p in distiller.parameter_groups(weight_decay=0.1)[1]["params"]}
    assert kind == "identity" or id(distiller.pair_losses.of("a").projection.weight) not in spared


def test_pair_objects_serve_as_dicts_do():
    assert make([vk.Pair(**pair) for pair in SEVERAL])(IMAGES)[1].keys() == make(SEVERAL)(IMAGES)[1].keys()


# ------------------------------------------------------------------------------------------------------- denominators


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_accumulated_batches_of_unequal_length_have_the_gradient_of_the_whole(reduction):
    """As Trainer accumulates: tokens of all micro-batches count alike, however they are spread."""
    tokens = {
        "student": "norm",
        "student_pool": "tokens",
        "student_skip": 1,
        "teacher": "norm",
        "teacher_pool": "tokens",
        "teacher_skip": 1,
    }
    pairs = [{**tokens, "name": "x"}, {**tokens, "name": "y", "loss": "mse", "scale": "match"}, CLASSES]
    distiller = make(pairs, ViT(6), ViT(9), logit_weight=0.5)
    mask = torch.arange(17) < torch.tensor([17, 3, 9, 2, 12])[:, None]
    whole = distiller(IMAGES, masks={"x": mask, "y": mask})[1]
    want = gradients(distiller, whole["total"])
    kept = mask[:, 1:].sum()
    rows = {"x": kept, "y": kept.item(), "head->head": 5, "logits": torch.tensor(5)}
    distiller.zero_grad()
    if reduction == "sum":
        other = make(pairs, distiller.student, distiller.teacher, logit_weight=0.5, reduction="sum")
        other.load_state_dict(distiller.state_dict())
        distiller = other
    sums = {}
    for part in (slice(0, 2), slice(2, 5)):
        masks = {"x": mask[part], "y": mask[part]}
        options = {} if reduction == "sum" else {"total_rows": rows}
        losses = distiller(IMAGES[part], masks=masks, **options)[1]
        if reduction == "sum":
            channels = {"x": 9, "y": 9, "head->head": 3, "logits": 1}
            losses = {name: losses[name] / (rows[name] * channels[name]) for name in rows}
            losses["total"] = sum(losses[name] for name in ("x", "y", "head->head")) + 0.5 * losses["logits"]
        losses["total"].backward()
        sums = {name: sums.get(name, 0) + loss.detach() for name, loss in losses.items()}
    torch.testing.assert_close(sums, {name: loss.detach() for name, loss in whole.items()})
    for name, parameter in distiller.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)


CLASSES = {"student": "head", "teacher": "head"}


def test_one_number_of_total_rows_serves_all_losses_and_bad_ones_are_refused():
    distiller = make([CLASSES], logit_weight=1.0, teacher=ViT(9))
    losses, tenth = distiller(IMAGES)[1], distiller(IMAGES, total_rows=50)[1]
    for name, loss in losses.items():
        torch.testing.assert_close(tenth[name], loss / 10)
    with pytest.raises(ValueError, match="a key of total_rows must be one of 'head->head', 'logits'; got 'x'"):
        distiller(IMAGES, total_rows={"x": 3})
    with pytest.raises(ValueError, match="total_rows must be .*> 0; got 0"):
        distiller(IMAGES, total_rows=0)
    with pytest.raises(ValueError, match=r"total_rows must be a number or an integer or float32 tensor; .*FSDP2 casts"):
        distiller(IMAGES, total_rows=torch.tensor(100097.0, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"total_rows must be a number or a 0-d tensor; got .*\(5,\)"):
        distiller(IMAGES, total_rows=torch.ones(5))
    with pytest.raises(ValueError, match="with reduction='sum' divide the losses"):
        make([CLASSES], teacher=ViT(9), reduction="sum")(IMAGES, total_rows=5)
