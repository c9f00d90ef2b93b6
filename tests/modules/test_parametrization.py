"""orthogonal() and the state of orthogonal maps: assignment, averages, casts, checkpoints, transformers, 16 bit."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parameters_to_vector, parametrizations, parametrize

import vkd_kernels as vk
from vkd_kernels.parametrization import OrthogonalWeight

MAPS = ["cayley", "matrix_exp", "householder"]
SHAPES = [(9, 4), (5, 5), (3, 8)]


def orthogonality_error(p):
    return vk.diagnostics.orthogonality_error(p.detach()).item()


def layer_of(t, s, orthogonal_map="cayley"):
    return vk.orthogonal(nn.Linear(s, t, bias=False), orthogonal_map=orthogonal_map)


def with_other_signs(module):
    """The module with a matrix whose signs no fresh one has."""
    weight = module.weight.detach()
    module.weight = -torch.eye(*weight.shape[-2:]).expand(weight.shape)
    return module


# ------------------------------------------------------------------------------------------------------- assignment


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize(
    ("shape", "new"), [((7, 4), (7, 1)), ((7, 4), (8, 4)), ((4, 7), (1, 7)), ((5, 4), (4, 4)), ((3, 6, 4), (6, 4))]
)
def test_assigning_another_shape_is_refused_before_anything_changes(shape, new, orthogonal_map):
    holder = nn.Module()
    holder.weight = nn.Parameter(torch.randn(shape))
    vk.orthogonal(holder, orthogonal_map=orthogonal_map)
    modules = [holder]
    if len(shape) == 2:
        modules.append(vk.OrthogonalLinear(shape[1], shape[0], orthogonal_map=orthogonal_map))
    for module in modules:
        before = copy.deepcopy(module.state_dict())
        with pytest.raises(ValueError, match=r"weight takes a tensor of shape \(.*\); got a float32 tensor of shape"):
            module.weight = torch.randn(new)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("wrong", [torch.randn(7, 4).double(), torch.full((7, 4), torch.nan), [[0.0] * 4] * 7, None])
def test_a_refused_assignment_changes_nothing(wrong, orthogonal_map):
    layer = with_other_signs(layer_of(7, 4, orthogonal_map))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises((TypeError, ValueError), match="weight"):
        layer.weight = wrong
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
def test_a_matrix_without_full_rank_is_refused(shape, orthogonal_map):
    """Of zeros, as of a collapsed projection, or of dependent columns nothing can be kept; of small ones it can."""
    full = torch.randn(7, 4)
    dependent, small = full.clone(), full * torch.tensor([1e-12, 1.0, 1.0, 1e12])
    dependent[:, 2] = dependent[:, 0] - 3 * dependent[:, 1]
    wide = shape[0] < shape[1]
    for layer in (layer_of(*shape, orthogonal_map), vk.OrthoProjLoss(shape[1], shape[0]).projection):
        before = copy.deepcopy(layer.state_dict())
        for wrong, count in ((torch.zeros(7, 4), 4), (dependent, 1)):
            with pytest.raises(ValueError, match=f"full rank, .*: {count} of its columns .* are zero or depend"):
                layer.weight = wrong.T if wide else wrong
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        layer.weight = small.T if wide else small


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_the_weight_of_an_old_layer_is_assigned_as_the_migration_page_shows(orthogonal_map):
    old = nn.Linear(4, 7, bias=False)
    nn.init.orthogonal_(old.weight)
    loss = vk.OrthoProjLoss(4, 7, orthogonal_map=orthogonal_map)
    for module in (loss.projection, layer_of(7, 4, orthogonal_map)):
        module.weight = old.weight  # a Parameter
        torch.testing.assert_close(module.weight, old.weight, rtol=0, atol=2e-6)
        assert old.weight.requires_grad and all(p is not old.weight for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scale_folded_into_the_weight_is_refused(dtype):
    """It would be lost in the orthonormal factor."""
    layer = layer_of(7, 4).to(dtype)
    layer.weight = nn.Parameter(layer.weight.detach())
    before = layer.weight.detach().clone()
    norm = nn.BatchNorm1d(7, dtype=dtype)
    nn.init.constant_(norm.weight, 1.5)
    with pytest.raises(ValueError, match=r"weight is kept semi-orthogonal.* is 1\.\de\+00\. Assign a tensor"):
        nn.utils.fusion.fuse_linear_bn_eval(layer.eval(), norm.eval())
    assert torch.equal(layer.weight, before)


def test_a_parameter_beside_the_weight_is_registered_as_ever():
    layer = layer_of(7, 4)
    layer.extra = nn.Parameter(torch.ones(2))
    assert "extra" in dict(layer.named_parameters())
    twin = copy.deepcopy(layer)
    twin.weight = nn.Parameter(torch.eye(7, 4))
    assert not torch.equal(twin.weight, layer.weight)


# ------------------------------------------------------------------------------------------------- drop-in for PyTorch


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_parameter_is_contiguous_for_those_who_flatten_or_save_it(shape, orthogonal_map):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = layer_of(*shape, orthogonal_map)
    layer.weight = nn.init.orthogonal_(torch.empty(shape))
    assert layer.parametrizations.weight.original.is_contiguous() and layer.weight.is_contiguous()
    parameters_to_vector(layer.parameters())
    safetensors.save(layer.state_dict())
    optimizer = torch.optim.LBFGS(layer.parameters())
    x = torch.randn(6, shape[1])

    def closure():
        optimizer.zero_grad()
        loss = layer(x).square()[:, 0].mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert orthogonality_error(layer.weight) <= 1e-5
    parametrize.remove_parametrizations(layer, "weight")
    assert layer.weight.is_contiguous() and orthogonality_error(layer.weight) <= 1e-5


def test_the_options_of_pytorchs_orthogonal_are_taken():
    for options in ({}, {"orthogonal_map": None}, {"use_trivialization": False}, {"use_trivialization": True}):
        layer = vk.orthogonal(nn.Linear(4, 7, bias=False), "weight", **options)
        target = nn.init.orthogonal_(torch.empty(7, 4))
        layer.weight = target
        torch.testing.assert_close(layer.weight, target, rtol=0, atol=2e-6)
    layer = vk.orthogonal(nn.Linear(4, 4), orthogonal_map="matrix_exp", use_trivialization=False)
    with pytest.raises(NotImplementedError, match="use_trivialization=False"):  # as with PyTorch's
        layer.weight = torch.eye(4)
    with pytest.raises(TypeError, match="use_trivialization must be True or False; got str 'no'"):
        vk.orthogonal(nn.Linear(4, 4), use_trivialization="no")


# --------------------------------------------------------------------------------------- signs: averages, casts, copies


@pytest.mark.parametrize("make", [lambda: vk.OrthogonalLinear(4, 9), lambda: layer_of(9, 4)])
def test_casts_do_not_touch_the_signs(make):
    module = with_other_signs(make())
    before = module.weight.detach()
    for cast in (module.bfloat16, module.half, module.float, module.double, module.float):
        cast()
        assert orthogonality_error(module.weight.float()) <= 1e-2  # 16-bit weights of a layer are rounded
    torch.testing.assert_close(module.weight, before, rtol=0, atol=2e-2)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999, 0.9999])
@pytest.mark.parametrize("make", [lambda: vk.OrthogonalLinear(4, 9), lambda: layer_of(9, 4)])
def test_averages_with_buffers_keep_the_signs(make, decay):
    model = with_other_signs(make())
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    ema = torch.optim.swa_utils.AveragedModel(
        model, avg_fn=lambda mean, new, _: decay * mean + (1 - decay) * new, use_buffers=True
    )
    by_hand = copy.deepcopy(model.state_dict())
    for _ in range(50):
        averaged.update_parameters(model)
        ema.update_parameters(model)
        for name, value in model.state_dict().items():  # as timm's ModelEmaV2 does
            by_hand[name].copy_(decay * by_hand[name] + (1 - decay) * value)
    loaded = make()
    loaded.load_state_dict(by_hand)
    soup = make()
    soup.load_state_dict({name: (value + value.float()) / 2 for name, value in model.state_dict().items()})
    for module in (averaged.module, ema.module, loaded, soup):
        torch.testing.assert_close(module.weight, model.weight, rtol=0, atol=1e-4)


def test_an_average_of_different_signs_is_refused():
    one, other = vk.OrthogonalLinear(4, 9), with_other_signs(vk.OrthogonalLinear(4, 9))
    soup = {name: (value.float() + other.state_dict()[name]) / 2 for name, value in one.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="average of weights whose signs differ is no matrix"):
            one.load_state_dict(soup, strict=strict)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_copying_parameters_between_fresh_modules_copies_the_matrix(shape, dtype):
    t, s = shape
    source, target = (vk.OrthoProjLoss(s, t).to(dtype) for _ in range(2))
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q)
    assert torch.equal(target.projection.weight, source.projection.weight)


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("make", [lambda m: vk.OrthoProjLoss(4, 9, orthogonal_map=m), lambda m: layer_of(9, 4, m)])
def test_parameters_without_buffers_or_buffers_without_parameters_do_not_load(make, orthogonal_map, strict):
    source, target = make(orthogonal_map), nn.ModuleDict({"loss": make(orthogonal_map)})
    before = copy.deepcopy(target.state_dict())
    for half in (dict(source.named_parameters()), dict(source.named_buffers())):
        with pytest.raises(
            RuntimeError, match=r"without .* would be another matrix: load the module's whole state_dict"
        ):
            target.load_state_dict({f"loss.{name}": value for name, value in half.items()}, strict=strict)
    if strict is False:
        target.load_state_dict({}, strict=False)
    # What PyTorch copied before it raised is refused again, not used: the matrix is one of both.
    target.load_state_dict(before)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_checkpoints_with_float_signs_still_load(shape, assign):
    source = with_other_signs(vk.OrthogonalLinear(shape[1], shape[0]))
    old = {**source.state_dict(), "map.signs": source.map.signs.sign().float()}
    target = vk.OrthogonalLinear(shape[1], shape[0])
    target.load_state_dict(old, assign=assign)
    assert torch.equal(target.weight, source.weight) and target.map.signs.dtype == torch.int8
    with torch.no_grad():  # loaders that copy into tensors, as distributed checkpoints do
        target.map.signs.copy_(old["map.signs"])
    assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(16, 4), (5, 5), (3, 8), (1, 1), (2, 6, 4)])
def test_a_checkpoint_of_pytorchs_own_orthogonal_is_converted(shape, trained, strict):
    def holder(make):
        module = nn.Module()
        module.weight = nn.Parameter(torch.randn(shape))
        return nn.Sequential(make(module))

    old, new = holder(parametrizations.orthogonal), holder(vk.orthogonal)
    if trained:
        with torch.no_grad():
            old[0].parametrizations.weight.original.add_(0.1 * torch.randn(shape).tril(-1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = new.load_state_dict(old.state_dict(), strict=strict)
    # Only a trained one may be of another map than the default, which the checkpoint doesn't say.
    of_unknown_map = trained and shape != (1, 1)
    assert [w for w in caught if "orthogonal and is converted as by" in str(w.message)] or not of_unknown_map
    assert of_unknown_map or not caught
    assert not result.missing_keys and not result.unexpected_keys
    torch.testing.assert_close(new[0].weight, old[0].weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "householder"])
def test_a_checkpoint_of_pytorchs_own_map_loads_into_the_same_map(orthogonal_map):
    old = parametrizations.orthogonal(nn.Linear(4, 9), orthogonal_map=orthogonal_map)
    new = vk.orthogonal(nn.Linear(4, 9), orthogonal_map=orthogonal_map)
    new.load_state_dict(old.state_dict())
    torch.testing.assert_close(new.weight, old.weight, rtol=0, atol=1e-6)


def test_a_collapsed_checkpoint_of_pytorchs_householder_map_is_refused():
    old = parametrizations.orthogonal(nn.Linear(4, 9, bias=False))
    with torch.no_grad():
        old.parametrizations.weight.original.mul_(0.99)  # weight decay: the truncated diagonal is 0
    with pytest.raises(RuntimeError, match="not semi-orthogonal.*Weight decay does that"):
        layer_of(9, 4).load_state_dict(old.state_dict(), strict=False)


@pytest.mark.parametrize("orthogonal_map", MAPS)
def test_a_layer_round_trips_through_torch_save(orthogonal_map):
    layer, other = with_other_signs(layer_of(9, 4, orthogonal_map)), layer_of(9, 4, orthogonal_map)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.weight, layer.weight)


# ---------------------------------------------------------------------------------------------------------- 16 bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_orthogonal_layer_in_16_bit(shape, orthogonal_map, dtype):
    """As a model's .bfloat16(), DeepSpeed's bf16 and FSDP2's param_dtype make it."""
    t, s = shape
    x = torch.randn(5, s, dtype=dtype)
    for layer in (
        layer_of(t, s, orthogonal_map).to(dtype),
        vk.orthogonal(nn.Linear(s, t, bias=False).to(dtype), orthogonal_map=orthogonal_map),
    ):
        eps = torch.finfo(dtype).eps
        assert layer.weight.dtype == dtype and orthogonality_error(layer.weight) <= 2 * eps
        layer(x).float().square()[:, 0].sum().backward()
        original = layer.parametrizations.weight.original
        assert original.dtype == dtype and original.grad.isfinite().all()
        target = nn.init.orthogonal_(torch.empty(t, s)).to(dtype)
        layer.weight = target
        torch.testing.assert_close(layer.weight, target, rtol=0, atol=4 * eps)
    loss = vk.OrthoProjLoss(s, t, orthogonal_map=orthogonal_map).to(dtype)
    loss.projection.weight = target
    torch.testing.assert_close(loss.projection.weight, target.float(), rtol=0, atol=4 * eps)
    loss.reset_parameters()
    assert orthogonality_error(loss.projection.weight) <= 1e-5  # of a float32 matrix from a 16-bit parameter


# ------------------------------------------------------------------------------------- the meta device, transformers


@pytest.mark.parametrize("make", [lambda: vk.OrthoProjLoss(16, 40), lambda: layer_of(40, 16)])
def test_a_module_that_nobody_initialized_says_so(make):
    with torch.device("meta"):
        module = make()
    module.to_empty(device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data.zero_()  # fresh memory
    x = torch.randn(3, 16)
    with pytest.raises(RuntimeError, match=r"never initialized.*reset_parameters\(\).*_init_weights"):
        module(x, torch.randn(3, 40)) if isinstance(module, vk.OrthoProjLoss) else module(x)
    for part in module.modules():
        if isinstance(part, (vk.OrthoProjLoss, OrthogonalWeight)):
            part.reset_parameters()
    weight = module.projection.weight if isinstance(module, vk.OrthoProjLoss) else module.weight
    assert orthogonality_error(weight) <= 1e-5


def bert_with_projections(initialize):
    transformers = pytest.importorskip("transformers")

    class Student(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.distill = vk.OrthoProjLoss(config.hidden_size, 64, scale="learned", affine=True)
            targets = vk.Standardization(64, momentum=0.1)
            self.compared = vk.OrthoProjLoss(config.hidden_size, 64, projection="linear", normalization=targets)
            self.layer = vk.orthogonal(nn.Linear(16, 64, bias=False))
            self.post_init()

        def _init_weights(self, module):
            super()._init_weights(module)
            kinds = (vk.OrthoProjLoss, vk.OrthogonalLinear, OrthogonalWeight, vk.Standardization, vk.Whitening)
            if initialize and isinstance(module, kinds):
                module.reset_parameters()

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    config = transformers.BertConfig(hidden_size=16, intermediate_size=32, **small)
    return Student, transformers.BertModel(config)


@pytest.fixture
def dirty_memory(monkeypatch):
    """torch.empty full of what earlier programs left."""
    empty_like = torch.empty_like

    def dirty(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        if not tensor.is_meta:
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
        return tensor

    monkeypatch.setattr(torch, "empty_like", dirty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_pretrained_of_a_model_with_projections(tmp_path, dirty_memory, dtype):
    build, bare = bert_with_projections(initialize=True)
    bare.save_pretrained(tmp_path / "bare")
    model = build.from_pretrained(tmp_path / "bare", dtype=dtype)
    x, y = torch.randn(6, 16, dtype=dtype), torch.randn(6, 64, dtype=dtype)
    assert orthogonality_error(model.distill.projection.weight) <= 1e-5
    assert orthogonality_error(model.layer.weight) <= (1e-5 if dtype == torch.float32 else 2e-2)
    assert model.distill.scale.item() == 2.0 and bool((model.distill.projection.gain == 1).all())
    targets = model.compared.normalization
    fresh = vk.Standardization(64, momentum=0.1).state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in targets.state_dict().items())
    assert model.distill(x, y).isfinite() and model.train().compared(x, y).isfinite()
    targets.freeze()
    model.distill.projection.weight = -torch.eye(64, 16)
    model.save_pretrained(tmp_path / "whole")
    again = build.from_pretrained(tmp_path / "whole", dtype=dtype)  # what was loaded is not initialized again
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again.distill(x, y), model.distill(x, y))
    assert again.train().compared(x, y + 1).isfinite()
    assert torch.equal(again.compared.normalization.running_mean, targets.running_mean)  # frozen, as it was saved
    again.distill.reset_parameters()  # and a reset by hand is one
    assert not torch.equal(again.distill.projection.weight, model.distill.projection.weight)


def test_from_pretrained_without_init_weights_is_an_error(tmp_path, dirty_memory):
    build, bare = bert_with_projections(initialize=False)
    bare.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"never initialized.*_init_weights"):
        model = build.from_pretrained(tmp_path)
        model.distill(torch.randn(6, 16), torch.randn(6, 64))


def test_loading_and_using_a_module_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = layer_of(9, 4)
        layer.load_state_dict(layer_of(9, 4).state_dict())
        layer(torch.randn(3, 4)).sum().backward()


def test_a_student_with_orthogonal_layers_folds_for_export(tmp_path):
    student = nn.Sequential(nn.Linear(6, 8), vk.OrthogonalLinear(8, 16), nn.GELU(), layer_of(3, 16)).eval()
    x = torch.randn(2, 6)
    expected = student(x)
    for name, module in list(student.named_modules()):
        if isinstance(module, vk.OrthogonalLinear):
            student.set_submodule(name, module.to_linear())
        elif parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight")
    assert all(type(module) in (nn.Sequential, nn.Linear, nn.GELU) for module in student.modules())
    for strict in (False, True):
        exported = torch.export.export(student, (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), expected)
        assert not [node for node in exported.graph.nodes if "vkd" in str(node.target) or "linalg" in str(node.target)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.script(student).save(tmp_path / "student.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "student.pt")(x), expected)
    pytest.importorskip("onnx", reason="torch.onnx.export needs onnx and onnxscript")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(student, (x,), dynamo=True, verbose=False)
    assert {node.op_type for node in program.model.graph} <= {"Gemm", "MatMul", "Add", "Gelu", "Transpose"}
    pytest.importorskip("onnxruntime")
    torch.testing.assert_close(program(x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_stacked_parametrization_is_loaded_whole_too():
    """Without its signs the weight would be another matrix, whatever strict says."""

    def stacked():
        return parametrizations.spectral_norm(vk.orthogonal(nn.Linear(4, 9))).eval()

    layer = vk.orthogonal(nn.Linear(4, 9))
    layer.weight = -layer.weight.detach()
    parametrizations.spectral_norm(layer).eval()
    loaded = stacked()
    loaded.load_state_dict(layer.state_dict())
    torch.testing.assert_close(loaded.weight, layer.weight)
    without = {key: value for key, value in layer.state_dict().items() if not key.endswith("signs")}
    with pytest.raises(RuntimeError, match="without parametrizations.weight.0.signs would be another matrix"):
        stacked().load_state_dict(without, strict=False)


def test_modules_are_built_of_fake_tensors():
    """As tools do that estimate a model's memory."""
    with FakeTensorMode():
        for layer in (vk.OrthogonalLinear(4, 9), *(vk.orthogonal(nn.Linear(4, 9), orthogonal_map=m) for m in MAPS)):
            assert layer(torch.randn(2, 4)).shape == (2, 9)
        loss = vk.OrthoProjLoss(4, 9, scale="learned")
        assert loss(torch.randn(2, 4), torch.randn(2, 9)).shape == ()
