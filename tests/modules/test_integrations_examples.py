"""The examples of examples/: their classes on other data, and each file as a user starts it."""

import copy
import runpy
import sys

import pytest
import torch

from tests.helpers.stacks import EXAMPLES, assert_same, example, images, needs, orthogonality_error
from tests.modules.test_integrations_huggingface import gradients_of_a_step, trainer_of

NEEDS = {  # the libraries beyond torch that each imports
    "accelerate_loop": ("transformers", "accelerate"),
    "causal_lm": ("transformers", "accelerate"),
    "ddp_loop": ("timm",),
    "dense": ("timm", "torchvision"),
    "detector_neck": ("torchvision",),
    "embedding_model": ("sentence_transformers", "datasets"),
    "huggingface_trainer": ("transformers", "accelerate"),
    "lightning_module": ("lightning", "torchvision"),
    "several_teachers": ("timm", "torchvision"),
    "timm_loop": ("timm",),
}
RANDOM = {
    "causal_lm",
    "dense",
    "detector_neck",
    "embedding_model",
    "several_teachers",
}  # which else load pretrained weights


def test_example_timm_loop():
    timm = needs("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    teacher = timm.create_model("regnetx_002", num_classes=0)
    before = [p.clone() for p in teacher.state_dict().values()]
    losses = example("timm_loop").train(student, teacher, [images()] * 8, lr=2e-3)
    assert losses[-1] < 0.9 * losses[0]
    assert_same(teacher.state_dict().values(), before, rtol=0, atol=0)


def test_the_timm_loop_trains_a_student_that_was_evaluated_before():
    timm = needs("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10).eval()
    modes = []
    student.blocks[0].register_forward_pre_hook(lambda module, args: modes.append(module.training))
    example("timm_loop").train(student, timm.create_model("regnetx_002", num_classes=0), [images()])
    assert modes == [True]


def the_ddp_loops_student_and_teacher():
    timm = needs("timm")
    torch.manual_seed(0)
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    return example("ddp_loop").Distilled(student, 368), timm.create_model("regnetx_002", num_classes=0).eval()


def test_the_ddp_loops_last_group_of_an_epoch_has_fewer_micro_batches():
    """It takes the steps of larger batches: here of four micro-batches and of one and a half."""
    model, teacher = the_ddp_loops_student_and_teacher()
    data = [torch.randn(11, 3, 32, 32), torch.randint(10, (11,))]
    weights = []
    for size, accumulate in ((8, 1), (2, 4)):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        loader = list(zip(*(part.split(size) for part in data), strict=True))
        losses = example("ddp_loop").train(trained, teacher, optimizer, loader, accumulate=accumulate)
        assert len(losses) == len(loader) and all(p.grad is None for p in trained.parameters())
        weights.append([p.detach() for p in trained.parameters()])
    assert_same(*weights, rtol=1e-4, atol=1e-5)


def test_the_ddp_loops_accuracy_is_that_of_all_images():
    accuracy = example("ddp_loop").accuracy
    scores = torch.eye(4)[[0, 1, 2, 3, 0]]
    loader = [(scores[:4], torch.tensor([0, 1, 2, 3])), (scores[4:], torch.tensor([1]))]
    assert accuracy(torch.nn.Identity(), loader) == pytest.approx(0.8)


def test_timm_loops_spare_what_the_student_says(monkeypatch):
    """Its class token and positions do not decay, nor does the projection; its weights do."""
    timm = needs("timm")
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=10)
    groups = [example("ddp_loop").Distilled(student, 368).parameter_groups(0.05)]
    make = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda params, lr: groups.append(params) or make(params, lr=lr))
    example("timm_loop").train(student, timm.create_model("regnetx_002", num_classes=0), [images()])
    for entries in groups:
        decays = {id(p): group["weight_decay"] for group in entries for p in list(group["params"])}
        said = {name: decays[id(p)] for name, p in student.named_parameters()}
        assert student.no_weight_decay() >= {"cls_token", "pos_embed"}
        assert said["cls_token"] == said["pos_embed"] == 0 and said["head.weight"] == 0.05


def test_example_causal_lm(tmp_path):
    """Accumulation is one large batch, tied weights are saved, the projections do not decay, and the loss falls."""
    needs("transformers")
    causal_lm = example("causal_lm")
    torch.manual_seed(0)
    student, teacher, data = causal_lm.load(random=True)
    assert causal_lm.layer_map(2, 4) == [(0, 1), (1, 3)] and causal_lm.layer_map(3, 28)[-1] == (2, 27)
    model = causal_lm.Distilled(student, teacher)
    options = {"cls": causal_lm.CausalTrainer, "weight_decay": 0.5, "max_steps": 8}
    whole, parts = (
        gradients_of_a_step(
            tmp_path,
            copy.deepcopy(model),
            data[:8],
            cls=causal_lm.CausalTrainer,
            per_device_train_batch_size=8 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )[0]
        for micro_batches in (1, 4)
    )
    assert whole.keys() == parts.keys() and sum(name.endswith("unconstrained") for name in whole) >= 1
    assert_same(parts.values(), whole.values(), rtol=1e-3, atol=1e-5)
    saving = {"save_strategy": "steps", "save_steps": 8, "eval_strategy": "steps", "eval_steps": 8}
    trainer = trainer_of(tmp_path, model, data, **options, **saving)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    spared = model.distiller.no_weight_decay()
    assert spared and all(decays[id(p)] == 0 for name, p in model.distiller.named_parameters() if name in spared)
    assert max(orthogonality_error(model.distiller.projection(name)) for name in ("layer0", "layer1")) <= 1e-5
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    assert_same(again.state_dict().values(), student.state_dict().values(), rtol=0, atol=0)


@pytest.mark.parametrize("student", ["convnext_atto", "resnet18"])
def test_example_dense(student):
    """A map against tokens, of the same grid (stride 16) and of another one (an earlier map, resampled)."""
    timm = needs("timm")
    dense = example("dense")
    torch.manual_seed(0)
    small = {"embed_dim": 32, "num_heads": 2, "depth": 1, "img_size": 64}
    teacher = timm.create_model("vit_small_patch16_dinov3", **small)
    batch = torch.randn(4, 3, 64, 64)
    for tap in (dense.TAPS[student], {"convnext_atto": "stages.1", "resnet18": "layer2"}[student]):
        distiller = dense.distiller_of(timm.create_model(student), teacher, tap, batch[:1])
        losses = dense.train(distiller, [(batch, None)] * 12, lr=3e-3)
        assert losses[-1] < 0.8 * losses[0]
        assert orthogonality_error(distiller.projection("dense")) <= 1e-5


def test_example_several_teachers():
    """Every loss falls, each teacher gets images of its own normalization, and a saved run goes on."""
    needs("timm"), needs("torchvision")
    module = example("several_teachers")
    torch.manual_seed(0)
    student, dino, siglip, loader = module.load(random=True)
    distiller = module.distiller_of(student, dino, siglip, loader[0][0][:1])
    seen = {}
    for name, teacher in (("dino", dino), ("siglip", siglip)):
        teacher.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    report = module.train(distiller, loader[:12])
    assert all(report[-1][name] < 0.9 * report[0][name] for name in ("dino", "siglip", "image"))
    images = loader[0][0] * 0.5 + 0.5
    torch.testing.assert_close(seen["siglip"], (images - 0.5) / 0.5)
    mean, std = (torch.tensor(dino.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close(seen["dino"], (images - mean) / std)
    again = module.distiller_of(student, dino, siglip, loader[0][0][:1])
    again.load_state_dict(distiller.state_dict())
    assert_same([again.projection("dino")], [distiller.projection("dino")], rtol=0, atol=0)


def test_example_detector_neck():
    """The pyramids come nearer, the detector's own losses train its heads, and the teacher stays as it is."""
    detection = needs("torchvision").models.detection
    neck = example("detector_neck")
    torch.manual_seed(0)
    options = {"weights": None, "weights_backbone": None, "min_size": 64, "max_size": 64}
    student = detection.fasterrcnn_mobilenet_v3_large_fpn(**options)
    teacher = detection.fasterrcnn_resnet50_fpn(**options)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    head = student.roi_heads.box_predictor.cls_score.weight.detach().clone()
    losses = neck.train(neck.distiller_of(student, teacher), neck.scenes(4))
    assert losses[-1] < losses[0]
    assert not torch.equal(student.roi_heads.box_predictor.cls_score.weight, head)
    assert_same(teacher.state_dict().values(), before.values(), rtol=0, atol=0)


def test_example_embedding_model(tmp_path):
    """Accumulation is one large batch, the projection trains, and the student is saved as any of its kind."""
    library, _ = needs("sentence_transformers"), needs("datasets")
    module = example("embedding_model")
    torch.manual_seed(0)
    student, teacher = module.random_model(16), module.random_model(24)
    sentences = ["the cat sat", "a dog ran to the mat", "the mat", "a cat on a mat"]
    store = module.store_of(tmp_path / "store", teacher, sentences)
    expected = teacher.encode(sentences, convert_to_tensor=True)
    (name,) = store.taps
    torch.testing.assert_close(store[[3, 0]][name].float(), expected[[3, 0]], atol=1e-3, rtol=1e-3)
    for child in student.modules():
        if isinstance(child, torch.nn.Dropout):
            child.p = 0.0
    steps = []
    for micro_batches in (1, 2):
        loss = module.StoredTargets(copy.deepcopy(student), store)
        loss.distill.projection.weight = torch.eye(24, 16)
        options = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1, "save_strategy": "no"}
        options |= {"lr_scheduler_type": "constant", "gradient_accumulation_steps": micro_batches}
        options |= {"per_device_train_batch_size": 4 // micro_batches, "use_cpu": True, "disable_tqdm": True}
        before = {name: p.detach().clone() for name, p in loss.named_parameters()}
        module.train(loss.model, loss, sentences, output=str(tmp_path), **options)
        steps.append({name: p.detach() - before[name] for name, p in loss.named_parameters()})
    assert_same(steps[1].values(), steps[0].values(), rtol=1e-3, atol=1e-5)
    assert steps[0]["distill.projection.unconstrained"].abs().max() > 1e-4
    loss.model.save_pretrained(str(tmp_path / "student"))
    again = library.SentenceTransformer(str(tmp_path / "student"), device="cpu")
    torch.testing.assert_close(again.encode(sentences), loss.model.encode(sentences))


def test_every_example_is_tested():
    of_the_recipes = {"released_projector", "projector_study"}  # tests/recipes/test_released_projector.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS) | of_the_recipes


@pytest.mark.parametrize("name", NEEDS)
def test_the_example_runs_as_it_is(name, tmp_path, monkeypatch, capsys):
    for library in NEEDS[name]:
        needs(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *(["--random"] if name in RANDOM else [])])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert "loss" in capsys.readouterr().out
