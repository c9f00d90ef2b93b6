"""What goes wrong around a FeatureDistiller or an OrthoProjLoss: said once, refused, or put right."""

import collections
import concurrent.futures
import copy
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import vkd_kernels as vk
from tests.helpers.distillers import (
    CNN,
    FEATURES,
    IMAGES,
    LAYERS,
    TOKENS_TO_MAP,
    ViT,
    distiller_of_layers,
    gradients,
    layers,
    loss_like,
    make,
    messages,
)

# ---------------------------------------------------------------------------------------------- the teacher's modules


class Regularized(CNN):
    """A teacher with everything that training mode changes."""

    def __init__(self, width=10, dropout=None):
        super().__init__(width)
        self.dropout = nn.Dropout(0.5) if dropout is None else dropout

    def forward(self, images):
        return self.fc(self.dropout(self.relu(self.bn(self.conv(images))).mean((2, 3))))


def test_a_part_of_the_teacher_set_to_training_mode_changes_nothing():
    distiller = make([{"student": "head", "teacher": "fc", "name": "x"}], teacher=Regularized())
    expected = distiller(IMAGES)[1]["x"]
    state = {name: value.clone() for name, value in distiller.teacher.state_dict().items()}
    distiller.teacher.bn.train()
    distiller.teacher.dropout.train()
    torch.testing.assert_close(distiller(IMAGES)[1]["x"], expected)
    assert all(torch.equal(value, state[name]) for name, value in distiller.teacher.state_dict().items())
    assert not distiller.teacher.bn.training and not distiller.teacher.dropout.training


def test_a_dropout_shared_with_the_student_drops_the_students_features_alone():
    class Student(ViT):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, images):
            tokens = self.embed(images).flatten(2).mT
            return self.head(self.dropout(self.norm(tokens)).mean(1))

    student = Student()
    teacher = Regularized(dropout=student.dropout)
    distiller = make(
        [{"student": "norm", "student_pool": "mean_tokens", "teacher": "fc", "name": "x"}], student, teacher
    )
    assert student.dropout.training
    first, second = (distiller(IMAGES) for _ in range(2))
    torch.testing.assert_close(first[1]["x"], second[1]["x"])  # the teacher drops nothing
    assert not torch.equal(first[0], second[0]) and student.dropout.training  # the student does


# ------------------------------------------------------------------------------------------------ threads and in place


def test_threads_that_share_a_distiller_get_their_own_losses():
    distiller = make(logit_weight=1.0).eval()
    batches = [torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(40)]
    with torch.no_grad():
        expected = [distiller(batch)[1]["total"] for batch in batches]
        for attached in (False, True):
            if attached:
                distiller.attach()

            def loss(batch):
                with torch.no_grad():
                    return distiller(batch)[1]["total"]

            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                got = list(pool.map(loss, batches * 3))
            torch.testing.assert_close(torch.stack(got), torch.stack(expected * 3))


def test_threads_that_share_an_exported_student_get_their_own_vectors():
    distiller = make().eval()
    space = distiller.export(distiller.pairs[0].name)
    for module in (space.student.embed, space.student.norm):
        module.register_forward_hook(lambda *_: time.sleep(0.001))
    batches = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    with torch.no_grad():
        expected = [space(batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        got = list(pool.map(torch.no_grad()(space), batches))
    torch.testing.assert_close(got, expected)
    copy.deepcopy(space)(batches[0])


def test_calls_of_the_student_in_another_thread_are_not_seen():
    distiller = make().attach().eval()
    expected, tokens = distiller(IMAGES)[1]["total"], torch.randn(2, 17, 6)

    def meanwhile(*_):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(distiller.student.norm, tokens).result()

    distiller.student.embed.register_forward_hook(meanwhile)
    torch.testing.assert_close(distiller(IMAGES)[1]["total"], expected)


@pytest.mark.parametrize("mode", ["eager", "compiled", "inference"])
@pytest.mark.parametrize("structured", [False, True])
def test_a_tapped_output_changed_in_place_is_refused_or_kept_as_it_was(mode, structured):
    """CNN's relu changes what its batch norm returned."""
    pool = (lambda outputs: outputs["map"].mean((2, 3))) if structured else "spatial_mean"

    class Returns(nn.BatchNorm2d):
        def forward(self, x):
            return {"map": super().forward(x)}

    class Changing(CNN):
        def forward(self, images):
            x = self.bn(self.conv(images))
            return self.fc(self.relu(x["map"] if structured else x).mean((2, 3)))

    teacher = Changing()
    teacher.bn = Returns(10) if structured else teacher.bn
    nn.init.uniform_(teacher.bn.weight)
    pair = {"student": "head", "teacher": "bn", "teacher_pool": pool, "dims": (3, 10), "name": "x"}
    distiller = make([pair], teacher=teacher, example_input=None)
    y = F.batch_norm(teacher.conv(IMAGES), torch.zeros(10), torch.ones(10), teacher.bn.weight, teacher.bn.bias)
    expected = loss_like(distiller, "x", 3, 10)(distiller.student(IMAGES), y.mean((2, 3)))
    if mode == "eager":
        with pytest.raises(RuntimeError, match="teacher module 'bn' was changed in place afterwards"):
            distiller(IMAGES)
        return
    torch._dynamo.reset()
    module = torch.compile(distiller.attach(), backend="aot_eager", fullgraph=True) if mode == "compiled" else distiller
    with torch.inference_mode(mode == "inference"):
        torch.testing.assert_close(module(IMAGES)[1]["x"], expected)


# ------------------------------------------------------------------------------------------- modules that did not run


class LayerDrop(nn.Module):
    """As wav2vec 2.0's encoder: some layers are left out of a training step."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.dropped: set[int] = set()

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = x if index in self.dropped else layer(x)
        return x


def test_a_layer_that_layerdrop_left_out_counts_as_0_where_the_pair_is_optional():
    pairs = [
        {"student": f"layers.{i}", "teacher": "0", "dims": (6, 32), "name": str(i), "optional": i != 0}
        for i in range(3)
    ]
    distiller = vk.FeatureDistiller(LayerDrop(), layers(32), pairs)
    whole = distiller(FEATURES)[1]
    distiller.student.dropped = {2}
    losses = distiller(FEATURES, metrics=True)[1]
    torch.testing.assert_close([losses["0"], losses["1"]], [whole["0"], whole["1"]])
    assert losses["2"] == 0 and messages(lambda: distiller(FEATURES)) == []
    assert not gradients(distiller, losses["total"])["pair_losses.[2].projection.unconstrained"].any()
    distiller.student.dropped = {0}
    with pytest.raises(RuntimeError, match=r"'layers.0' was not seen.*ran 0 times.*LayerDrop.*optional=True"):
        distiller(FEATURES)
    with pytest.raises(RuntimeError, match="'layers.0' was not seen.*can't be left out here: tap a module around it"):
        distiller.export("0")(FEATURES)


def test_a_module_list_is_refused_with_the_name_of_an_entry():
    with pytest.raises(RuntimeError, match="A ModuleList is never called itself: tap one of its entries, 'layers.0'"):
        vk.FeatureDistiller(LayerDrop(), layers(32), [{**LAYERS, "student": "layers"}], example_input=FEATURES)


def test_a_traced_student_names_what_tracing_left_whole():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 8)

        def forward(self, x):
            return self.linear(x).relu()

    graph = torch.fx.symbolic_trace(nn.Sequential(collections.OrderedDict(block=Block())))
    with pytest.raises(RuntimeError, match="A traced graph .* calls only those modules that tracing left whole"):
        vk.FeatureDistiller(graph, layers(32), [{**LAYERS, "student": "block"}])(FEATURES)
    vk.FeatureDistiller(graph, layers(32), [{**LAYERS, "student": "block.linear"}])(FEATURES)


def test_a_compiled_student_may_be_called_alone():
    for first in ("alone", "distiller"):
        torch._dynamo.reset()
        student = torch.compile(layers(8), backend="eager")
        distiller = vk.FeatureDistiller(student, layers(32), [LAYERS])
        for call in range(4):
            if (call % 2 == 0) == (first == "alone"):
                student(FEATURES)
            else:
                assert distiller(FEATURES)[1]["x"] > 0
        with torch.no_grad():
            distiller.eval()
            student(FEATURES)
            assert distiller(FEATURES)[1]["x"] > 0


def test_a_student_compiled_and_called_before_it_was_distilled_is_told_what_to_do(monkeypatch):
    torch._dynamo.reset()
    student = torch.compile(layers(8), backend="eager")
    student(FEATURES)
    distiller = vk.FeatureDistiller(student, layers(32), [LAYERS])
    with pytest.raises(RuntimeError, match=r"compiled and run before these hooks were there.*torch.compiler.reset\(\)"):
        distiller(FEATURES)
    torch.compiler.reset()
    assert distiller(FEATURES)[1]["x"] > 0


# ------------------------------------------------------------------------------------------- what a module returned


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(6, width, num_layers=2, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize(
    ("output", "pool"), [((1, 0, -1), None), ((1, 0), lambda h: h[-1]), (None, lambda returned: returned[1][0][-1])]
)
def test_an_lstms_state_by_a_path_or_a_function_of_what_it_returned(output, pool):
    pair = {"student": "lstm", "teacher": "lstm", "name": "x", "student_output": output, "teacher_output": output}
    pair |= {"student_pool": pool, "teacher_pool": pool}
    x = torch.randn(4, 3, 6)
    distiller = vk.FeatureDistiller(Recurrent(8), Recurrent(16), [pair], example_input=x)
    states = [model.lstm(x)[1][0][-1] for model in (distiller.student, distiller.teacher)]
    torch.testing.assert_close(distiller(x)[1]["x"], loss_like(distiller, "x", 8, 16)(*states))


def test_a_hidden_state_of_a_hugging_face_model_by_its_path():
    transformers = pytest.importorskip("transformers", reason="needs transformers (the extra integrations)")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
    models = [
        transformers.BertModel(transformers.BertConfig(hidden_size=h, intermediate_size=h, **sizes)).eval()
        for h in (16, 32)
    ]
    pair = {"student": "", "teacher": "", "name": "x", "student_pool": "tokens", "teacher_pool": "tokens"}
    pair |= {"student_output": ("hidden_states", 1), "teacher_output": ("hidden_states", -2)}
    batch = {"input_ids": torch.randint(50, (3, 7)), "output_hidden_states": True}
    distiller = vk.FeatureDistiller(*models, [pair], example_input=batch).eval()
    x, y = models[0](**batch).hidden_states[1], models[1](**batch).hidden_states[2]
    torch.testing.assert_close(distiller(**batch)[1]["x"], loss_like(distiller, "x", 16, 32)(x, y))
    with pytest.raises(TypeError, match="no entry 7 of student_output=.* tuple has the entries 0, 1"):
        vk.FeatureDistiller(*models, [{**pair, "student_output": ("hidden_states", 7)}], example_input=batch)


def test_one_call_of_a_module_that_runs_several_times():
    class Shared(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.stem, self.block = nn.Linear(6, width), nn.Linear(width, width)

        def forward(self, x):
            x = self.stem(x)
            for _ in range(3):
                x = self.block(x)
            return x

    pair = {"student": "block", "teacher": "block", "dims": (8, 16), "name": "x"}
    student, teacher = Shared(8), Shared(16)
    with pytest.raises(RuntimeError, match="ran 3 times.*say which call by student_call"):
        vk.FeatureDistiller(student, teacher, [pair])(FEATURES)
    distiller = vk.FeatureDistiller(student, teacher, [{**pair, "student_call": 1, "teacher_call": -1}])
    x = student.block(student.block(student.stem(FEATURES)))
    torch.testing.assert_close(distiller(FEATURES)[1]["x"], loss_like(distiller, "x", 8, 16)(x, teacher(FEATURES)))
    with pytest.raises(RuntimeError, match="call 3 of it is needed in every forward pass.*ran 3 times"):
        vk.FeatureDistiller(student, teacher, [{**pair, "student_call": 3, "teacher_call": -1}])(FEATURES)


# ------------------------------------------------------------------------------------------------ other ways of running


def test_data_parallel_is_refused_with_the_word_for_ddp():
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        distiller_of_layers()._replicate_for_data_parallel()  # which DataParallel calls where there are several GPUs


@pytest.mark.parametrize("student_too", [False, True])
def test_a_class_that_the_teacher_rules_out_adds_nothing_to_the_logit_loss(student_too):
    class RulesOut(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x).masked_fill(torch.tensor([False, True, False, False]), -torch.inf)

    student = RulesOut(layers(8)) if student_too else layers(8)
    distiller = vk.FeatureDistiller(student, RulesOut(layers(32)), [], logit_weight=1.0)
    x, y = (model(FEATURES).detach() for model in (distiller.student, distiller.teacher))
    keep = [0, 2, 3]
    log_q, log_p = (F.log_softmax(z, 1)[:, keep] for z in (x, y))
    expected = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    loss = distiller(FEATURES)[1]["logits"]
    torch.testing.assert_close(loss.detach(), expected)
    assert all(gradient.isfinite().all() for gradient in gradients(distiller, loss).values())
    assert distiller(FEATURES * torch.nan)[1]["logits"].isnan()


def test_a_scripted_module_inside_a_teacher_is_named_as_one_that_takes_no_hooks():
    class Teacher(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.jit.script(nn.Linear(6, 32))

        def forward(self, x):
            return self.body(x)

    pair = {"student": "0", "teacher": "body", "dims": (8, 32)}
    with pytest.raises(RuntimeError, match="'body' can't be seen. A scripted module takes no hooks"):
        vk.FeatureDistiller(layers(8), Teacher(), [pair])


@pytest.mark.parametrize("kind", ["scripted", "traced", "frozen", "exported"])
def test_scripted_and_exported_teachers(kind):
    teacher = CNN()
    kinds = {
        "scripted": lambda: torch.jit.script(teacher),
        "traced": lambda: torch.jit.trace(teacher.eval(), IMAGES),
        "frozen": lambda: torch.jit.freeze(torch.jit.script(teacher.eval())),
        "exported": lambda: torch.export.export(teacher.eval(), (IMAGES,)).module(),
    }
    pair = {"student": "head", "teacher": "", "name": "x"}
    distiller = make([pair], teacher=kinds[kind](), example_input=IMAGES)
    expected = loss_like(distiller, "x", 3, 3)(distiller.student(IMAGES), teacher.eval()(IMAGES))
    for _ in range(2):
        torch.testing.assert_close(distiller(IMAGES)[1]["x"], expected)
    assert not any(p.requires_grad for p in distiller.teacher.parameters())
    if kind != "frozen":
        inner = {**TOKENS_TO_MAP, "teacher": "bn", "name": "x"}
        reason = "A traced graph" if kind == "exported" else "TorchScript runs submodules without their hooks"
        with pytest.raises(RuntimeError, match=reason):
            make([inner], teacher=kinds[kind](), example_input=IMAGES)


@pytest.mark.parametrize("wrap", [lambda ddp: ddp, nn.Sequential, torch.compile], ids=["bare", "inside", "compiled"])
def test_a_student_that_ddp_has_wrapped_is_refused(wrap, tmp_path):
    """Each rank would train a projection of its own, without a word."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        student = wrap(nn.parallel.DistributedDataParallel(layers(8)))
        with pytest.raises(ValueError, match="wrap the distiller in DistributedDataParallel, not the student"):
            vk.FeatureDistiller(student, layers(32), [{"student": "", "teacher": "", "dims": (8, 32)}])
        vk.FeatureDistiller(student, layers(32), [], logit_weight=1.0)  # nothing here would be trained by each rank
        with pytest.raises(ValueError, match=r"nn\.DataParallel is not supported"):
            vk.FeatureDistiller(nn.DataParallel(layers(8)), layers(32), [], logit_weight=1.0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_channels_last_map_that_is_read_as_channels_first_is_warned_of(side):
    class Blocks(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Identity()

        def forward(self, x):
            return self.last(x.permute(0, 2, 3, 1)).mean((1, 2))

    other = "teacher" if side == "student" else "student"
    pair = {"student": "last", "teacher": "last", "student_pool": "spatial_mean", "teacher_pool": "spatial_mean"}
    pair[f"{other}_layout"] = "NHWC"
    images = torch.randn(2, 12, 7, 7)
    with pytest.warns(UserWarning, match=rf"\(N, 7, 7, 12\) and is read as 7 channels.* say {side}_layout='NHWC'"):
        vk.FeatureDistiller(Blocks(), Blocks(), [pair], example_input=images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vk.FeatureDistiller(Blocks(), Blocks(), [{**pair, f"{side}_layout": "NHWC"}], example_input=images)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_student_may_add_replace_and_take_out_entries_of_its_batch(mode):
    class TakesBatch(nn.Linear):
        def forward(self, batch):
            return super().forward(batch["x"])

    class Student(TakesBatch):
        def forward(self, batch):
            batch["mean"] = batch["x"].mean()
            batch["x"] = batch["x"].to(torch.float32, copy=True)  # as BatchEncoding.to does
            batch.pop("labels")
            return super().forward(batch)

    distiller = vk.FeatureDistiller(Student(6, 8), TakesBatch(6, 8), [], logit_weight=1.0)
    with mode():
        assert distiller({"x": FEATURES.clone(), "labels": torch.zeros(5)})[1]["total"].isfinite()


@pytest.mark.parametrize("kind", ["weights", "statistics", "dropout"])
def test_a_pool_that_would_have_to_be_trained_is_refused(kind):
    """It would stay as it was drawn: in no optimizer, no state dict and no .to(). A teacher's is fixed."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.pool = nn.Conv2d(3, 6, 1), nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1))

        def forward(self, images):
            return self.pool(self.conv(images).mean((2, 3)))

    student, teacher = Model(), Model()
    pair = {"student": "conv", "teacher": "conv", "student_pool": "spatial_mean", "teacher_pool": "spatial_mean"}
    mean = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    first = {"weights": nn.Conv2d(6, 8, 1), "statistics": nn.BatchNorm2d(6, affine=False), "dropout": nn.Dropout2d(0.1)}
    pool = nn.Sequential(first[kind], *mean)

    def make_with(**pools):
        return vk.FeatureDistiller(student, teacher, [{**pair, **pools}], example_input=IMAGES)

    part = type(first[kind]).__name__
    with pytest.raises(TypeError, match=f"student_pool is a Sequential, whose {part} would be neither trained"):
        make_with(student_pool=pool)
    if kind != "weights":
        with pytest.raises(ValueError, match=f"teacher_pool is a Sequential, whose {part} is in training mode"):
            make_with(teacher_pool=pool)
    make_with(teacher_pool=pool.eval())
    make_with(student_pool=nn.Sequential(*mean), teacher_pool=nn.Sequential(*mean))
    make_with(student_pool=nn.Sequential(*mean, student.pool), teacher_pool=nn.Sequential(*mean, teacher.pool))
    constant = nn.Flatten(2)
    constant.register_buffer("window", torch.ones(3), persistent=False)
    make_with(student_pool=nn.Sequential(constant, nn.AdaptiveAvgPool1d(1), nn.Flatten()))


@pytest.mark.parametrize("key", [None, "out", ("out", "map")])
def test_logits_of_every_position_have_classes_last_or_a_function_says_where(key):
    """Of (N, classes, H, W) the softmax was over the width."""

    class Segments(nn.Conv2d):
        def forward(self, images):
            output = super().forward(images)
            for step in reversed(path):
                output = {step: output}
            return output

    path = () if key is None else key if isinstance(key, tuple) else (key,)
    hint = "output" + "".join(f"[{step!r}]" for step in path)

    def logits(output):
        return eval(hint, {"output": output}).permute(0, 2, 3, 1)  # what the message says

    models = Segments(3, 5, 1), Segments(3, 5, 1)
    for sides in ([], ["student"], ["teacher"]):
        options = {f"{side}_logits": logits if side in sides else key for side in ("student", "teacher")}
        distiller = vk.FeatureDistiller(*models, [], logit_weight=1.0, **options)
        with pytest.raises(ValueError, match=r"of the shape \(5, 5, 8, 8\), and classes must come last") as error:
            distiller(IMAGES)
        assert f"{hint}.permute(0, 2, 3, 1)" in str(error.value)
    distiller = vk.FeatureDistiller(*models, [], logit_weight=1.0, student_logits=logits, teacher_logits=logits)
    log_q, log_p = (F.log_softmax(logits(model(IMAGES)), -1) for model in models)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    torch.testing.assert_close(distiller(IMAGES)[1]["logits"], expected)
