"""The generation task: augmentation, the distance, the networks, who gets which gradient, runs, ranks, data, errors."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import processes

pytest.importorskip("lightning_fabric", reason="needs the extra [recipes]: lightning-fabric")
pytest.importorskip("sklearn", reason="needs the extra [recipes]: scikit-learn")

from vkd_kernels.recipes import compare, devices, engine, evaluate, generation, runs, tasks
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.generation import augment, biggan, data, losses, metrics, models, teachers
from vkd_kernels.recipes.generation.options import Config

DIGITS, RGB = models.Shape(1, 8, 10), models.Shape(3, 32, 10)
TINY = {
    "student.widths": (8, 8, 8), "discriminator.widths": (8, 8, 12), "teacher.widths": (8, 16), "teacher.steps": 10,
    "optim.steps": 8, "optim.batch_size": 8, "metric.samples": 60, "run.eval_every": 4, "run.save_every": 3,
    "run.log_every": 2, "run.tensorboard": False,
}  # fmt: skip


def configured(**sections):
    return configs.replace(Config(), TINY | {k.replace("__", "."): v for k, v in sections.items()})


def cpu(config=None):
    config = config or configured()
    return devices.make_fabric(config.run, config.optim)


class Asked(runs.Worker):
    """Stops after so many questions."""

    def __init__(self, stop_at=None):
        self.left = stop_at

    def should_stop(self):
        if self.left is None:
            return False
        self.left -= 1
        return self.left < 0

    def report(self, *arguments):
        pass


def train(config, root, arm="vkd", worker=None):
    """What a worker process does for one seed and one arm."""
    worker = worker or Asked()
    if not (compare.teacher_folder(root, 0) / "done.json").exists():
        compare.train_teacher("generation", config, 0, root, None, Asked())
    compare.train_arm("generation", generation.ARMS[arm].apply(config), arm, 0, root, None, worker)
    return compare.arm_folder(root, arm, 0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("generation")
    return train(configured(), root)


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_translation_by_nothing_changes_nothing_and_by_a_pixel_moves_by_one():
    images = torch.rand(3, 2, 5, 6)
    assert torch.equal(augment.translate(images, torch.zeros(3, 2, dtype=torch.long)), images)
    moved = augment.translate(images, torch.tensor([[1, 0], [0, -2], [5, 0]]))
    assert torch.equal(moved[0, :, 1:], images[0, :, :-1]) and (moved[0, :, 0] == augment.BACKGROUND).all()
    assert torch.equal(moved[1, :, :, :-2], images[1, :, :, 2:]) and (moved[1, :, :, -2:] == augment.BACKGROUND).all()
    assert (moved[2] == augment.BACKGROUND).all()


def test_cutout_blanks_its_square_alone():
    images = torch.rand(2, 1, 6, 6)
    cut = augment.cut_out(images, torch.tensor([[1, 2, 3], [-1, 4, 3]]))
    assert (cut[0, 0, 1:4, 2:5] == augment.BACKGROUND).all() and (cut[1, 0, :2, 4:] == augment.BACKGROUND).all()
    assert (cut != augment.BACKGROUND).sum() == 2 * 36 - 9 - 4
    assert torch.equal(augment.cut_out(images, torch.tensor([[0, 0, 0], [3, 3, 0]])), images)


def test_amounts_keep_their_limits_and_reach_them():
    drawn = augment.draw(augment.POLICIES, 2000, 8, engine.generator(0), shift=0.25, cut=0.5)
    assert set(drawn["translation"].flatten().tolist()) == {-2, -1, 0, 1, 2}
    corner, side = drawn["cutout"][:, :2], drawn["cutout"][:, 2]
    assert (side == 4).all() and corner.min() == -2 and corner.max() == 6
    assert drawn["color"].min() >= 0 and drawn["color"].max() <= 1
    assert augment.draw((), 3, 8, engine.generator(0), shift=0.25, cut=0.5) == {}


def test_neutral_colour_changes_nothing_and_saturation_0_is_grey():
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(augment.recolor(images, torch.tensor([[0.5, 0.5, 0.5]] * 2)), images)
    grey = augment.recolor(images, torch.tensor([[0.5, 0.0, 0.5]] * 2))
    torch.testing.assert_close(grey[:, 0], grey[:, 1])


def test_augmentation_is_differentiable():
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    amounts = augment.draw(augment.POLICIES, 2, 6, engine.generator(1), shift=0.3, cut=0.5)
    assert torch.autograd.gradcheck(lambda x: augment.augment(x, amounts), images)


def test_real_and_generated_images_are_changed_alike():
    """What happens to an image depends on its amounts alone, not on what else is in the batch."""
    images = torch.rand(6, 3, 8, 8)
    amounts = augment.draw(augment.POLICIES, 6, 8, engine.generator(2), shift=0.3, cut=0.5)
    twice = augment.augment(torch.cat([images, images]), {k: torch.cat([v, v]) for k, v in amounts.items()})
    torch.testing.assert_close(twice[:6], twice[6:], rtol=0, atol=0)
    assert not torch.equal(twice[:6], images)


# ---- the distance ----------------------------------------------------------------------------------------------------


def test_frechet_distance_in_closed_form():
    torch.manual_seed(0)
    root = torch.randn(5, 5, dtype=torch.float64)
    sigma, mean, shift = root @ root.T, torch.randn(5, dtype=torch.float64), torch.arange(5.0, dtype=torch.float64)
    assert abs(metrics.frechet_distance((mean, sigma), (mean, sigma))) < 1e-8
    torch.testing.assert_close(metrics.frechet_distance((mean, sigma), (mean + shift, sigma)), shift.square().sum())
    torch.testing.assert_close(metrics.frechet_distance((mean, sigma), (mean, 4 * sigma)), sigma.trace())  # (2 - 1)^2
    a, b = torch.rand(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    expected = (a.sqrt() - b.sqrt()).square().sum()
    torch.testing.assert_close(metrics.frechet_distance((mean, a.diag()), (mean, b.diag())), expected)


def test_frechet_distance_agrees_with_the_matrix_square_root_of_scipy():
    from scipy.linalg import sqrtm

    torch.manual_seed(1)
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(30, 6, dtype=torch.float64) @ torch.randn(6, 6).double()
    (m, s), (n, t) = ((v.mean(0), torch.cov(v.T)) for v in (x, y))
    expected = (m - n).square().sum() + (s + t).trace() - 2 * np.trace(sqrtm((s @ t).numpy())).real
    torch.testing.assert_close(metrics.frechet_distance((m, s), (n, t)), expected)


def test_moments_are_those_of_all_images_however_they_are_cut():
    torch.manual_seed(2)
    classifier, images = models.Classifier((4, 6), DIGITS).eval(), torch.rand(23, 1, 8, 8)
    judge = metrics.FrechetDistance(images.split(7), cpu(), metrics.features_of(classifier))
    features = classifier.features(images).double()
    torch.testing.assert_close(judge.real, (features.mean(0), torch.cov(features.T)), rtol=1e-6, atol=1e-9)
    assert judge(images.split(5)) < 1e-6 < judge((images + 0.3).split(5))


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception with random weights: the real ones are no part of any package."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason="needs the extra [generation]")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *arguments, **options: {})
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    torch.save(network.state_dict(), path)
    return path


def test_fid_is_the_distance_in_the_features_of_torch_fidelitys_inception(inception_file):
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    whole = metrics.inception(str(inception_file), False, cpu())
    seen = []

    def some(images):
        features = whole(images)[:, ::64]  # of the 2048, since a matrix of all of them takes long
        seen.append(features)
        return features * 1000

    real, fake = (torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=engine.generator(i)) for i in (0, 1))
    found = metrics.FrechetDistance([real], cpu(), some)([data.as_float(fake)])
    assert seen[0].shape == (3, 32)
    statistics = [fid_features_to_statistics(features.double() * 1000) for features in seen]
    assert found == pytest.approx(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID], rel=1e-3)


def test_inception_without_library_or_weights_says_what_to_do(monkeypatch, tmp_path):
    pytest.importorskip("torch_fidelity", reason="needs the extra [generation]: torch-fidelity")
    with pytest.raises(OptionError, match=r"metric\.weights: give .* or metric\.download=true"):
        metrics.inception("", False, cpu())
    with pytest.raises(OptionError, match=r"metric\.weights: there is no file .*nowhere"):
        metrics.inception(str(tmp_path / "nowhere"), False, cpu())
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"no tensors")
    for name in ("other.pth", "damaged.pth"):
        with pytest.raises(runs.RunError, match=rf"cannot read Inception's weights from .*{name}"):
            metrics.inception(str(tmp_path / name), False, cpu())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(runs.RunError, match=r"needs torch-fidelity.*\[generation\]"):
        metrics.inception(str(tmp_path / "other.pth"), False, cpu())


# ---- networks --------------------------------------------------------------------------------------------------------


def test_biggan_has_the_published_sizes():
    """4.3 and 4.2 million parameters, as BigGAN's implementations for CIFAR-10 have at 64 times 4 channels."""
    generator, discriminator = models.make_pair(configured(student__name="biggan", student__latent=128), RGB)
    assert generation.size(generator) == 4_304_387 and generation.size(discriminator) == 4_207_361
    latents, labels = torch.randn(2, 128), torch.tensor([3, 7])
    images = generator(latents, labels)
    assert images.shape == (2, 3, 32, 32) and images.abs().max() <= 1
    features, logits = discriminator(images, labels)
    assert features.shape == (2, 256) and logits.shape == (2,) and features.min() >= 0


def test_biggan_knows_classes_attends_and_takes_other_sizes():
    shape = models.Shape(1, 16, 4)
    generator = biggan.BigGenerator(8, 16, shape, attention=8).eval()
    discriminator = biggan.BigDiscriminator(16, shape, attention=8).eval()
    for module in (generator, discriminator):
        nn.init.ones_(module.attention.gain)
    for name, table in generator.named_parameters():
        if name.endswith("norm1.gain"):
            nn.init.normal_(table)
    latents = torch.randn(1, 8).expand(4, 8)
    images = generator(latents, torch.arange(4))
    assert images.shape == (4, 1, 16, 16) and (images[0] - images[1]).abs().max() > 1e-4
    logits = discriminator(images[:1].expand(4, -1, -1, -1), torch.arange(4)).logits
    assert logits.unique().numel() == 4
    (images.sum() + logits.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in generator.parameters())


@pytest.mark.parametrize("name", ["small", "biggan"])
def test_spectral_norm_holds_every_layer_of_the_discriminator_at_1(name):
    torch.manual_seed(3)
    shape = DIGITS if name == "small" else RGB
    config = configured(student__name=name, discriminator__width=16, student__width=16)
    _, discriminator = models.make_pair(config, shape)
    for _ in range(60):
        discriminator(torch.randn(2, shape.channels, shape.size, shape.size), torch.tensor([0, 1]))
    discriminator.eval()
    layers_ = [m for m in discriminator.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert len(layers_) > 3
    for layer in layers_:
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_conditional_batch_norm_has_the_gain_and_bias_of_each_label():
    norm, plain = biggan.ConditionalBatchNorm(5, 3), nn.BatchNorm2d(5, affine=False)
    with torch.no_grad():
        norm.gain.normal_()
        norm.bias.normal_()
    x, labels = torch.randn(4, 5, 3, 3) * 2 + 1, torch.tensor([2, 0, 2, 1])
    expected = torch.stack([
        image * norm.gain[label].view(-1, 1, 1) + norm.bias[label].view(-1, 1, 1)
        for image, label in zip(plain(x), labels, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(norm(x, labels), expected)


# ---- losses and gradients --------------------------------------------------------------------------------------------


def gan(weight=5.0, images="both", kind="hinge"):
    torch.manual_seed(4)
    config = configured(distill__weight=weight, distill__images=images)
    generator, discriminator = models.make_pair(config, DIGITS)
    encoder = models.Classifier((4, 16), DIGITS).eval().requires_grad_(False)
    loss = generation.projection_of(config, discriminator.num_features, 16, None)
    options = {"kind": kind, "weight": weight, "distilled": images}
    return losses.DistilledGAN(generator, discriminator, loss, teachers.Target(encoder), **options)


def batch(size=6):
    amounts = augment.draw(("translation",), 2 * size, 8, engine.generator(5), shift=0.125, cut=0.5)
    labels = torch.arange(size) % 10
    return losses.Batch(torch.rand(size, 1, 8, 8), labels, torch.randn(size, 32), labels, amounts)


def gradients(module):
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def test_feature_loss_trains_discriminator_and_projection_and_nothing_of_the_generator():
    model = gan()
    found = model(batch())
    torch.testing.assert_close(found["total"], found["discriminator"] + 5 * found["features"])
    found["features"].backward()
    assert len(gradients(model.discriminator)) >= 6 and not any("head" in n for n in gradients(model.discriminator))
    assert list(gradients(model.feature_loss)) == ["projection.unconstrained"]
    assert not gradients(model.generator)


def test_generator_learns_through_the_discriminator_alone():
    model = gan()
    model.discriminator.requires_grad_(False)
    b = batch()
    amounts = {name: amount[:6] for name, amount in b.amounts.items()}
    found = model(losses.GeneratorBatch(b.latents, b.labels, amounts))
    assert set(found) == {"generator"}
    found["generator"].backward()
    assert not gradients(model.discriminator) and not gradients(model.feature_loss)
    assert len(gradients(model.generator)) > 5


def test_only_real_images_are_distilled_on_request():
    b = batch()
    other = losses.Batch(b.real, b.labels, b.latents + 1, b.fake_labels, b.amounts)
    for images, same in (("real", True), ("both", False)):
        one, two = (gan(images=images)(x)["features"] for x in (b, other))
        assert torch.equal(one, two) == same


def test_adversarial_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert losses.adversarial("hinge", real, fake).item() == pytest.approx(0.5 / 2 + 1 / 2)
    expected = -torch.sigmoid(real).log().mean() - (1 - torch.sigmoid(fake)).log().mean()
    torch.testing.assert_close(losses.adversarial("non_saturating", real, fake), expected)


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_whitening_statistics_are_those_of_the_pool_and_whiten_it():
    config = configured()
    images, fabric = data.open_images(config.data, 0), cpu()
    encoder = models.Classifier((8, 16), images.shape).eval().requires_grad_(False)
    state = teachers.measure(encoder, images, "pool", fabric)
    features = encoder.features(images.pool).double()
    torch.testing.assert_close(state["running_mean"], features.mean(0))
    torch.testing.assert_close(state["running_covariance"], torch.cov(features.T, correction=0), rtol=1e-5, atol=1e-9)
    of_gan = teachers.measure(encoder, images, "gan", fabric)["running_mean"]
    torch.testing.assert_close(of_gan, encoder.features(images.pool[images.seen]).double().mean(0))


def test_targets_are_white_over_the_pool_also_of_batches_smaller_than_their_width(tmp_path):
    config = configured(distill__eps=1e-9)
    images, fabric = data.open_images(config.data, 0), cpu()
    encoder = models.Classifier((8, 16), images.shape).eval().requires_grad_(False)
    runs.save_safetensors(tmp_path / "statistics.safetensors", teachers.measure(encoder, images, "pool", fabric))
    target = teachers.make_target(config, encoder, tmp_path, fabric)
    found = torch.cat([target(part) for part in images.pool.split(5)])
    torch.testing.assert_close(torch.cov(found.T, correction=0), torch.eye(16), atol=0.02, rtol=0)
    torch.testing.assert_close(found.mean(0), torch.zeros(16), atol=1e-3, rtol=0)
    raw = teachers.make_target(configured(distill__normalization="layer_norm"), encoder, tmp_path, fabric)
    assert torch.equal(raw(images.pool[:5]), encoder.features(images.pool[:5]))


def test_encoder_enlarges_repeats_grey_and_normalises():
    class Seen(nn.Module):
        def forward(self, images):
            self.images = images
            return images.mean((2, 3))

    network = Seen()
    encoder = teachers.Encoder(network, 3, 4, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    encoder.features(torch.tensor([[[[-1.0, 1.0], [0.0, 1.0]]]]))
    assert network.images.shape == (1, 3, 4, 4)
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0]])  # two pixels of the first row, each twice
    for channel, (mean, std) in enumerate(((0.5, 0.5), (0.25, 1.0), (0.0, 2.0))):
        torch.testing.assert_close(network.images[0, channel, :1], (expected - mean) / std)


def test_clip_of_transformers_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra [generation]: transformers")
    options = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**options, image_size=16, patch_size=8, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    encoder = teachers.make_encoder(configured(teacher__name="clip", teacher__weights=str(tmp_path)).teacher, RGB)
    assert encoder.size == 16 and encoder.num_features == 12
    assert encoder.features(torch.rand(2, 3, 32, 32)).shape == (2, 12)
    assert not any(p.requires_grad for p in encoder.parameters())
    with pytest.raises(runs.RunError, match=r"teacher\.weights: cannot read CLIP from .*empty"):
        (tmp_path / "empty").mkdir()
        teachers.make_encoder(configured(teacher__name="clip", teacher__weights=str(tmp_path / "empty")).teacher, RGB)


def test_teacher_of_timm_by_name_with_local_weights(tmp_path):
    timm = pytest.importorskip("timm", reason="needs the extra [generation]: timm")
    torch.manual_seed(5)
    state = timm.create_model("resnet10t", num_classes=0).state_dict()
    runs.save_safetensors(tmp_path / "weights.safetensors", state | {"fc.weight": torch.zeros(3, 512)})

    def made(**options):
        return teachers.make_encoder(configured(**{"teacher__name": "resnet10t", **options}).teacher, RGB)

    encoder = made(teacher__weights=str(tmp_path / "weights.safetensors"), teacher__size=32)
    assert encoder.num_features == 512 and encoder.size == 32
    torch.testing.assert_close(encoder.network.state_dict()["bn1.weight"], state["bn1.weight"])
    with pytest.raises(OptionError, match=r"teacher\.weights: give a \.safetensors or \.pth file"):
        made()
    with pytest.raises(OptionError, match=r"teacher\.weights: there is no file"):
        made(teacher__weights="nowhere.pth")
    with pytest.raises(OptionError, match=r"teacher\.name: unknown 'resnet10x'; nearest: .*resnet10t"):
        made(teacher__name="resnet10x")
    runs.save_safetensors(tmp_path / "other.safetensors", {"fc.weight": torch.zeros(3, 512)})
    with pytest.raises(runs.RunError, match="of another architecture"):
        made(teacher__weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "damaged.safetensors").write_bytes(b"not tensors")
    with pytest.raises(runs.RunError, match="cannot read tensors"):
        made(teacher__weights=str(tmp_path / "damaged.safetensors"))


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_run_leaves_samples_curve_and_numbers(finished):
    result = runs.load_json(finished / "result.json")
    assert [e["step"] for e in result["evaluations"]] == [4, 8] and result["frechet"] > 0
    assert result["diagnostics"]["max |PᵀP - I|"] < 1e-5
    lines = runs.load_json_lines(finished / "metrics.jsonl")
    names = {"train/discriminator", "train/features", "train/generator", "lr/generator", "lr/discriminator"}
    assert names <= lines[0].keys()
    picture = finished / "figures" / "samples-000008.png"
    from PIL import Image

    with Image.open(picture) as image:
        assert image.size == (10 * 34, 8 * 34)  # 32 pixels and a frame each
    teacher = runs.load_json(finished.parents[1] / "teacher" / "seed-00" / "done.json")
    assert {"accuracy", "judge_accuracy", "distance_of_the_training_images"} <= teacher.keys()


@pytest.mark.parametrize("stop_at", [3, 5])  # on a checkpoint of save_every, and between two
def test_stopped_and_continued_gives_the_same_bits(finished, tmp_path, stop_at):
    with pytest.raises(runs.Interrupted):
        train(configured(), tmp_path, worker=Asked(stop_at))
    assert (compare.arm_folder(tmp_path, "vkd", 0) / "checkpoint.pt").exists()
    again = train(configured(), tmp_path)
    a, b = (runs.load_safetensors(folder / "student.safetensors") for folder in (finished, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    one, two = (runs.load_json(folder / "result.json")["evaluations"] for folder in (finished, again))
    assert one == two
    for name in ("samples-000008.png",):
        assert (finished / "figures" / name).read_bytes() == (again / "figures" / name).read_bytes()


def test_arms_start_alike_and_only_distil_where_they_should(finished, tmp_path):
    def built(arm):
        root = finished.parents[1]
        config = generation.ARMS[arm].apply(configured())
        context = engine.Context(cpu(config), tmp_path / arm, 0, Asked())
        engine.seed_all(0)
        return generation.build(config, 0, compare.teacher_folder(root, 0), context)

    alone, linear, vkd = (built(arm) for arm in ("alone", "linear", "vkd"))
    assert alone.model.feature_loss is None and "OrthoProjLoss" in repr(vkd.model.feature_loss)
    assert isinstance(linear.model.feature_loss.projection, nn.Linear)
    for name, tensor in alone.student.state_dict().items():
        assert torch.equal(tensor, vkd.student.state_dict()[name])
    (one, _), (two, _) = next(alone.batches(3)), next(vkd.batches(3))
    assert torch.equal(one[0].real, two[0].real) and torch.equal(one[0].latents, two[0].latents)
    trained = {id(p) for o in vkd.optimizers().values() for g in o.param_groups for p in g["params"]}
    assert trained == {id(p) for p in vkd.model.parameters()}


def test_evaluate_measures_the_stored_generator_again(finished):
    assert evaluate.measure(finished, [])["frechet"] == runs.load_json(finished / "result.json")["frechet"]
    training, _ = evaluate.rebuild(finished, [])
    assert training.student(*training.example()).shape == (2, 1, 8, 8)


def test_two_ranks_give_the_result_of_one(finished, tmp_path):
    """The same run by torchrun: batch norm over both ranks' images, both networks' gradients reduced."""
    values = [f"{key}={configs.show(value)}" for key, value in TINY.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    command += ["vkd_kernels.cli", "distill", "generation", "--arms", "vkd", "--seeds", "1"]
    command += ["--output", str(tmp_path / "run"), *values]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = processes.run(command, env=environment, seconds=300)
    assert process.returncode == 0, process.stderr
    two, one = (runs.load_json(f / "result.json") for f in (tmp_path / "run" / "vkd" / "seed-00", finished))
    assert two["frechet"] == pytest.approx(one["frechet"], rel=1e-3)
    a, b = (runs.load_safetensors(f / "student.safetensors") for f in (tmp_path / "run" / "vkd" / "seed-00", finished))
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=1e-2, atol=1e-3)
    assert "V_kD" in (tmp_path / "run" / "table.txt").read_text()


# ---- the paper's configuration ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of random pictures, 12 to train and 4 to compare with."""
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 2)):
        for kind in ("cats", "dogs"):
            (root / split / kind).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)).save(
                    root / split / kind / f"{i}.png"
                )
    return root


def test_one_step_of_the_papers_configuration(folder, tmp_path):
    """Whole BigGAN, CLIP ViT-B/32 at 224x224 with random weights, four discriminator steps; two images at a time."""
    pytest.importorskip("timm", reason="needs the extra [generation]: timm")
    values = ["data.name=folder", f"data.root={folder}", "data.fraction=1", "teacher.weights=random"]
    values += ["teacher.widths=8", "teacher.steps=1", "teacher.batch_size=4", "metric.features=classifier"]
    values += [
        "metric.samples=4",
        "optim.steps=1",
        "optim.batch_size=2",
        "run.accelerator=cpu",
        "run.tensorboard=false",
    ]
    experiment = compare.resolve(
        compare.DISTILL, "generation", "vkd-biggan-cifar10-10pct", None, values, None, None, None, None
    )
    config = experiment.config
    assert config.optim.discriminator_steps == 4 and config.optim.loss == "hinge" and config.optim.lr == 2e-4
    assert config.distill.normalization == "whiten" and config.augment.policy == ("translation", "cutout")
    arm = train(config, tmp_path)
    lines = runs.load_json_lines(arm / "metrics.jsonl")
    assert all(np.isfinite(lines[0][f"train/{name}"]) for name in ("discriminator", "features", "generator"))
    assert runs.load_json(arm / "result.json")["diagnostics"]["max |PᵀP - I|"] < 1e-5


@pytest.mark.parametrize("name", ["vkd-biggan-cifar10-10pct", "vkd-biggan-cifar100-20pct"])
def test_recipes_are_described_without_data(name):
    pytest.importorskip("timm", reason="needs the extra [generation]: timm")
    assert name in tasks.recipes("generation")
    experiment = compare.resolve(compare.DISTILL, "generation", name, None, [], None, None, None, None)
    found = generation.describe(experiment.config)
    assert found["teacher"]["features"] == 512 and found["teacher"]["images enlarged to"] == 224
    assert found["projection (teacher, discriminator)"] == [512, 256] and found["discriminator steps per step"] == 4
    assert found["classes"] == (100 if "100" in name else 10)


# ---- data and errors -------------------------------------------------------------------------------------------------


def test_split_is_the_seeds_and_the_gan_sees_its_share_of_every_class():
    config = configured()
    one, again, other = (data.open_images(config.data, seed) for seed in (0, 0, 1))
    assert torch.equal(one.seen, again.seen) and not torch.equal(one.pool, other.pool)
    assert len(one.pool) == 1000 and len(one.held_out) == 797 and one.pool.min() == -1 and one.pool.max() == 1
    counts, all_ = (torch.bincount(labels, minlength=10) for labels in (one.pool_labels[one.seen], one.pool_labels))
    assert (counts - config.data.fraction * all_).abs().max() <= 0.5


def test_folder_of_images(folder):
    config = configured(data__name="folder", data__root=str(folder), data__size=16, data__fraction=1.0)
    images = data.open_images(config.data, 0)
    assert images.pool.shape == (12, 3, 16, 16) and images.held_out.shape == (4, 3, 16, 16)
    assert images.pool.dtype == torch.uint8 and images.shape == (3, 16, 2) == data.shape_of(config.data)
    assert torch.equal(data.as_bytes(data.as_float(images.pool)), images.pool)


def test_cifar_from_a_local_folder(tmp_path):
    torchvision = pytest.importorskip("torchvision", reason="needs the extra [generation]: torchvision")
    config = configured(data__name="cifar10", data__root=str(tmp_path)).data
    with pytest.raises(runs.RunError, match=r"data\.root: cannot read cifar10 .*data\.download=true fetches them"):
        data.open_images(config, 0)
    fake = type("Fake", (), {"data": np.zeros((20, 32, 32, 3), np.uint8), "targets": [i % 10 for i in range(20)]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: fake)
        images = data.open_images(config, 0)
    assert images.shape == (3, 32, 10) and len(images.seen) == 10  # at least one of each class


def test_unreadable_images_are_counted_and_an_empty_class_is_an_error(folder, tmp_path, capsys):
    import shutil

    root = tmp_path / "images"
    shutil.copytree(folder, root)
    broken = sorted((root / "train" / "cats").iterdir())
    broken[0].write_bytes(broken[0].read_bytes()[:40])
    config = configured(data__name="folder", data__root=str(root), data__size=16)
    assert len(data.open_images(config.data, 0).pool) == 11
    assert f"warning: cannot read {broken[0]}" in (warned := capsys.readouterr().err) and "1 so far" in warned
    for path in broken:
        path.write_bytes(b"")
    with pytest.raises(runs.RunError, match="no image of the class 'cats' can be read"):
        data.open_images(config.data, 0)
    for path in broken:
        path.unlink()
    with pytest.raises(runs.RunError, match="cats"):
        data.open_images(config.data, 0)
    shutil.rmtree(root / "test" / "dogs")
    with pytest.raises(runs.RunError, match="cats|different classes"):
        data.open_images(config.data, 0)
    with pytest.raises(OptionError, match=r"data\.root: there is no folder 'nowhere'"):
        data.open_images(configured(data__name="folder", data__root="nowhere").data, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"augment__policy": ("color",)}, r"augment\.policy: color is for images of three channels"),
        ({"augment__policy": ("shear",)}, r"augment\.policy: must be one of translation, cutout, color"),
        ({"metric__features": "inception"}, r"metric\.features: inception needs images of three channels"),
        ({"optim__clip_norm": 1.0}, r"optim\.clip_norm"),
        ({"data__fraction": 0.0}, r"data\.fraction: must be above 0"),
    ],
)
def test_configurations_that_cannot_be_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        configured(**values)


@pytest.mark.parametrize(
    ("values", "shape", "message"),
    [
        ({"student__widths": (8, 8)}, DIGITS, r"student\.widths: the small generator has three, got 2"),
        ({"discriminator__widths": (8, 8, 8, 8)}, DIGITS, r"data\.size: must be a multiple of 4, and at least 16"),
        ({"student__name": "biggan"}, DIGITS, r"data\.size: biggan makes images of 16, 32, 64, .* got 8"),
        (
            {"student__name": "biggan", "student__attention": 12},
            RGB,
            r"student\.attention: must be 0 or one of \[8, 16\]",
        ),
    ],
)
def test_networks_that_do_not_fit_the_images_are_refused(values, shape, message):
    with pytest.raises(OptionError, match=message):
        models.make_pair(configured(**values), shape)


def test_a_learned_scale_is_for_the_orthogonal_projection():
    with pytest.raises(OptionError, match=r"distill\.scale: learned goes with distill\.projection=orthogonal"):
        generation.projection_of(configured(distill__scale="learned", distill__projection="linear"), 4, 8, None)
    fixed = generation.projection_of(configured(distill__projection="none", distill__scale="match"), 4, 16, None)
    assert not list(fixed.parameters()) and torch.equal(fixed.projection.weight, torch.eye(16, 4))
    assert fixed.options["scale"] == 2.0


def test_loop_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    discriminator = biggan.BigDiscriminator(256, models.Shape(3, 16, 2))
    names = {"training_features": torch.randn(600, 512), "discriminator": discriminator, "weight": 1.0}
    names |= {"teacher": lambda images: images.mean((2, 3)).repeat(1, 171)[:, :512], "labels": torch.tensor([0, 1])}
    exec(code + "\nloss.backward()", names | {"images": torch.randn(2, 3, 16, 16)})
    assert len(gradients(discriminator)) > 5
