"""Lightning as people run it: accumulation, saving, resuming, validation. docs/integrations.md is the table."""

import pytest
import torch
from torch import nn

from tests.helpers.stacks import assert_same, example, images, needs, orthogonality_error


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer(folder, **options):
    lightning = needs("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        accelerator="cpu", default_root_dir=folder, log_every_n_steps=1, **{"max_steps": 3, **quiet, **options}
    )


def test_example_lightning_module(tmp_path):
    torchvision = needs("torchvision")
    student = torchvision.models.mobilenet_v3_small(num_classes=10)
    teacher = torchvision.models.mobilenet_v3_large()
    teacher_before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = example("lightning_module").Distillation(student, teacher, student_dim=576, teacher_dim=960)
    before = module.distill.projection.weight.detach().clone()
    fit = trainer(tmp_path)
    fit.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*images()), batch_size=8))
    after = module.distill.projection.weight
    assert not torch.equal(after, before) and orthogonality_error(after) <= 1e-5
    assert 0 < fit.callback_metrics["feature_loss"] < 2
    assert_same(teacher.state_dict().values(), teacher_before.values(), rtol=0, atol=0)
    (saved,) = tmp_path.rglob("*.ckpt")
    module.distill.projection.reset_parameters()
    module.load_state_dict(torch.load(saved, weights_only=True)["state_dict"])


class Small(nn.Module):
    """A model of torchvision's kind without batch norm, whose gradient does not depend on who is in the batch."""

    def __init__(self, width):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), nn.GELU())
        self.avgpool, self.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(width, 10)


def small_module(images=7):
    torch.manual_seed(0)
    module = example("lightning_module").Distillation(Small(6), Small(10), student_dim=6, teacher_dim=10)
    return module, torch.utils.data.TensorDataset(torch.randn(images, 3, 32, 32), torch.randint(10, (images,)))


def test_lightning_accumulates_gradients_as_one_large_batch(tmp_path):
    """7 images in micro-batches of 2, 2, 2 and 1 give the gradient of all 7; so do 4 and 3."""
    needs("lightning")
    steps = []
    for size, accumulate in ((7, 1), (2, 4), (4, 2)):
        module, data = small_module()
        module.configure_optimizers = lambda module=module: torch.optim.SGD(module.parameters(), lr=1.0)
        before = [p.detach().clone() for p in module.parameters()]
        fit = trainer(tmp_path, max_steps=1, accumulate_grad_batches=accumulate, enable_checkpointing=False)
        fit.fit(module, torch.utils.data.DataLoader(data, batch_size=size))
        assert fit.global_step == 1
        steps.append([p.detach() - q for p, q in zip(module.parameters(), before, strict=True)])
    for step in steps[1:]:
        assert_same(step, steps[0], rtol=1e-4, atol=1e-6)
    assert any(step.abs().max() > 1e-3 for step in steps[0])


def test_lightnings_last_group_of_an_epoch_has_fewer_micro_batches(tmp_path):
    """Two steps of an epoch with accumulation over 3: micro-batches of 2, 2, 2, then a single one of 1."""
    needs("lightning")
    module, data = small_module()
    plain, _ = small_module()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    fit = trainer(tmp_path, max_steps=-1, max_epochs=1, accumulate_grad_batches=3, enable_checkpointing=False)
    fit.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    for batch in (data[:6], data[6:]):
        optimizer.zero_grad()
        (sum(plain.losses(batch)) / len(batch[0])).backward()
        optimizer.step()
    assert_same(module.parameters(), plain.parameters(), rtol=1e-4, atol=1e-6)


def test_lightning_saves_resumes_and_validates(tmp_path):
    """A run stopped after two steps and resumed by ``ckpt_path`` ends with the bits of one that was not stopped."""
    needs("lightning")
    ends = []
    for stops in ((4,), (2, 4)):
        for stop in stops:
            module, data = small_module()
            loader = torch.utils.data.DataLoader(data, batch_size=4)
            folder = tmp_path / str(len(stops))
            fit = trainer(folder, max_steps=stop, enable_checkpointing=True)
            saved = next(folder.rglob("*.ckpt"), None)
            fit.fit(module, loader, loader, ckpt_path=saved)
        assert fit.global_step == 4 and 0 < fit.callback_metrics["val_loss"] < 20
        ends.append([p.detach() for p in module.parameters()])
    assert_same(*ends, rtol=0, atol=0)
