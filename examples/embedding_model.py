"""An embedding model from stored targets, by the loss interface of sentence-transformers.

    python examples/embedding_model.py sentences.txt   # MiniLM (384) learns from mpnet (768); one sentence a line
    python examples/embedding_model.py --random        # small random models, made-up sentences

The teacher runs once: its embeddings are stored on disk, and the data set holds their indices as labels.
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from vkd_kernels import FeatureStore, OrthoProjLoss

TAP = {"teacher": "", "teacher_output": "sentence_embedding"}


def store_of(folder, teacher, sentences):
    """The teacher's embeddings of all sentences, (768,) each; what is there already is not computed again."""
    return FeatureStore.build(
        folder, teacher, sentences, [TAP], teacher_input=lambda batch: (teacher.preprocess(batch),), progress=False
    )


class StoredTargets(nn.Module):
    """A loss as sentence-transformers calls it; the labels are indices of the store."""

    def __init__(self, model, store):
        super().__init__()
        self.model, self.store = model, store
        (self.name,) = store.taps
        teacher_dim = store[0][self.name].shape[-1]
        student_dim = model.get_sentence_embedding_dimension()
        self.distill = OrthoProjLoss(student_dim, teacher_dim, scale="match")

    def forward(self, sentence_features, labels):
        embeddings = self.model(next(iter(sentence_features)))["sentence_embedding"]
        targets = self.store[labels.cpu()][self.name].to(embeddings.device)
        return self.distill(embeddings, targets)


def random_model(width):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "cat", "dog", "sat", "ran", "on", "to", "mat"]
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, vocab_size=len(words))).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(str(folder)), Pooling(width)], device="cpu")


def train(model, loss, sentences, *, output, **options):
    data = Dataset.from_dict({"sentence": sentences, "label": list(range(len(sentences)))})
    arguments = SentenceTransformerTrainingArguments(output, report_to="none", **options)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)
    return trainer, trainer.train().training_loss


if __name__ == "__main__":
    if "--random" in sys.argv:
        student, teacher = random_model(32), random_model(64)
        sentences = [f"{a} {b} {c} the mat" for a in ("a", "the") for b in ("cat", "dog") for c in ("sat on", "ran to")]
        options = {"max_steps": 40, "learning_rate": 1e-3, "save_strategy": "no"}
    else:
        student, teacher = SentenceTransformer("all-MiniLM-L6-v2"), SentenceTransformer("all-mpnet-base-v2")
        sentences = Path(sys.argv[1]).read_text().splitlines()
        options = {"num_train_epochs": 1, "per_device_train_batch_size": 64}
    loss = StoredTargets(student, store_of("build/embeddings", teacher, sentences))
    trainer, training_loss = train(student, loss, sentences, output="build/embedding_model", **options)
    print(f"loss over the run {training_loss:.3f}")
    student.save_pretrained("build/embedding_model/student")
