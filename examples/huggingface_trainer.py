"""A Hugging Face ``Trainer`` subclass: text features distilled token by token, padding left out by the mask."""

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from vkd_kernels import OrthoProjLoss


class Distilled(nn.Module):
    """Student and loss in one module, so that Trainer optimises, wraps and saves both."""

    def __init__(self, student, teacher_dim):
        super().__init__()
        self.student, self.distill = student, OrthoProjLoss(student.config.hidden_size, teacher_dim, scale="match")

    def forward(self, targets=None, **inputs):
        output = self.student(**inputs, output_hidden_states=True)
        if targets is not None:
            features, mask = output.hidden_states[-1], inputs["attention_mask"].bool()
            output["loss"] = output.loss + self.distill(features, targets, mask)
        return output


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.to(self.args.device).eval()

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        with torch.no_grad():
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            targets = self.teacher(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        output = model(targets=targets, **inputs)
        return (output.loss, output) if return_outputs else output.loss

    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith("distill.")]


if __name__ == "__main__":  # random weights and sentences; give from_pretrained(...) models to the same classes
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100}
    student = BertForSequenceClassification(BertConfig(hidden_size=32, intermediate_size=64, **small))
    teacher = BertForSequenceClassification(BertConfig(hidden_size=64, intermediate_size=128, **small))
    mask = torch.arange(12) < torch.randint(4, 13, (64, 1))
    fields = {"input_ids": torch.randint(100, (64, 12)), "attention_mask": mask.long(), "labels": mask.sum(1) % 2}
    data = [{name: value[i] for name, value in fields.items()} for i in range(64)]
    options = TrainingArguments(
        "build/trainer", max_steps=40, learning_rate=1e-3, save_strategy="no", report_to="none",
        remove_unused_columns=False,
    )  # fmt: skip
    trainer = DistillationTrainer(Distilled(student, 64), options, train_dataset=data, teacher=teacher)
    print(f"loss over the run {trainer.train().training_loss:.3f}")
