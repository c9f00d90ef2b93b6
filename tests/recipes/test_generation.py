"""Generation: the bundled run, networks, augmentation, whitening, the distance, the recipes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.recipes import setups
from vkd_kernels.recipes import config as configs
from vkd_kernels.recipes import engine, gan, pictures, runs
from vkd_kernels.recipes.config import OptionError
from vkd_kernels.recipes.generation import DistilledGAN, Generation
from vkd_kernels.recipes.models import Shape
from vkd_kernels.recipes.runs import RunError

ROOT = Path(__file__).parents[2]
TINY = setups.TINY["generation"]
configured = partial(setups.configured, "generation")
recipe = partial(setups.recipe, "generation")
job = partial(setups.job, "generation")


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """The folder of a trained teacher and judge, and the configuration."""
    config, folder = configured(*TINY, "distill.eps=1e-9"), tmp_path_factory.mktemp("teacher")
    job(config, folder).train_teacher()
    return config, folder


# ---- augmentation ----------------------------------------------------------------------------------------------------


def test_translation_by_nothing_changes_nothing_and_by_a_pixel_moves_by_one():
    x = torch.randn(2, 3, 5, 6)
    assert torch.equal(gan.translate(x, torch.zeros(2, 2, dtype=torch.long), 0.5), x)
    moved = gan.translate(x, torch.tensor([[1, 0], [0, -2]]), 0.5)
    assert torch.equal(moved[0, :, 1:], x[0, :, :-1]) and (moved[0, :, 0] == 0.5).all()
    assert torch.equal(moved[1, :, :, :-2], x[1, :, :, 2:]) and (moved[1, :, :, -2:] == 0.5).all()


def test_cutout_blanks_its_square_alone():
    x = torch.randn(1, 1, 6, 6)
    cut = gan.cut_out(x, torch.tensor([[-1, 3]]), 3, 0.5)
    assert (cut[0, 0, :2, 3:] == 0.5).all()
    cut[0, 0, :2, 3:] = x[0, 0, :2, 3:]
    assert torch.equal(cut, x)


def test_augmentation_keeps_its_limits_reaches_them_and_has_a_gradient():
    torch.manual_seed(0)
    x = torch.zeros(2000, 1, 32, 32)
    x[:, :, 16, 16] = 1.0
    moved = gan.diff_augment(x, ("translation",), -1) > 0
    rows, columns = moved.nonzero()[:, 2:].unbind(1)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (12, 20, 12, 20)
    blank = (gan.diff_augment(x + 1, ("cutout",), -1) == -1).flatten(1).sum(1)
    assert blank.max() == 16**2 and blank.min() == 8**2
    x = torch.randn(200, 1, 8, 8, requires_grad=True)
    gan.diff_augment(x, ("translation", "cutout"), 0).sum().backward()
    assert x.grad is not None and set(x.grad.unique().tolist()) <= {0.0, 1.0, 2.0}


def test_real_images_are_mirrored_as_often_as_asked_and_the_rows_stay_the_same(tmp_path):
    plain, some, every = (next(job(configured(augment__flip=p), tmp_path).batches(3)) for p in (0, 0.5, 1))
    (x, labels), (half, labels_of_half), (mirrored, _) = plain[0], some[0], every[0]
    assert torch.equal(mirrored, x.flip(3)) and torch.equal(labels, labels_of_half)
    as_they_were, turned = ((half == y).flatten(1).all(1) for y in (x, mirrored))
    assert (as_they_were | turned).all() and 5 < turned.sum() < 27


def test_the_background_reaches_real_and_generated_images():
    model, (real, labels) = tiny_gan("augment.policy=cutout", "augment.background=0.25")
    seen = []
    model.discriminator.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(real, labels, count=6)
    model(count=6)
    assert all(((images == 0.25).flatten(1).sum(1) >= 4).all() for images in seen) and len(seen) == 2


# ---- networks and losses ---------------------------------------------------------------------------------------------


def test_biggan_has_the_published_sizes_and_knows_classes():
    shape = Shape(10, 32, 3)
    networks = (gan.Generator(128, 256, shape), gan.Discriminator(256, shape))
    assert [sum(p.numel() for p in m.parameters()) for m in networks] == pytest.approx([4.3e6, 4.2e6], rel=0.03)
    shape = Shape(4, 64, 3)
    generator, discriminator = gan.Generator(8, 16, shape).eval(), gan.Discriminator(16, shape).eval()
    images = generator(torch.randn(2, 8), torch.tensor([0, 3]))
    assert images.shape == (2, 3, 64, 64) and images.abs().max() <= 1
    with torch.no_grad():
        generator.blocks[0].norm1.gain[3] = 5.0
    z = torch.randn(1, 8)
    assert not torch.allclose(generator(z, torch.tensor([0])), generator(z, torch.tensor([3])))
    verdicts = [discriminator(images, torch.full((2,), label)).logits for label in (0, 1)]
    assert not torch.allclose(*verdicts)


def test_spectral_norm_holds_every_layer_of_the_discriminator_at_1():
    model = gan.Discriminator(8, Shape(4, 32, 3))
    for _ in range(30):
        model(torch.randn(2, 3, 32, 32), torch.zeros(2, dtype=torch.long))
    layers = [m for m in model.eval().modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    assert len(layers) > 2
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_spectral_norm_of_the_stored_average_is_1_and_evaluations_change_nothing(tmp_path):
    """Of its own weights, whose singular vectors are not the averages of those of the steps."""
    stored = []
    for every in (1, 0):
        config = configured(*TINY, "distill.weight=0", "optim.lr=0.01", f"run.eval_every={every}")
        job(config, tmp_path / f"{every}").train_teacher()
        training = job(config, tmp_path / f"{every}")
        engine.train(training)
        stored.append(runs.load_weights(tmp_path / f"{every}" / "student.safetensors"))
    assert stored[0].keys() == stored[1].keys() and all(torch.equal(stored[1][k], v) for k, v in stored[0].items())
    average = training.make_student().eval()
    average.load_state_dict(stored[0])
    layers = [m for m in average.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = torch.stack([torch.linalg.matrix_norm(layer.weight.flatten(1), 2) for layer in layers])
    assert len(norms) > 4
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-4, rtol=0)


def tiny_gan(*words):
    config, shape = configured(*TINY, *words), Shape(10, 8, 1)
    networks = gan.Generator(32, 8, shape), gan.Discriminator(8, shape)

    def teacher(images):
        return images.flatten(1)[:, :12] * 2

    model = DistilledGAN(config, shape, *networks, teacher, teacher_dim=12, normalization="none")
    return model, (torch.randn(6, 1, 8, 8), torch.arange(6))


def test_feature_loss_trains_discriminator_and_projection_and_nothing_of_the_generator():
    model, real = tiny_gan()
    seen = []
    model.feature_loss.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    losses = model(*real, count=6)
    losses["total"].backward()
    assert seen == [12], "real and generated images"
    torch.testing.assert_close(losses["total"], losses["discriminator"] + 5 * losses["features"])
    assert all(p.grad is None for p in model.generator.parameters())
    assert all(p.grad is not None for m in (model.discriminator, model.feature_loss) for p in m.parameters())
    model.zero_grad()
    model.discriminator.requires_grad_(False)
    model(count=6)["generator"].backward()
    assert all(p.grad is not None for p in model.generator.parameters())
    assert all(p.grad is None for m in (model.discriminator, model.feature_loss) for p in m.parameters())


def test_the_adversarial_loss_is_the_hinge():
    model, (images, labels) = tiny_gan()
    model.feature_loss = None
    logits = torch.tensor([2.0, 0.5, -3.0, 0.5])  # of two real images and two generated ones
    model.discriminator.forward = lambda *_: gan.Verdict(torch.zeros(4, 8), logits)
    assert float(model(images[:2], labels[:2], count=2)["total"]) == pytest.approx(0.25 + 0.75)


def test_weight_decay_spares_what_it_spares_in_every_task(tmp_path):
    training = job(configured(*TINY, "optim.weight_decay=0.3"), tmp_path)
    training.model, _ = tiny_gan()
    decayed = [
        parameter
        for optimizer in training.optimizers().values()
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    ]
    m = training.model
    named = [x for part in (m.generator, m.discriminator) for x in part.named_parameters()]
    expected = [parameter for name, parameter in named if name.endswith("weight.original")]  # of spectral norm
    assert {*map(id, decayed)} == {*map(id, expected)} and len(decayed) == len(expected) > 4


def test_pictures_that_cannot_be_written_are_named(tmp_path):
    training = job(configured(*TINY), tmp_path)
    (tmp_path / "figures").write_text("no folder")
    with torch.no_grad(), pytest.raises(RunError, match=r"cannot write .*samples\.png"):
        training.pictures(training.make_student(), tmp_path / "figures")


# ---- the teacher, its whitening, and the distance --------------------------------------------------------------------


def test_targets_are_white_over_the_pool_also_of_batches_smaller_than_their_width(taught):
    training = job(*taught)
    with torch.no_grad():
        whole = training.target()(gan.as_float(training.data.pool))
        part = training.target()(gan.as_float(training.data.pool[:3]))
    torch.testing.assert_close(part, whole[:3], atol=1e-4, rtol=1e-4)
    alive = whole.T.cov().diagonal() > 0.5  # a dead channel of the teacher cannot be whitened
    torch.testing.assert_close(whole.T.cov()[alive][:, alive], torch.eye(int(alive.sum())), atol=0.05, rtol=0)


@pytest.mark.parametrize("other", ["distill.method=cholesky", "distill.statistics=gan", "distill.eps=0.5"])
def test_an_arm_that_whitens_otherwise_than_its_run_has_targets_of_its_own(other, taught, tmp_path):
    config, folder = taught
    key, value = other.split("=")
    arm = job(configs.replace(config, {key: value}), tmp_path, teacher=folder)
    images, measured = gan.as_float(arm.data.pool[:3]), arm.measured_whitening()
    with torch.no_grad():
        targets, of_the_run = (training.target()(images) for training in (arm, job(config, folder)))
        expected = arm.encoder(images) @ measured["matrix"] + measured["shift"]
    torch.testing.assert_close(targets, expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(targets, of_the_run, atol=0.01)
    of_another_teacher = job(configs.replace(config, {"teacher.features": "head"}), folder)
    assert of_another_teacher.whitening != job(config, folder).whitening


def test_encoder_enlarges_repeats_gray_and_normalizes():
    seen = []
    about = {"input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    encoder = pictures.Encoder(nn.Module(), 3, about)
    encoder.network.forward = lambda x: seen.append(x) or x.mean((2, 3))
    encoder(torch.tensor([[[[1.0, -1.0], [0.0, 0.0]]]]))
    assert seen[0].shape == (1, 3, 16, 16) and seen[0][0, 0, 0].tolist() == [2.0] * 8 + [-2.0] * 8
    assert torch.equal(seen[0][0, 0], seen[0][0, 2])


def test_teacher_of_timm_by_name_with_local_weights(tmp_path):
    import timm

    network = timm.create_model("resnet10t", num_classes=0)
    runs.save_safetensors(tmp_path / "w.safetensors", network.state_dict() | {"head": torch.zeros(1)})
    words = {"teacher__name": "resnet10t", "teacher__weights": str(tmp_path / "w.safetensors")}
    config = configured(**words, teacher__pretrained=True).teacher  # nothing is downloaded
    encoder = pictures.make_encoder(config, Shape(10, 32, 3), tmp_path)
    assert encoder.num_features == 512 and encoder(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    runs.save_safetensors(tmp_path / "w.safetensors", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(RunError, match=r"teacher\.weights: .*another architecture"):
        pictures.make_encoder(config, Shape(10, 32, 3), tmp_path)


def test_a_classifier_that_diverges_is_an_error():
    images, labels = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 2
    config = configured(teacher__lr=1e38, teacher__steps=5).teacher
    with pytest.raises(RunError, match=r"classifier of seed 3 are not finite; lower teacher\.lr"):
        pictures.train_classifier(config, 3, ((images, labels), (images, labels), Shape(2, 8, 1)), "cpu")


def test_distance_agrees_with_the_matrix_square_root_of_scipy(taught):
    from scipy import linalg

    training = job(*taught)
    generated = torch.rand(50, 1, 8, 8) * 2 - 1
    distance = training.distance(generated.split(20))
    assert distance == pytest.approx(training.distance(generated.split(7)), rel=1e-6)
    features = [training.judge.inception(gan.as_float(x)).numpy() for x in (training.data.held_out, generated)]
    (a, ca), (b, cb) = ((f.mean(0), torch.from_numpy(f).T.cov().numpy()) for f in features)
    root = linalg.sqrtm(ca @ cb).real
    assert distance == pytest.approx(((a - b) ** 2).sum() + (ca + cb - 2 * root).trace(), rel=1e-4, abs=1e-4)


def test_inception_without_weights_or_with_more_than_tensors_is_an_error(tmp_path):
    config = {"data__name": "CIFAR10", "data__channels": 3, "metric__features": "inception"}
    with pytest.raises(OptionError, match=r"metric\.weights: give torch-fidelity's file .*or metric\.download=true"):
        Generation.check(configured(**config))
    torch.save({"x": tmp_path}, tmp_path / "bad.pth")  # a pickle of another class
    with pytest.raises(RunError, match=r"metric\.weights: cannot read tensors from .*bad\.pth"):
        _ = job(configured(**config, metric__weights=str(tmp_path / "bad.pth")), tmp_path).judge


# ---- images ----------------------------------------------------------------------------------------------------------


def test_split_is_the_seeds_and_the_gan_sees_its_share_of_every_class():
    a, b = (pictures.Pictures(configured().data, seed) for seed in (0, 1))
    assert a.pool.shape[1:] == (1, 8, 8) and a.pool.dtype == torch.uint8 and a.pool.max() == 255
    assert len(a.pool) == 1000 and len(a.held_out) == 797 and not torch.equal(a.pool, b.pool)
    share = torch.bincount(a.labels[a.seen]).float() / torch.bincount(a.labels)
    assert (share - 0.1).abs().max() < 0.01 and len({*a.seen.tolist()}) == len(a.seen)


def test_a_folder_of_images(folder):
    values = {"data__name": "folder", "data__root": str(folder), "data__size": 16, "data__channels": 3}
    data = configured(**values, data__fraction=1).data
    data = pictures.Pictures(data, 0)
    assert data.pool.shape == (12, 3, 16, 16) and data.pool.dtype == torch.uint8 and data.shape == Shape(2, 16, 3)


# ---- recipes and documentation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "classes", "fraction"), [("vkd-biggan-cifar10-10pct", 10, 0.1), ("vkd-biggan-cifar100-20pct", 100, 0.2)]
)
def test_recipes_have_the_published_values(name, classes, fraction):
    values = configs.flatten(recipe(name))
    expected = {"data.classes": classes, "data.fraction": fraction, "optim.lr": 2e-4}
    expected |= {"augment.policy": ("translation", "cutout"), "augment.background": 0.0, "augment.flip": 0.5}
    expected |= {"optim.ema": 0.9999, "optim.ema_start": 1000}
    expected |= {"optim.discriminator_steps": 4, "optim.batch_size": 50, "distill.method": "cholesky"}
    expected |= {"teacher.name": "vit_base_patch32_clip_quickgelu_224.openai"}
    expected |= {"distill.weight": 20.0, "student.width": 256}
    assert {key: values[key] for key in expected} == expected


def test_one_step_of_the_papers_configuration(tmp_path, monkeypatch):
    """At full size with CLIP's architecture, on random images, measured by a small network in Inception's place."""
    config = recipe(
        "vkd-biggan-cifar100-20pct",
        **{"metric__features": "classifier", "teacher__widths": "4,8", "teacher__steps": 1, "metric__samples": 8},
        **{"optim__steps": 1, "optim__batch_size": 4, "optim__discriminator_steps": 2, "optim__ema_start": 0},
        run__accelerator="cpu",
    )
    data = pictures.Pictures.__new__(pictures.Pictures)
    data.pool, data.held_out = (torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8) for n in (12, 8))
    data.labels, data.seen, data.shape = torch.arange(12), torch.arange(12), Shape(100, 32, 3)
    data.parts = (data.pool, data.labels), (data.held_out, torch.arange(8))
    monkeypatch.setattr(Generation, "data", data)
    job(config, tmp_path / "teacher").train_teacher()
    training = job(config, tmp_path / "run", teacher=tmp_path / "teacher")
    result = engine.train(training)
    assert result["frechet"] > 0 and result["diagnostics"]["max |PᵀP - I|"] < 1e-5
    assert training.model.feature_loss.projection.weight.shape == (512, 256)
