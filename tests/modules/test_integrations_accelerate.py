"""accelerate as people run it, by examples/accelerate_loop.py: accumulation, saving, resuming, evaluation.

Two ranks: tests/distributed/test_integrations_torchrun.py. docs/integrations.md is the table.
"""

import copy

import pytest
import torch

from tests.helpers.stacks import assert_same, bert, example, needs, orthogonality_error, sentences


@pytest.fixture
def accelerator():
    """A fresh one: accelerate keeps its state for the whole process."""
    accelerate = needs("accelerate")
    needs("transformers")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield accelerate.Accelerator(cpu=True)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def models():
    torch.manual_seed(0)
    return example("huggingface_trainer").Distilled(bert(16, "BertForMaskedLM"), 24), bert(24, "BertForMaskedLM").eval()


def loader(lengths, batch_size):
    return torch.utils.data.DataLoader(sentences(lengths), batch_size=batch_size)


@pytest.mark.parametrize("lengths", [[12] * 8, [2, 2, 2, 2, 12, 12, 12, 12], [1, 3, 12, 7, 5, 11, 2]])
def test_accelerate_accumulates_gradients_as_one_large_batch(accelerator, lengths):
    """Also with sentences of any length, and with a last micro-batch that is smaller."""
    loop = example("accelerate_loop")
    steps = []
    for size, micro_batches in ((8, 1), (2, 4), (4, 2)):
        model, teacher = models()
        before = [p.detach().clone() for p in model.parameters()]
        prepared = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader(lengths, size))
        losses = loop.train(accelerator, *prepared, teacher, micro_batches=micro_batches)
        steps.append([torch.tensor(losses), *(p.detach() - q for p, q in zip(model.parameters(), before, strict=True))])
    assert steps[0][0].shape == (1,)
    for step in steps[1:]:
        assert_same(step, steps[0], rtol=1e-4, atol=1e-6)


def test_accelerate_evaluates_as_one_large_batch(accelerator):
    loop = example("accelerate_loop")
    model, teacher = models()
    one, several = (
        loop.evaluate(accelerator, model, accelerator.prepare(loader([1, 3, 12, 7, 5, 11, 2], size)), teacher)
        for size in (7, 2)
    )
    assert several == pytest.approx(one, rel=1e-5)


def test_accelerate_saves_resumes_and_evaluates(accelerator, tmp_path):
    """Tied weights included; a run that was loaded goes on bit for bit."""
    loop = example("accelerate_loop")
    model, teacher = models()
    data = loader([3, 12, 5, 7, 12, 2], 2)
    prepared = accelerator.prepare(model, loop.optimizer_of(model), data)
    before = loop.evaluate(accelerator, model, prepared[2], teacher)
    loop.train(accelerator, *prepared, teacher, micro_batches=2)
    accelerator.save_state(tmp_path / "state")
    saved = copy.deepcopy(model.state_dict())
    ends = []
    for resumed in (False, True):
        if resumed:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(1.0)
            accelerator.load_state(tmp_path / "state")
            assert_same(model.state_dict().values(), saved.values(), rtol=0, atol=0)
        loop.train(accelerator, *prepared, teacher, micro_batches=2)
        ends.append([p.detach().clone() for p in model.parameters()])
    assert_same(*ends, rtol=0, atol=0)
    assert loop.evaluate(accelerator, model, prepared[2], teacher) < before
    assert orthogonality_error(model.distill.projection.weight) <= 1e-5
    decays = {id(p): group["weight_decay"] for group in prepared[1].param_groups for p in group["params"]}
    assert all(decays[id(p)] == 0 for p in model.distill.parameters())
