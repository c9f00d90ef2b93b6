"""Hugging Face's Trainer as people run it: accumulation, saving, resuming, evaluation, gradient checkpointing.

The Trainer's own division of losses is the trap here: a model whose forward takes ``**kwargs`` is believed to divide by
``num_items_in_batch``. docs/integrations.md is the table of these tests.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers.stacks import assert_same, bert, example, needs, orthogonality_error, sentences

LENGTHS = {
    "equal lengths": [12] * 8,
    "unequal lengths": [2, 2, 2, 2, 12, 12, 12, 12],
    "padding first": [1, 3, 12, 7] * 2,
}
KINDS = {"tokens": "BertForMaskedLM", "sentences": "BertForSequenceClassification"}


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def trainer_of(folder, model, data, *, cls=None, teacher=None, callbacks=None, **options):
    """The example's Trainer on a CPU, without shuffling."""
    transformers = needs("transformers")
    needs("accelerate")
    cls = cls or example("huggingface_trainer").DistillationTrainer

    class InOrder(cls):
        def _get_train_sampler(self, *_, **__):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    options = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        **options,
    }
    arguments = transformers.TrainingArguments(str(folder), **options)
    extra = {} if teacher is None else {"teacher": teacher}
    return InOrder(model, arguments, train_dataset=data, callbacks=callbacks, **extra, **evaluated(options, data))


def evaluated(options, data):
    return {"eval_dataset": data} if options.get("eval_strategy", "no") != "no" else {}


def gradients_of_a_step(folder, model, data, **options):
    """{name: gradient} that the optimizer gets in the first step, and the loss that Trainer reports."""
    transformers = needs("transformers")
    seen = {}

    class Seen(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0, **options}
    trainer = trainer_of(folder, model, data, callbacks=[Seen()], **options)
    return seen, trainer.train().training_loss


def pair_of_models(kind="BertForMaskedLM"):
    torch.manual_seed(0)
    return bert(16, kind), bert(24, kind)


# ------------------------------------------------------------------------------------------------ gradient accumulation


@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_trainer_accumulates_gradients_as_one_large_batch(tmp_path, lengths, labels):
    """4 micro-batches of 2 give the gradient of 8, by plain autograd, too: token-weighted means over all of them."""
    data = sentences(lengths, labels)
    student, teacher = pair_of_models(KINDS[labels])
    model = example("huggingface_trainer").Distilled(student, 24)
    batch = {name: torch.stack([sample[name] for sample in data]) for name in data[0]}
    known = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        targets = teacher.eval()(**known, output_hidden_states=True).hidden_states[-1]
    model.train()(targets=targets, **batch)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(name.startswith("distill.") for name in expected)
    model.zero_grad()
    losses = []
    for size, steps in ((8, 1), (2, 4), (4, 2)):
        twin = copy.deepcopy(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "teacher": teacher}
        ours, loss = gradients_of_a_step(tmp_path, twin, data, **options)
        assert ours.keys() == expected.keys()
        assert_same(ours.values(), expected.values(), rtol=1e-4, atol=1e-6)
        losses.append(loss)
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_trainers_last_step_of_an_epoch_has_fewer_micro_batches(tmp_path):
    """Ten samples, micro-batches of 2, 4 of them a step: the second step has one, and its gradient is that batch's."""
    data = sentences([3, 12, 5, 7, 12, 2, 9, 4, 6, 11])
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    seen = []
    transformers = needs("transformers")

    class Seen(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            seen.append([p.grad.clone() for p in model.parameters() if p.grad is not None])

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "teacher": teacher}
    options |= {"learning_rate": 0.0, "max_grad_norm": 0.0, "max_steps": 2}
    trainer_of(tmp_path, copy.deepcopy(model), data, callbacks=[Seen()], **options).train()
    ours = gradients_of_a_step(tmp_path, model, data[8:], per_device_train_batch_size=2, teacher=teacher)[0]
    assert_same(seen[1], ours.values(), rtol=1e-4, atol=1e-6)


TOKENS = {"student": "bert.encoder", "teacher": "bert.encoder", "name": "tokens", "dims": (16, 24)}
TOKENS |= {f"{side}_output": "last_hidden_state" for side in ("student", "teacher")}
TOKENS |= {f"{side}_pool": "tokens" for side in ("student", "teacher")}


class Wrapped(nn.Module):
    """A FeatureDistiller as people put it into a Trainer: every argument is passed on."""

    def __init__(self, student, teacher):
        super().__init__()
        self.distiller = vk.FeatureDistiller(student, teacher, [TOKENS])

    def forward(self, **inputs):
        output, losses = self.distiller(**inputs, masks={"tokens": inputs["attention_mask"].bool()})
        output["loss"] = losses["total"]
        return output


@pytest.mark.parametrize(
    ("labels", "lengths"),
    [("sentences", [12] * 8), ("tokens", [12] * 8), ("tokens", [2, 2, 2, 2, 12, 12, 12, 12])],
    ids=["labels of sentences", "labels of tokens", "labels of tokens, unequal lengths"],
)
def test_trainer_with_a_wrapped_distiller_that_takes_any_argument(tmp_path, labels, lengths):
    """Trainer then leaves the division to the model, by ``num_items_in_batch``: every batch weighs by its labels."""
    transformers = needs("transformers")
    data = sentences(lengths, labels)
    model = Wrapped(*pair_of_models(KINDS[labels]))
    steps = []
    for size, micro_batches in ((8, 1), (2, 4)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": micro_batches}
        steps.append(gradients_of_a_step(tmp_path, copy.deepcopy(model), data, cls=transformers.Trainer, **options))
    (whole, loss), (parts, loss_of_parts) = steps
    assert whole.keys() == parts.keys() and any(name.endswith("unconstrained") for name in whole)
    assert_same(parts.values(), whole.values(), rtol=1e-4, atol=1e-6)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)


def class_of_the_page(head="Distilled(PreTrainedModel)"):
    """docs/integrations.md's class around a FeatureDistiller, or its Trainer."""
    transformers = needs("transformers")
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    code = page[page.index(f"class {head}") :].split("```")[0]
    names = {name: getattr(transformers, name) for name in ("PreTrainedModel", "PreTrainedConfig", "Trainer")}
    exec(code, names)
    return names[head.partition("(")[0]]


def test_the_pages_trainer_decays_no_projection():
    model = class_of_the_page()(vk.FeatureDistiller(*pair_of_models(), [{**TOKENS, "scale": "learned"}]))
    options = needs("transformers").TrainingArguments("build/decay", report_to="none", use_cpu=True)
    trainer = class_of_the_page("DistillationTrainer(Trainer)")(model, options)
    plain, known = needs("transformers").Trainer(model, options), dict(model.named_parameters())
    ours, theirs = ({*t.get_decay_parameter_names(model)} & known.keys() for t in (trainer, plain))
    assert theirs - ours == {f"distiller.pair_losses.[tokens].{name}" for name in ("projection.unconstrained", "scale")}


def test_the_page_wrapper_keeps_the_weights_of_modules_that_transformers_did_not_make():
    """As of PEFT's adapters, a head of one's own, and a linear projection: ``post_init`` would draw them anew."""
    student, teacher = pair_of_models()
    student.adapter = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(student.adapter[0].weight)
    nn.init.constant_(student.adapter[1].running_mean, 3.0)
    distiller = vk.FeatureDistiller(student, teacher, [{**TOKENS, "projection": "linear"}])
    before = copy.deepcopy(distiller.state_dict())
    class_of_the_page()(distiller)
    assert_same(distiller.state_dict().values(), before.values(), rtol=0, atol=0)


def test_trainer_accumulates_the_students_own_loss_beside_a_distillers(tmp_path):
    """docs/integrations.md's class: 4 micro-batches of 2 give the gradient of 8, in both losses."""
    transformers = needs("transformers")
    data = sentences([12] * 8)
    model = class_of_the_page()(vk.FeatureDistiller(*pair_of_models(), [TOKENS]))
    (whole, loss), (parts, loss_of_parts) = (
        gradients_of_a_step(
            tmp_path,
            copy.deepcopy(model),
            data,
            cls=transformers.Trainer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        for size, steps in ((8, 1), (2, 4))
    )
    assert_same(parts.values(), whole.values(), rtol=1e-4, atol=1e-6)
    assert loss_of_parts == pytest.approx(loss, rel=1e-5)


def test_the_pages_wrapper_is_evaluated_and_checkpoints_activations(tmp_path):
    model = class_of_the_page()(vk.FeatureDistiller(*pair_of_models(), [TOKENS]))
    every_step = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options = {"max_steps": 2, "load_best_model_at_end": True, "gradient_checkpointing": True, **every_step}
    trainer = trainer_of(tmp_path, model, sentences([12] * 8), cls=needs("transformers").Trainer, **options)
    trainer.train()
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_trainer_with_a_distiller_whose_rows_are_counted(tmp_path):
    """Labels of sentences, features of tokens: with ``total_rows`` any lengths make one large batch."""
    transformers = needs("transformers")
    needs("accelerate")

    class Counting(transformers.Trainer):
        def get_batch_samples(self, *arguments):
            batches, items = super().get_batch_samples(*arguments)
            # FeatureDistiller says accepts_loss_kwargs = False: Trainer divides by the number of micro-batches.
            self.rows = sum(batch["attention_mask"].sum() for batch in batches) / len(batches)
            return batches, items

        def compute_loss(self, model, inputs, return_outputs=False, **_):
            mask = inputs["attention_mask"].bool()
            output, losses = model(**inputs, masks={"tokens": mask}, total_rows=self.rows)
            return (losses["total"], output) if return_outputs else losses["total"]

    data = sentences([2, 2, 2, 2, 12, 12, 12, 12], "sentences")
    model = vk.FeatureDistiller(*pair_of_models("BertForSequenceClassification"), [TOKENS])
    batch = {name: torch.stack([sample[name] for sample in data]) for name in data[0]}
    model(**batch, masks={"tokens": batch["attention_mask"].bool()})[1]["total"].backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "cls": Counting}
    ours, _ = gradients_of_a_step(tmp_path, model, data, **options)
    assert_same(ours.values(), expected, rtol=1e-4, atol=1e-6)


def test_a_count_of_items_without_labels_is_refused():
    model = Wrapped(*pair_of_models("BertForSequenceClassification"))
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match="num_items_in_batch needs labels.*accepts_loss_kwargs = False"):
        model(**batch, num_items_in_batch=4)


# ------------------------------------------------------------------------------- saving, resuming, evaluation, loading


@pytest.mark.parametrize("kind", KINDS.values())
def test_trainer_saves_resumes_and_goes_on_bit_for_bit(tmp_path, kind):
    """Tied weights included (BertForMaskedLM): from the checkpoint of step 2 to the weights of an uninterrupted run."""
    data = sentences([3, 12, 5, 7, 12, 2, 9, 4], "tokens" if "Masked" in kind else "sentences")
    weights = []
    for resume in (False, True):
        student, teacher = pair_of_models(kind)
        torch.manual_seed(1)
        model = example("huggingface_trainer").Distilled(student, 24)
        trainer = trainer_of(tmp_path, model, data, teacher=teacher, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        assert trainer.state.global_step == 4
        weights.append([p.detach().clone() for p in model.state_dict().values()])
    assert_same(*weights, rtol=0, atol=0)


def test_trainer_saves_a_wrapped_distiller_with_tied_weights(tmp_path):
    """docs/integrations.md's class around a FeatureDistiller: saved, resumed bit for bit, and the student loaded."""
    transformers = needs("transformers")
    distilled = class_of_the_page()
    data = sentences([3, 12, 5, 7, 12, 2, 9, 4])
    weights = []
    for resume in (False, True):
        distiller = vk.FeatureDistiller(*pair_of_models(), [TOKENS])
        torch.manual_seed(1)
        distiller.reset_parameters()
        model = distilled(distiller)
        options = {"cls": transformers.Trainer, "save_strategy": "steps", "save_steps": 2}
        options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        trainer = trainer_of(tmp_path, model, data, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if resume else None)
        weights.append([p.detach().clone() for p in model.state_dict().values()])
    assert_same(*weights, rtol=0, atol=0)
    mapping = {r"^distiller\.student\.": ""}
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path / "checkpoint-4", key_mapping=mapping)
    assert_same(loaded.state_dict().values(), distiller.student.state_dict().values(), rtol=0, atol=0)


def test_trainer_evaluates_and_loads_the_best_model_at_the_end(tmp_path):
    """By the loss of the validation set, without ``label_names``; hidden states are not gathered as predictions."""
    data = sentences([3, 12, 5, 7, 12, 2, 9, 4])
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    trainer = trainer_of(
        tmp_path,
        model,
        data,
        teacher=teacher,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.5,  # so large that the last step is not the best
        load_best_model_at_end=True,
    )
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert len(losses) == 4 and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    assert trainer.predict(data).predictions.shape == (8, 12, 50)
    assert orthogonality_error(model.distill.projection.weight) <= 1e-5


def test_evaluation_is_a_mean_whatever_was_accumulated(tmp_path):
    data = sentences([12] * 8)
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    options = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = trainer_of(tmp_path, model, data, teacher=teacher, eval_strategy="steps", eval_steps=1, **options)
    training_loss = trainer.train().training_loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(training_loss, rel=1e-5)


def test_loading_the_student_that_was_saved(tmp_path):
    """Saved by itself; and out of a checkpoint of the run, by a mapping of its names."""
    data = sentences([3, 12, 5, 7])
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    trainer_of(tmp_path, model, data, teacher=teacher, save_strategy="steps", save_steps=4).train()
    student.save_pretrained(tmp_path / "student")
    again = type(student).from_pretrained(tmp_path / "student")
    mapped = type(student).from_pretrained(tmp_path / "checkpoint-4", key_mapping={r"^student\.": ""})
    for loaded in (again, mapped):
        assert loaded.state_dict().keys() == student.state_dict().keys()
        assert_same(loaded.state_dict().values(), student.state_dict().values(), rtol=0, atol=0)


def test_trainer_with_gradient_checkpointing(tmp_path):
    data = sentences([3, 12, 5, 7])
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    plain, checkpointed = (
        gradients_of_a_step(tmp_path, copy.deepcopy(model), data, teacher=teacher, gradient_checkpointing=on)[0]
        for on in (False, True)
    )
    assert plain.keys() == checkpointed.keys()
    assert_same(checkpointed.values(), plain.values())
    trainer = trainer_of(tmp_path, model, data, teacher=teacher, gradient_checkpointing=True)
    trainer.train()
    assert student.is_gradient_checkpointing


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_trainer_in_16_bit(tmp_path, precision):
    data = sentences([3, 12, 5, 7])
    student, teacher = pair_of_models()
    model = example("huggingface_trainer").Distilled(student, 24)
    if precision == "fp16" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: Trainer takes fp16 on no CPU")
    options = {precision: True, "eval_strategy": "steps", "eval_steps": 4, "max_steps": 20}
    trainer = trainer_of(tmp_path, model, data, teacher=teacher, **options)
    trainer.train()
    assert model.distill.projection.unconstrained.dtype == torch.float32
    assert orthogonality_error(model.distill.projection.weight) <= 1e-5
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.evaluate()["eval_loss"] > 0 and all(loss > 0 for loss in losses)


def test_example_huggingface_trainer(tmp_path):
    """Padding has no part in the loss, the projection no weight decay, and the loss comes down."""
    data = sentences([7, 3, 5, 2, 7, 1, 4, 6], "sentences")
    student, teacher = pair_of_models("BertForSequenceClassification")
    model = example("huggingface_trainer").Distilled(student, 24)
    mask = torch.stack([sample["attention_mask"] for sample in data]).bool()
    fields = {name: torch.stack([sample[name] for sample in data]) for name in data[0]}
    targets = torch.randn(8, 12, 24)
    losses = [model(targets=t, **fields)["loss"] for t in (targets, targets.masked_fill(~mask[..., None], 1e4))]
    torch.testing.assert_close(*losses)
    trainer = trainer_of(tmp_path, model, data, teacher=teacher, weight_decay=0.5, save_strategy="steps", save_steps=4)
    before, loss = model.distill.projection.weight.detach().clone(), trainer.evaluate(data)["eval_loss"]
    trainer.train()
    after = model.distill.projection.weight
    assert not torch.equal(after, before) and orthogonality_error(after) <= 1e-5
    assert trainer.evaluate(data)["eval_loss"] < loss
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == 0 for p in model.distill.parameters()) and 0.5 in decays.values()
    assert list(Path(tmp_path).rglob("model.safetensors"))
