"""renormalize: images of one model's normalization and size, from those of another's."""

import pytest
import torch
import torch.nn.functional as F

import vkd_kernels as vk
from vkd_kernels.images import different_normalization, image_config

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def normalized(pixels, mean, std):
    mean, std = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (pixels.double() - mean) / std


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_normalizing_the_pixels(dtype):
    pixels = torch.rand(2, 3, 8, 6, dtype=torch.float64)
    images = normalized(pixels, *IMAGENET).to(dtype)
    before = images.clone()
    result = vk.renormalize(images, from_=IMAGENET, to=CLIP)
    assert result.dtype == dtype and torch.equal(images, before)
    # The images' own rounding, of values up to 2.7, and that of the result.
    assert (result.double() - normalized(pixels, *CLIP)).abs().max() <= 4 * torch.finfo(dtype).eps


def test_back_and_forth():
    images = torch.randn(3, 5, 5, dtype=torch.float64)
    there = vk.renormalize(images, from_=IMAGENET, to=(0.5, 0.5))
    assert torch.allclose(vk.renormalize(there, from_=(0.5, 0.5), to=IMAGENET), images, atol=1e-14)


def test_resizing_is_that_of_the_pixels():
    pixels = torch.rand(2, 3, 32, 24)
    images = normalized(pixels, *IMAGENET).float()
    for mode, options in (("bicubic", {"antialias": True}), ("bilinear", {"antialias": True}), ("nearest", {})):
        result = vk.renormalize(images, from_=IMAGENET, to=CLIP, size=(16, 20), interpolation=mode)
        resized = F.interpolate(pixels, (16, 20), mode=mode, **options)
        assert torch.allclose(result, normalized(resized, *CLIP).float(), atol=1e-5)
    assert vk.renormalize(images, from_=IMAGENET, to=CLIP, size=48).shape == (2, 3, 64, 48)
    assert vk.renormalize(images[0], from_=IMAGENET, to=CLIP, size=12).shape == (3, 16, 12)


def test_nothing_to_change_returns_the_images():
    images = torch.randn(2, 3, 8, 8)
    assert vk.renormalize(images, from_=CLIP, to=CLIP, size=(8, 8)) is images


def test_what_timm_says():
    timm = pytest.importorskip("timm")
    student, teacher = timm.create_model("resnet18"), timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    config = image_config("to", teacher)
    assert (config.mean, config.std, config.size) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (64, 64))
    images = torch.randn(2, 3, 32, 32)
    result = vk.renormalize(images, from_=student, to=teacher)
    assert result.shape == (2, 3, 64, 64) and teacher(result).shape == (2, 1000)
    as_numbers = vk.renormalize(images, from_=IMAGENET, to=(0.5, 0.5), size=(64, 64), interpolation="bicubic")
    assert torch.equal(result, as_numbers)
    assert torch.equal(
        vk.renormalize(images, from_=student.pretrained_cfg, to=timm.data.resolve_model_data_config(teacher), size=64),
        result,
    )
    assert torch.equal(vk.renormalize(images, from_=torch.compile(student), to=teacher), result)


def test_what_transformers_says():
    transformers = pytest.importorskip("transformers")
    images = torch.randn(2, 3, 32, 48)
    expected = vk.renormalize(images, from_=IMAGENET, to=CLIP, size=(224, 224))
    processor = transformers.CLIPImageProcessor()
    assert torch.equal(vk.renormalize(images, from_=IMAGENET, to=processor), expected)
    assert torch.equal(vk.renormalize(images, from_=IMAGENET, to=processor.to_dict()), expected)
    older = {**transformers.CLIPImageProcessor(size={"shortest_edge": 64}).to_dict(), "crop_size": 48}
    assert vk.renormalize(images, from_=IMAGENET, to=older).shape == (2, 3, 48, 48)
    uncropped = transformers.CLIPImageProcessor(do_center_crop=False, size={"shortest_edge": 64})
    assert vk.renormalize(images, from_=IMAGENET, to=uncropped).shape == (2, 3, 64, 96)
    assert image_config("to", transformers.ViTImageProcessor()).interpolation == "bilinear"
    says_nothing = {"image_mean": [0.5], "image_std": [0.5], "size": {"height": 8, "width": 8}}
    assert image_config("to", says_nothing).interpolation == "bicubic"
    assert image_config("to", {**says_nothing, "resample": 0}).interpolation == "nearest"
    as_it_is = transformers.CLIPImageProcessor(do_resize=False, do_center_crop=False)
    assert vk.renormalize(images, from_=IMAGENET, to=as_it_is).shape == images.shape
    plain = transformers.CLIPImageProcessor(do_normalize=False)
    assert image_config("to", plain).mean == (0.0,)
    with pytest.raises(ValueError, match=r"does not rescale images by 1/255"):
        image_config("to", transformers.CLIPImageProcessor(rescale_factor=1 / 127.5))
    model = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=1, hidden_size=24, intermediate_size=24))
    with pytest.raises(TypeError, match="from_ must be .* got ViTModel. .*give its image processor"):
        vk.renormalize(images, from_=model, to=processor)


def test_what_torchvision_says():
    torchvision = pytest.importorskip("torchvision")
    images = torch.randn(2, 3, 32, 32)
    preset = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    config = image_config("to", preset)
    assert config.interpolation == "bilinear"
    expected = vk.renormalize(images, from_=(0.5, 0.5), to=IMAGENET, size=(224, 224), interpolation="bilinear")
    assert torch.equal(vk.renormalize(images, from_=(0.5, 0.5), to=preset), expected)
    normalize = torchvision.transforms.Normalize(*IMAGENET)
    assert torch.equal(
        vk.renormalize(images, from_=(0.5, 0.5), to=normalize), vk.renormalize(images, from_=(0.5, 0.5), to=IMAGENET)
    )


def test_gray_images_and_compiled():
    images = torch.randn(2, 1, 8, 8)
    convert = torch.compile(
        lambda x: vk.renormalize(x, from_=(0.5, 0.5), to=(0.1307, 0.3081), size=(16, 16)),
        fullgraph=True,
        backend="eager",
    )
    assert torch.allclose(convert(images), vk.renormalize(images, from_=(0.5, 0.5), to=(0.1307, 0.3081), size=(16, 16)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, TypeError, "images must have one of the dtypes"),
        ({"images": torch.zeros(8, 8)}, ValueError, r"images must have the shape \(N, C, H, W\)"),
        ({"from_": 0.5}, TypeError, r"from_ must be \(mean, std\), a timm model"),
        ({"to": torch.nn.Linear(2, 2)}, TypeError, r"to must be \(mean, std\), .*got Linear"),
        ({"to": (0.5, 0.5, 0.5)}, ValueError, r"to must be a pair \(mean, std\)"),
        ({"to": (0.5, 0.0)}, ValueError, "to: std must be positive"),
        ({"to": ("a", 1.0)}, TypeError, "to: mean and std must be a number"),
        ({"to": ((0.5, 0.5), 1.0)}, ValueError, "to has 2 means or stds, and images 3 channels"),
        (
            {"to": {"image_mean": [0.5], "image_std": [0.5], "do_rescale": False}},
            ValueError,
            "to is a processor that does not rescale images by 1/255",
        ),
        ({"size": "large"}, TypeError, r"size must be \(height, width\)"),
        ({"size": (0, 8)}, ValueError, "size must be at least 1"),
        ({"interpolation": "area"}, ValueError, "interpolation must be one of"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        vk.renormalize(**{"images": torch.randn(2, 3, 8, 8), "from_": CLIP, "to": IMAGENET, **arguments})


def test_a_difference_that_the_models_show():
    timm = pytest.importorskip("timm")
    resnet, vit, deit = (
        timm.create_model(name) for name in ("resnet18", "vit_tiny_patch16_224", "deit_tiny_patch16_224")
    )
    assert "vkd_kernels.renormalize(images, from_=student, to=teacher)" in different_normalization(resnet, vit)
    assert "teacher_input={'vit': vkd_kernels.renormalize(images, " in different_normalization(resnet, vit, "vit")
    assert different_normalization(resnet, deit) == ""
    assert different_normalization(resnet, torch.nn.Linear(2, 2)) == ""


def test_a_distiller_says_once_that_nothing_converts_the_images(recwarn):
    timm = pytest.importorskip("timm")
    student = timm.create_model("resnet10t", num_classes=3)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    pair = {"student": "", "teacher": ""}
    images = torch.randn(2, 3, 32, 32)

    def said():
        return [str(warning.message) for warning in recwarn if "different normalization" in str(warning.message)]

    distiller = vk.FeatureDistiller(student, teacher, [pair], example_input=images)
    distiller(images, teacher_input=vk.renormalize(images, from_=student, to=teacher))
    assert not said()
    for _ in range(2):
        distiller(images)
    assert len(said()) == 1 and "renormalize(images, from_=student, to=teacher)" in said()[0]
    alike = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    vk.FeatureDistiller(alike, teacher, [pair], example_input=images)(images)
    assert len(said()) == 1
