"""vkd cache: a teacher's features of a folder of images, from the command line."""

import argparse
import contextlib
import io
import os
import shutil
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import vkd_kernels as vk
from tests.helpers import processes
from vkd_kernels import cli
from vkd_kernels.store import command

Image = pytest.importorskip("PIL.Image")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
transformers = pytest.importorskip("transformers")

TEACHER = ["--teacher", "timm:vit_tiny_patch16_224", "--weights", "random", "--size", "32", "--device", "cpu"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for label in ("cat", "dog"):
        (folder / label).mkdir()
        for number in range(5):
            pixels = torch.randint(256, (40, 36, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / label / f"{number}.png")
    return folder


def run(*words):
    return cli.main(["cache", *map(str, words)])


def test_features_of_a_timm_model(images, tmp_path, capsys):
    words = [
        tmp_path / "a",
        *TEACHER,
        "--images",
        images,
        "--workers",
        "0",
        "--batch-size",
        "4",
        "--shard-samples",
        "4",
    ]
    taps = ["--tap", "norm,pool=tokens,skip=1", "--tap", ""]
    assert run(*words, *taps, "--dtype", "float32") == 0
    assert "10 samples, 70.7 kB in float32 (7.07 kB each), 3 shards" in capsys.readouterr().err
    store = vk.FeatureStore(tmp_path / "a")
    torch.manual_seed(0)
    teacher = timm.create_model("vit_tiny_patch16_224", img_size=32).eval()
    config = {**timm.data.resolve_model_data_config(teacher), "input_size": (3, 32, 32)}
    data = torchvision.datasets.ImageFolder(images, timm.data.create_transform(**config))
    batch = torch.stack([data[index][0] for index in (7, 2)])
    with torch.no_grad():
        assert torch.allclose(store[[7, 2]]["norm"], teacher.forward_features(batch)[:, 1:], atol=1e-4)
        assert torch.allclose(store[[7, 2]][""], teacher(batch), atol=1e-4)
    (tmp_path / "a" / "shard-00001.safetensors").unlink()
    assert run(*words, *taps, "--dtype", "float32") == 0  # the same command continues
    assert "3 shards, 2 of them finished" in capsys.readouterr().err
    assert run(*words, *taps) == 2
    assert "dtype: float32 there, float16 now" in capsys.readouterr().err


def test_weights_from_a_file_and_another_dtype_to_compute_in(images, tmp_path):
    teacher = timm.create_model("resnet10t", num_classes=7)
    torch.save({"state_dict": timm.create_model("resnet10t").state_dict()}, tmp_path / "weights.pth")
    words = ["--teacher", "timm:resnet10t", "--images", images, "--workers", "0", "--size", "64", "--device", "cpu"]
    tap = ["--tap", "layer4,pool=spatial", "--teacher-dtype", "bfloat16", "--dtype", "bfloat16"]
    assert run(tmp_path / "a", *words, "--weights", tmp_path / "weights.pth", *tap) == 0
    assert vk.FeatureStore(tmp_path / "a")[:]["layer4"].shape == (10, 2, 2, 512)
    torch.save(teacher.state_dict(), tmp_path / "other.pth")
    assert run(tmp_path / "b", *words, "--weights", tmp_path / "other.pth", *tap) == 2


def test_of_a_checkpoint_of_timms_training_it_reads_the_averaged_weights(images, tmp_path):
    """As the recipes do. Beside the weights stand the optimizer's state and the arguments of the run."""
    model, average = (timm.create_model("resnet10t") for _ in range(2))
    saver = timm.utils.CheckpointSaver(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        args=argparse.Namespace(model="resnet10t", lr=0.1),
        model_ema=average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=0.5)
    words = ["--teacher", "timm:resnet10t", "--images", images, "--workers", "0", "--size", "64", "--device", "cpu"]
    words += ["--tap", "layer4,pool=spatial_mean", "--dtype", "float32"]
    assert run(tmp_path / "a", *words, "--weights", tmp_path / "last.pth.tar") == 0
    torch.save(average.state_dict(), tmp_path / "average.pth")
    assert run(tmp_path / "a", *words, "--weights", tmp_path / "average.pth") == 0  # of other weights it is an error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(2)], "it holds a list, where a dict of tensors by name is needed, as model.state_dict() gives"),
        (torch.zeros(2), "it holds a Tensor, where a dict of tensors"),
        ({"epoch": 3, "model_ema": None}, "it holds 'epoch', 'model_ema', and no tensors by name, neither there nor"),
        ({}, "it holds nothing, and no tensors by name"),
        (b"no weights", "cannot read tensors from"),
    ],
)
def test_files_without_weights_are_named(images, tmp_path, capsys, content, message):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert run(tmp_path / "a", *TEACHER, "--images", images, "--weights", path) == 2
    said = capsys.readouterr().err
    assert said.startswith("vkd: error: --weights: cannot read tensors from") and message in said


def test_a_transformers_model_in_a_folder(images, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
    )
    torch.manual_seed(1)  # random weights of the command are of 0
    teacher = transformers.ViTModel(config).eval()
    teacher.save_pretrained(tmp_path / "vit")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "vit")
    words = ["--teacher", f"transformers:{tmp_path / 'vit'}", "--images", images, "--workers", "0", "--device", "cpu"]
    tap = ["--tap", ",output=last_hidden_state,pool=class_token", "--dtype", "float32"]
    assert run(tmp_path / "a", *words, "--weights", "pretrained", *tap) == 0
    data = torchvision.datasets.ImageFolder(images)
    pixels = processor([data[3][0]], return_tensors="pt")["pixel_values"]
    features = vk.FeatureStore(tmp_path / "a")[3][""]
    with torch.no_grad():
        assert torch.allclose(features, teacher(pixels).last_hidden_state[0, 0], atol=1e-4)
    assert run(tmp_path / "b", *words, "--weights", "random", *tap) == 0
    assert not torch.allclose(vk.FeatureStore(tmp_path / "b")[3][""], features, atol=1e-2)
    tap = ["--tap", ",output=-1", "--tap", ",output=-2,pool=class_token", "--dtype", "float32"]
    assert run(tmp_path / "c", *words, "--weights", "pretrained", *tap) == 0
    with torch.no_grad():
        pooled = teacher(pixels).pooler_output[0]
    from_the_end = vk.FeatureStore(tmp_path / "c")[3].values()
    assert all(torch.allclose(*two, atol=1e-4) for two in zip(from_the_end, (pooled, features), strict=True))


VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = {**VISION, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def saved_with_text(name, folder, **vision):
    """A model of text and images with random weights, in a folder: "CLIP", for instance."""
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT, vision_config={**VISION, "patch_size": 8, **vision}
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model.save_pretrained(folder)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return model, processor


@pytest.mark.parametrize("weights", ["pretrained", "a file"])
@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_of_text_and_images_it_takes_the_vision_model(images, tmp_path, name, weights):
    model, processor = saved_with_text(name, tmp_path / "model", image_size=32)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    words = ["--teacher", f"transformers:{tmp_path / 'model'}", "--images", images, "--workers", "0", "--device", "cpu"]
    words += ["--weights", "pretrained" if weights == "pretrained" else tmp_path / "weights.pth", "--dtype", "float32"]
    assert run(tmp_path / "a", *words, "--tap", ",output=last_hidden_state,pool=tokens") == 0
    pixels = processor([torchvision.datasets.ImageFolder(images)[3][0]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.vision_model(pixels).last_hidden_state[0]
    assert torch.allclose(vk.FeatureStore(tmp_path / "a")[3][""], expected, atol=1e-4)


def test_models_that_need_more_than_images_are_named(images, tmp_path, capsys):
    saved_with_text("Siglip2", tmp_path / "model", num_patches=16)
    words = ["--images", images, "--weights", "random", "--tap", ",output=last_hidden_state,pool=tokens"]
    assert run(tmp_path / "a", "--teacher", f"transformers:{tmp_path / 'model'}", *words) == 2
    said = capsys.readouterr().err
    assert "spatial_shapes beside the images: build the store by FeatureStore.build, whose teacher_input=" in said
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path / "model")
    assert run(tmp_path / "a", "--teacher", f"transformers:{tmp_path / 'model'}", *words) == 2
    assert "BertModel takes input_ids, and has no vision_model that takes images" in capsys.readouterr().err


def test_without_a_tap_it_lists_modules_and_a_dry_run_writes_nothing(images, tmp_path, capsys):
    words = [tmp_path / "a", *TEACHER, "--images", images, "--workers", "0"]
    assert run(*words) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["norm", "(1,", "5,", "192)"] for line in lines)
    assert run(*words, "--tap", "norm,pool=mean_tokens", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "'norm' with teacher_pool='mean_tokens': (192,) per image" in said and "3.84 kB in float16, 1 shards" in said
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--teacher", "resnet18"], "--teacher: timm:NAME or transformers:NAME; got 'resnet18'"),
        (["--teacher", "timm:resnet_18"], "--teacher: Unknown model (resnet_18)"),
        (["--weights", "missing.pth"], "--weights: pretrained, random, or a file; there is no file missing.pth"),
        (["--images", "nowhere"], "--images: there is no folder nowhere"),
        (["--tap", "norm,pool=max"], "pool is one of class_token, mean_tokens"),
        (["--tap", "norm,size=3"], "after the module come pool=, skip=, output=, call=, layout=; got 'size=3'"),
        (["--tap", "norm,pool=tokens,skip=-1"], "teacher_skip must be an int >= 0; got int -1"),
        (["--tap", "nrm"], "teacher has no module 'nrm'; it has, nearest first, 'norm'"),
        (["--tap", "norm,pool=tokens,call=last"], "teacher_call must be None or an int; got str 'last'"),
        (["--tap", "blocks.0.attn.attn_drop"], "ran 0 times in this one. Another module does the work"),
        (
            ["--tap", "blocks.0.attn.attn_drop"],
            "one that runs; without --tap this command lists the modules that run",
        ),
        (["--batch-size", "0", "--tap", "norm,pool=tokens"], "batch_size must be at least 1"),
        (["--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (["--device", "cuda:99"], "; --device cpu needs no accelerator"),
        (["--device", "meta"], "--device meta: "),
    ],
)
def test_what_a_user_got_wrong_is_said(images, tmp_path, capsys, words, message):
    assert run(tmp_path / "a", *TEACHER, "--images", images, *words) == 2
    assert message in capsys.readouterr().err


def test_the_device_is_checked_before_the_teacher_is_loaded(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timm, "create_model", None)
    monkeypatch.setenv("LOCAL_RANK", "98")  # torchrun's: each rank has its own GPU
    words = ["--images", images, "--device", "cuda", "--tap", "norm,pool=tokens"]
    assert run(tmp_path / "a", *TEACHER, *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("vkd: error: --device cuda:98: ") and len(said.splitlines()) == 1


def test_of_a_module_that_runs_several_times_the_tap_names_a_call(images, tmp_path, capsys, monkeypatch):
    class Twice(torch.nn.Module):
        pretrained_cfg = {"input_size": (3, 32, 32)}

        def __init__(self):
            super().__init__()
            self.pool, self.part = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(3, 3)

        def forward(self, images):
            return self.part(self.part(self.pool(images).flatten(1)))

    monkeypatch.setattr(timm, "create_model", lambda *args, **options: Twice())
    words = [tmp_path / "a", *TEACHER, "--images", images, "--workers", "0"]
    assert run(*words, "--tap", "part") == 2
    assert "the module ran 2 times in this forward pass: say which call" in capsys.readouterr().err
    taps = ["--tap", "part,call=-1", "--tap", "part,call=0", "--tap", ""]
    assert run(*words, *taps) == 0
    features = vk.FeatureStore(tmp_path / "a")[3]
    assert torch.equal(features["'part' with teacher_call=-1"], features[""])
    assert not torch.equal(features["'part' with teacher_call=0"], features[""])


def test_a_full_gpu_is_said_and_other_failures_keep_their_traceback(images, tmp_path, capsys, monkeypatch):
    def fails(*_):
        raise error

    monkeypatch.setattr(command, "build", fails)
    words = [tmp_path / "a", *TEACHER, "--images", images, "--tap", "norm,pool=class_token"]
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert run(*words) == 2
    assert "CUDA out of memory. Tried to allocate 2.00 GiB. A smaller --batch-size" in capsys.readouterr().err
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(*words)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named(images, tmp_path, capsys, workers):
    """Here one that is cut off in the middle of the data, which is met when shards are finished already."""
    shutil.copytree(images, tmp_path / "images")
    path = tmp_path / "images" / "dog" / "2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    words = [tmp_path / "a", *TEACHER, "--images", tmp_path / "images", "--tap", "norm,pool=class_token"]
    words += ["--workers", workers, "--batch-size", 2, "--shard-samples", 2]
    assert run(*words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"vkd: error: --images: cannot read {path} (") and "): mend this file" in said
    assert len([*(tmp_path / "a").glob("shard-*.safetensors")]) == 3
    path.write_bytes(whole)
    assert run(*words) == 0  # it continues
    assert "5 shards, 3 of them finished" in capsys.readouterr().err


def test_its_help(capsys):
    with pytest.raises(SystemExit) as end:
        run("--help")
    assert end.value.code == 0
    assert "Interrupted or killed, the same command continues" in capsys.readouterr().out


def run_as_torchrun_does(rank, folder, words):
    dist.destroy_process_group()
    environment = mock.patch.dict(os.environ, RANK=str(rank), WORLD_SIZE="2")
    with environment, contextlib.redirect_stderr(io.StringIO()) as said:
        assert run(*words) == 0
    (folder / f"{rank}.txt").write_text(said.getvalue())


def test_two_ranks_of_torchrun_share_the_work(images, tmp_path):
    words = [tmp_path / "a", *TEACHER, "--images", images, "--tap", "norm,pool=class_token", "--workers", "0"]
    processes.run_ranks(run_as_torchrun_does, tmp_path, tmp_path, [*words, "--shard-samples", "3"])
    said = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert ", 2 ranks; " in said[0] and ", 2 ranks; " not in said[1]
    assert len(vk.FeatureStore(tmp_path / "a")) == 10
