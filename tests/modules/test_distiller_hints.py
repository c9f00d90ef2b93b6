"""Errors and warnings around a FeatureDistiller whose advice can be followed, and masks that go with an export."""

import re

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import FEATURES, IMAGES, Encoder, ViT, distiller_of_layers, make

IDS = torch.arange(15).reshape(3, 5) % 11
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool()
MEANS = {"student": "", "teacher": "", "name": "m", "student_output": 0, "teacher_output": 0}
MEANS |= {"student_pool": "mean_tokens", "teacher_pool": "mean_tokens"}

# ------------------------------------------------------------------------------------------------------ masks, exported


def distiller_of_means(**options):
    return make([{**MEANS, **options}], Encoder(6), Encoder(9), example_input={"input_ids": IDS})


def test_an_exported_mean_is_that_of_the_masked_positions():
    distiller = distiller_of_means()
    module = distiller.export("m")
    padded = module(input_ids=IDS, masks={"m": MASK})
    for row, length in enumerate(MASK.sum(1)):
        torch.testing.assert_close(padded[row], module(input_ids=IDS[row : row + 1, :length])[0])
    with pytest.raises(ValueError, match="masks must be one of 'm'"):
        module(input_ids=IDS, masks={"other": MASK})


@pytest.mark.parametrize("pool", ["mean_tokens", "tokens"])
def test_an_export_is_calibrated_over_what_is_not_masked(pool):
    distiller = distiller_of_means(normalization="batch_norm", student_pool=pool, teacher_pool=pool)
    module = distiller.export("m", calibration_input={"input_ids": IDS, "masks": {"m": MASK}})
    vectors = module(input_ids=IDS, masks={"m": MASK})
    vectors = vectors[MASK] if pool == "tokens" else vectors
    torch.testing.assert_close(vectors.mean(0), torch.zeros(9), rtol=0, atol=1e-5)
    assert (vectors.var(0, correction=0) < 1).all() and (vectors.var(0, correction=0) > 0.5).all()


# --------------------------------------------------------------------------------------------------------------- advice


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_an_encoder_have_a_remedy():
    padding, x = ~MASK, torch.randn(3, 5, 8)
    pair = {"student": "", "teacher": "layers.1", "student_pool": "tokens", "teacher_pool": "tokens", "dims": (8, 8)}

    def distill(**options):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        teacher = nn.TransformerEncoder(layer, 2, **options)
        distiller = vk.FeatureDistiller(nn.Linear(8, 8), teacher, [{**pair, "name": "x"}])
        return distiller(x, teacher_input={"src": x, "src_key_padding_mask": padding}, masks={"x": MASK})[1]["x"]

    with pytest.raises(TypeError, match="is a nested tensor, .* build the encoder with enable_nested_tensor=False"):
        distill()
    assert distill(enable_nested_tensor=False).isfinite()


def test_a_few_tokens_more_are_taken_for_a_prefix():
    tokens = {"student": "norm", "teacher": "norm", "student_pool": "tokens", "teacher_pool": "tokens", "dims": (6, 9)}
    distiller = vk.FeatureDistiller(ViT(6), ViT(9, prefix=5), [{**tokens, "student_skip": 1}])
    with pytest.raises(ValueError, match=r"\(5, 16, 6\) and .* \(5, 21, 9\).*; teacher_skip=5 \(or more\)"):
        distiller(IMAGES)
    distiller = vk.FeatureDistiller(ViT(6), ViT(9, prefix=5), [{**tokens, "student_skip": 1, "teacher_skip": 2}])
    with pytest.raises(ValueError, match=r"\(5, 16, 6\) and .* \(5, 19, 9\).*; teacher_skip=5 \(or more\)"):
        distiller(IMAGES)


@pytest.mark.filterwarnings("ignore:.*student's features have no graph")
def test_what_comes_as_a_tuple_in_training_alone_has_a_remedy_for_logits():
    class Auxiliary(nn.Linear):
        def forward(self, x):
            return (super().forward(x), x) if self.training else super().forward(x)

    def distill(student_logits):
        return vk.FeatureDistiller(
            Auxiliary(6, 4), nn.Linear(6, 4), [], logit_weight=1.0, student_logits=student_logits
        )

    distiller = distill(0)
    distiller(FEATURES)
    with pytest.raises(TypeError) as error:
        distiller.eval()(FEATURES)
    (advice,) = re.findall(r"student_logits=(lambda .*)", str(error.value))
    distiller = distill(eval(advice))
    assert distiller(FEATURES)[1]["logits"].isfinite() and distiller.eval()(FEATURES)[1]["logits"].isfinite()
    with pytest.raises(TypeError, match="student_logits must be an entry's name, .* got dict {'a': 0}"):
        distill({"a": 0})


def test_hidden_states_are_asked_for():
    pair = {"student": "", "teacher": "", "student_output": ("hidden_states", 1), "teacher_output": 0, "name": "x"}
    with pytest.raises(TypeError, match="Call it with output_hidden_states=True"):
        make([pair], Encoder(6), Encoder(9), example_input={"input_ids": IDS})


def test_the_name_of_a_teacher_is_for_several(tmp_path):
    with pytest.raises(ValueError, match="teacher has no module 'a:0'; .*'name:module' is for several teachers"):
        vk.FeatureStore.build(tmp_path, nn.Sequential(nn.Linear(6, 8)), FEATURES, ["a:0"], progress=False)


def test_means_that_a_store_has_taken_need_the_students_mask_alone(tmp_path):
    teacher = Encoder(9)
    batch = {"input_ids": IDS, "mask": MASK}
    tap = {key: value for key, value in MEANS.items() if key.startswith("teacher")}
    store = vk.FeatureStore.build(
        tmp_path,
        teacher,
        [{"input_ids": i} for i in IDS],
        [tap],
        mask=lambda b: MASK[: len(b["input_ids"])],
        progress=False,
    )
    distiller = vk.FeatureDistiller(Encoder(6), store, [{**MEANS, "dims": (6, 9)}])
    with pytest.raises(ValueError, match=r"and here \(mask, None\): the student's alone"):
        distiller(input_ids=batch["input_ids"], masks={"m": MASK}, indices=range(3))
    assert distiller(input_ids=IDS, masks={"m": (MASK, None)}, indices=range(3))[1]["m"].isfinite()


def test_a_with_inside_of_attach_leaves_the_hooks_on():
    distiller = distiller_of_layers()
    distiller.attach()
    with distiller:
        distiller(FEATURES)
    assert distiller.student[0]._forward_hooks
    distiller.remove()
    with distiller:
        assert distiller.student[0]._forward_hooks
    assert not distiller.student[0]._forward_hooks
