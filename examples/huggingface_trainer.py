"""A Hugging Face ``Trainer``: text features distilled token by token, padding left out by the mask.

Gradient accumulation, several ranks and sentences of any length give the gradient of one large batch: the losses are
sums, divided by the number of labels and of tokens in all micro-batches of all ranks. Saving, resuming, evaluation and
gradient checkpointing are Trainer's own.
"""

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForMaskedLM, PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from vkd_kernels import OrthoProjLoss


class Distilled(PreTrainedModel):
    """Student and loss in one model, so that Trainer optimizes, wraps, saves (tied weights too) and resumes both."""

    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer passes no count of its own, and divides by the number of micro-batches

    def __init__(self, student: PreTrainedModel, teacher_dim: int):
        super().__init__(PreTrainedConfig())
        self.config, self.student = student.config, student
        self.distill = OrthoProjLoss(student.config.hidden_size, teacher_dim, scale="match", reduction="sum")
        for module in self.modules():
            module._is_hf_initialized = True  # what is here keeps its weights
        self.post_init()

    def forward(self, targets=None, counts=None, labels=None, **inputs):
        output = self.student(**inputs, output_hidden_states=targets is not None)
        if targets is None:
            return {"logits": output.logits}
        mask = inputs["attention_mask"].bool()
        counts = counts or count(labels, mask)
        task = F.cross_entropy(output.logits.flatten(0, -2).float(), labels.flatten(), reduction="sum")
        features = self.distill(output.hidden_states[-1], targets, mask)
        loss = task / counts["labels"] + features / (counts["tokens"] * targets.shape[-1])
        return {"loss": loss, "logits": output.logits}


def count(labels: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"labels": labels.ne(-100).sum().clamp(min=1), "tokens": mask.sum().clamp(min=1)}


class CountingTrainer(Trainer):
    """Gives the model, as ``counts``, what all micro-batches of a step hold on all ranks; its losses are over that."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [count(batch["labels"], batch["attention_mask"]) for batch in batches]
        local = torch.tensor([[c["labels"], c["tokens"]] for c in counts] or [[0, 0]], device=device).sum(0)
        labels, tokens = self.accelerator.gather(local).view(-1, 2).sum(0)
        # Trainer divides by the number of micro-batches, and DDP by that of ranks: both are in the counts already.
        already = max(len(batches), 1) * self.accelerator.num_processes
        self.counts = {"labels": labels / already, "tokens": tokens / already}
        return batches, items

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        output = model(counts=self.counts if model.training else None, **inputs)
        return (output["loss"], output) if return_outputs else output["loss"]


class DistillationTrainer(CountingTrainer):
    def __init__(self, *args, teacher: PreTrainedModel, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        with torch.no_grad():
            known = {name: value for name, value in inputs.items() if name != "labels"}
            targets = self.teacher(**known, output_hidden_states=True).hidden_states[-1]
        return super().compute_loss(model, {**inputs, "targets": targets}, return_outputs)

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith("distill.")]


if __name__ == "__main__":  # random weights and sentences; give from_pretrained(...) models to the same classes
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    student = BertForMaskedLM(BertConfig(hidden_size=32, intermediate_size=64, **small))
    teacher = BertForMaskedLM(BertConfig(hidden_size=64, intermediate_size=128, **small))
    mask = torch.arange(12) < torch.randint(4, 13, (64, 1))
    ids = torch.randint(100, (64, 12))
    fields = {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
    data = [{name: value[i] for name, value in fields.items()} for i in range(64)]
    options = TrainingArguments(
        "build/trainer",
        max_steps=40,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=20,
        load_best_model_at_end=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = DistillationTrainer(
        Distilled(student, teacher_dim=64), options, train_dataset=data, eval_dataset=data[:16], teacher=teacher
    )
    trainer.train()  # resume_from_checkpoint=True goes on where a run was stopped
    print(f"loss at the end {trainer.evaluate()['eval_loss']:.3f}")
    trainer.model.student.save_pretrained("build/student")  # the student by itself, as any model of its class
    BertForMaskedLM.from_pretrained("build/student")
    # A checkpoint of the run holds the loss, too; its student comes out of it by
    BertForMaskedLM.from_pretrained("build/trainer/checkpoint-40", key_mapping={r"^student\.": ""})
