"""docs/teachers.md: each row's tap, on the real class with random weights, against the library's own output."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import loss_like
from tests.helpers.stacks import needs

PAGE = Path(__file__).parents[2] / "docs" / "teachers.md"
ROWS = [
    (cells[0], *re.search(r"^(\S+) `(\w+)`$", cells[1]).groups(), ast.literal_eval(cells[2].strip("`")))
    for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines())
    if len(cells) == 4 and "`" in cells[1]
]
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SMALL = {"embed_dim": 32, "num_heads": 2, "depth": 1}  # of a timm ViT
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}
TIMM = {
    "vit_small_patch14_dinov2": {"img_size": 56, **SMALL},
    "vit_small_patch16_dinov3": {"img_size": 64, **SMALL},
    "vit_small_patch16_dinov3_qkvb": {"img_size": 64, **SMALL},
    "convnext_tiny": CONVNEXT,
    "vit_base_patch16_siglip_224": {"img_size": 64, **SMALL},
    "vit_base_patch16_clip_224": {"img_size": 64, **SMALL},
    "naflexvit_base_patch16_radio_v3": SMALL,
    "regnety_002": {},
    "convnext_atto": CONVNEXT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 64,
        "window_size": 2,
        "depths": (1, 1),
        "embed_dim": 12,
        "num_heads": (1, 2),
    },
}


def timm_teacher(name):
    model = needs("timm").create_model(name, **TIMM[name]).eval()
    images = IMAGES[..., :56, :56] if TIMM[name].get("img_size") == 56 else IMAGES
    features = model.forward_features(images)
    if features.dim() == 3:
        return model, images, features[:, model.num_prefix_tokens :]
    return model, images, features if "swin" in name else features.permute(0, 2, 3, 1)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SIZES, "image_size": 64, "patch_size": 16}
PATCHES = {
    "pixel_values": torch.randn(2, 16, 768, generator=torch.Generator().manual_seed(0)),
    "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
    "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
}
TOKENS = {
    "input_ids": torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 7, dtype=torch.long),
}
SPECIAL = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "max_source_positions": 20,
    "num_mel_bins": 8,
    "decoder_start_token_id": 1,
    **SPECIAL,
}
LAST = lambda output: output.last_hidden_state  # noqa: E731
TRANSFORMERS = {  # class: (configuration, its fields, inputs, what the tap must give, of the output)
    "Dinov2Model": ("Dinov2Config", VISION, {"pixel_values": IMAGES}, lambda output: LAST(output)[:, 1:]),
    "DINOv3ViTModel": (
        "DINOv3ViTConfig",
        {**VISION, "num_register_tokens": 4},
        {"pixel_values": IMAGES},
        lambda output: LAST(output)[:, 5:],
    ),
    "DINOv3ConvNextModel": (
        "DINOv3ConvNextConfig",
        {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]},
        {"pixel_values": IMAGES},
        lambda output: LAST(output)[:, 1:],
    ),
    "SiglipVisionModel": ("SiglipVisionConfig", VISION, {"pixel_values": IMAGES}, LAST),
    "Siglip2VisionModel": ("Siglip2VisionConfig", {**SIZES, "num_patches": 16, "patch_size": 16}, PATCHES, LAST),
    "CLIPVisionModel": ("CLIPVisionConfig", VISION, {"pixel_values": IMAGES}, lambda output: LAST(output)[:, 1:]),
    "RadioModel": (
        "RadioConfig",
        {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"pixel_values": IMAGES},
        lambda output: output.features,
    ),
    "WhisperModel": (
        "WhisperConfig",
        WHISPER,
        {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))},
        LAST,
    ),
    "Wav2Vec2Model": (
        "Wav2Vec2Config",
        SPEECH,
        {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))},
        LAST,
    ),
    "BertModel": ("BertConfig", {**SIZES, "vocab_size": 50}, TOKENS, LAST),
    "ModernBertModel": (
        "ModernBertConfig",
        {**SIZES, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        TOKENS,
        LAST,
    ),
    "Qwen3ForCausalLM": (
        "Qwen3Config",
        {**SIZES, **SPECIAL, "num_key_value_heads": 1, "head_dim": 16},
        TOKENS,
        lambda output: output.hidden_states[-1],
    ),
    "LlamaForCausalLM": (
        "LlamaConfig",
        {**SIZES, **SPECIAL, "num_key_value_heads": 1},
        TOKENS,
        lambda output: output.hidden_states[1],
    ),
}


def transformers_teacher(name):
    transformers = needs("transformers")
    config, fields, inputs, expected = TRANSFORMERS[name]
    model = getattr(transformers, name)(getattr(transformers, config)(**fields)).eval()
    if name == "WhisperModel":
        model = model.encoder
    more = {"output_hidden_states": True} if "CausalLM" in name else {}
    return model, inputs, expected(model(**inputs, **more))


def torchvision_teacher(name):
    detection = needs("torchvision").models.detection
    backbone = getattr(detection, name)(weights=None, weights_backbone=None).backbone.eval()
    return backbone, IMAGES, backbone(IMAGES)["0"].permute(0, 2, 3, 1)


def sentence_transformer(folder):
    """A SentenceTransformer of a small BERT and mean pooling, made without a download."""
    library, transformers = needs("sentence_transformers"), needs("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "on", "mat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=len(words))).save_pretrained(folder)
    modules = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    encoder = modules.Transformer(str(folder))
    return library.SentenceTransformer(modules=[encoder, modules.Pooling(32)], device="cpu").eval()


class StandIn(nn.Module):
    """A student of that many positions; its rows are a parameter."""

    def __init__(self, positions, channels):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(*positions, channels))

    def forward(self, *_, **__):
        return self.rows


def build(package, name, folder):
    """(the teacher, its inputs, the features that the row promises)."""
    if package == "sentence-transformers":
        model = sentence_transformer(folder)
        inputs = model.preprocess(["a cat", "sat on a mat"])
        with torch.no_grad():
            return model, (inputs,), model(dict(inputs))["sentence_embedding"]
    builders = {"timm": timm_teacher, "transformers": transformers_teacher, "torchvision": torchvision_teacher}
    with torch.no_grad():
        return builders[package](name)


@pytest.mark.parametrize(("teacher", "package", "name", "tap"), ROWS, ids=[f"{row[1]} {row[2]}" for row in ROWS])
def test_the_tap_of_a_teacher(teacher, package, name, tap, tmp_path):
    model, inputs, expected = build(package, name, tmp_path)
    student = StandIn(expected.shape[:-1], 8)
    pair = {"student": "", "student_pool": lambda rows: rows, "name": "x", **tap}
    distiller = vk.FeatureDistiller(student, model, [{**pair, "dims": (8, expected.shape[-1])}])
    losses = distiller(None, teacher_input=inputs)[1]
    torch.testing.assert_close(losses["x"], loss_like(distiller, "x", 8, expected.shape[-1])(student.rows, expected))
    losses["total"].backward()
    assert student.rows.grad.abs().max() > 0


def test_every_family_of_teachers_has_a_row():
    assert {row[1] for row in ROWS} == {"timm", "transformers", "torchvision", "sentence-transformers"}
    assert {row[2] for row in ROWS} >= {*TIMM, *TRANSFORMERS} and len(ROWS) == 27
