"""A causal language model: hidden states by a layer map and logits, in a Hugging Face ``Trainer``.

    python examples/causal_lm.py            # Qwen3-0.6B learns from Qwen3-1.7B on lines of text from standard input
    python examples/causal_lm.py --random   # small random models and random tokens

The logit loss here holds the logits of both models, (tokens, vocabulary), which is what fills the memory for a
vocabulary of 150 000. Then give ``logit_weight=None`` and add a loss that is fused with the language model's head, as
Liger's ``LigerFusedLinearJSDLoss`` (package liger-kernel) is; the feature losses stay as they are.
"""

import sys

import torch
import torch.nn.functional as F
from huggingface_trainer import CountingTrainer, count
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

from vkd_kernels import FeatureDistiller


def layer_map(student_layers, teacher_layers):
    """[(student's layer, teacher's layer)]: evenly spread, the last learns from the last."""
    return [(i, (i + 1) * teacher_layers // student_layers - 1) for i in range(student_layers)]


class Distilled(PreTrainedModel):
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False

    def __init__(self, student, teacher, *, feature_weight=1.0, logit_weight=1.0, temperature=2.0):
        super().__init__(PreTrainedConfig())
        self.config = student.config
        layers = layer_map(student.config.num_hidden_layers, teacher.config.num_hidden_layers)
        common = {"student_pool": "tokens", "teacher_pool": "tokens", "scale": "match"}
        common |= {"dims": (student.config.hidden_size, teacher.config.hidden_size)}
        pairs = [
            {"student": f"model.layers.{i}", "teacher": f"model.layers.{j}", "name": f"layer{i}", **common}
            for i, j in layers
        ]
        pairs = [{**pair, "weight": feature_weight / len(pairs)} for pair in pairs]
        self.distiller = FeatureDistiller(student, teacher, pairs, logit_weight=logit_weight, temperature=temperature)
        self.names = [pair["name"] for pair in pairs] + ["logits"]
        for module in self.modules():
            module._is_hf_initialized = True  # what is here keeps its weights
        self.post_init()

    def forward(self, counts=None, labels=None, **inputs):
        """Labels are the tokens themselves, -100 where nothing is to be predicted: padding, and the first of a row."""
        mask = inputs["attention_mask"].bool()
        counts = counts or count(labels, mask)
        masks = dict.fromkeys(self.names, mask)
        output, losses = self.distiller(**inputs, masks=masks, total_rows=counts["tokens"], use_cache=False)
        task = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        return {"loss": task / counts["labels"] + losses["total"], "logits": output.logits}


class CausalTrainer(CountingTrainer):
    def get_decay_parameter_names(self, model):
        spared = {f"distiller.{name}" for name in model.distiller.no_weight_decay()}
        return [name for name in super().get_decay_parameter_names(model) if name not in spared]


def small(width, layers):
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "head_dim": 16}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, num_attention_heads=2, num_key_value_heads=1, vocab_size=100))


def load(random):
    """(student, teacher, [sample]): a sample has input_ids, attention_mask and labels."""
    if random:
        student, teacher = small(32, 2), small(64, 4)
        mask = torch.arange(16) < torch.randint(4, 17, (64, 1))
        ids = torch.randint(100, (64, 16))
    else:
        student, teacher = (AutoModelForCausalLM.from_pretrained(f"Qwen/Qwen3-{size}") for size in ("0.6B", "1.7B"))
        tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen3-0.6B")
        batch = tokenizer(
            sys.stdin.read().splitlines(), padding=True, truncation=True, max_length=512, return_tensors="pt"
        )
        ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill(~mask, -100)
    labels[:, 0] = -100
    fields = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return student, teacher, [{name: value[i] for name, value in fields.items()} for i in range(len(ids))]


if __name__ == "__main__":
    student, teacher, data = load(random="--random" in sys.argv)
    options = TrainingArguments(
        "build/causal_lm",
        max_steps=20,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        remove_unused_columns=False,
        report_to="none",
    )
    trainer = CausalTrainer(Distilled(student, teacher), options, train_dataset=data, eval_dataset=data[:16])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")
    student.save_pretrained("build/causal_lm/student")
