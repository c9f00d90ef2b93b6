"""Bad arguments for every public function; test_faults.py runs this in a process of its own, which may crash or hang.

Every call must end in a ValueError, TypeError or RuntimeError whose message has the name of a bad argument. Prints how
many did, and every call that did not.
"""

import collections
import os
import random
import re
import sys
import warnings

import numpy as np

os.environ.pop("TRITON_INTERPRET", None)  # with it, backend="triton" takes CPU tensors, and is no bad argument

import torch
from torch import nn

import vkd_kernels as vk

S, T, ROWS = 3, 5, (2, 4)


class Odd:
    """Neither comparable nor hashable."""

    __hash__ = None

    def __eq__(self, other):
        raise AssertionError("compared")

    def __repr__(self):
        return "Odd()"


THINGS = {
    "None": None,
    "int": 3,
    "float": 1.5,
    "str": "x",
    "empty str": "",
    "bytes": b"x",
    "True": True,
    "complex": 1j,
    "list": [[1.0]],
    "empty list": [],
    "tuple": (1, 2),
    "dict": {},
    "set": {1},
    "object": Odd(),
    "class": torch.Tensor,
    "function": len,
    "array": np.ones((2, 4, 3), dtype=np.float32),
    "numpy scalar": np.float32(1),
    "nan": float("nan"),
    "dtype": torch.float32,
    "generator": (i for i in ()),
    "module": nn.Linear(3, 5),
    "tensor": torch.ones(2),
}
NOT_FLOATING = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e5m2]
HALF, DOUBLE = [torch.float16, torch.bfloat16], [torch.float64]


def things(*, but=(), **more):
    return {name: value for name, value in {**THINGS, **more}.items() if name not in but}


def tensors(*shape, shapes, dtypes=(), but=(), meta=True):
    """What is no good where a floating-point tensor of `shape` is wanted: things, other dtypes, layouts, shapes."""
    good = torch.randn(*shape)
    wrong = {str(dtype): good.to(dtype) for dtype in (*NOT_FLOATING, *dtypes)}
    wrong |= {f"shape {other}": torch.randn(other) for other in shapes}
    wrong |= {"sparse": good.to_sparse(), "nested": torch.nested.nested_tensor([good, good])}
    wrong |= {"jagged": torch.nested.nested_tensor([good, good], layout=torch.jagged)}
    wrong |= {"meta": good.to("meta")} if meta else {}
    return things(but=(*but, "tensor"), **wrong)


def numbers(*, but=(), **more):
    no_number = things(but=("int", "float", *but), inf=float("inf"), huge=10**400)
    return {**no_number, "-inf": -float("inf"), **more}


NEGATIVE = {"-1": -1, "-1e-9": -1e-9, "-1e300": -1e300}
NAMES = things(typo="layernorm", upper="LAYER_NORM", space=" mse", array=np.array(["mse", "mse"]), names=["mse"])
DIMS = things(but=("int",), zero=0, huge=10**30, tensor=torch.tensor(3), array=np.array(3), **NEGATIVE)
OPTIONAL = ("None",)
GROUP = things(but=OPTIONAL, world="world", package=torch.distributed)
BACKEND = things(but=OPTIONAL, cuda="cuda", upper="TORCH", extension="extension", triton="triton")
ANY_BACKEND = {name: value for name, value in BACKEND.items() if name not in ("extension", "triton")}
CAYLEY_BACKEND = things(but=OPTIONAL, cuda="cuda", upper="TORCH", triton="triton")
MASK = tensors(*ROWS, shapes=[(), (8,), (4, 2), (2, 5), (2, 4, 1), (0,)], but=OPTIONAL)
del MASK["torch.bool"]
BETA, EPS = numbers(zero=0, **NEGATIVE), numbers(**NEGATIVE)
EPS_WHITEN = {**EPS, "above 1": 1.5}
MAPS = {**NAMES, "qr": "qr"}
DTYPE = things(
    but=("None", "dtype"), int64=torch.int64, half=torch.float16, bfloat16=torch.bfloat16, **{"c": torch.cfloat}
)
DEVICE = things(but=("None", "int", "True"), typo="cudaa", hip="nowhere:0")
CHANNELS = [(), (0,), (3,), (0, 4, 3), (2, 4, 0)]
LOSS_OPTIONS = {
    "normalization": {name: value for name, value in NAMES.items() if name != "module"},  # any module may stand there
    "loss": NAMES,
    "beta": BETA,
    "eps": EPS,
    "reduction": NAMES,
    "process_group": GROUP,
    "backend": BACKEND,
}
STUDENT = tensors(*ROWS, S, shapes=[*CHANNELS, (2, 4, 4), (2, 5, 3), (8, 3), (4, 2, 3)], dtypes=DOUBLE)
TEACHER = tensors(*ROWS, T, shapes=[(), (0,), (5,), (0, 4, 5), (2, 4, 4), (2, 5, 5), (8, 5), (4, 2, 5)], dtypes=DOUBLE)
WEIGHT = tensors(T, S, shapes=[(), (5,), (3, 5), (5, 4), (6, 3), (1, 5, 3), (0, 3), (5, 0)], dtypes=DOUBLE)
MATRIX = tensors(T, S, shapes=[(), (5,), (0, 3), (5, 0), (2, 0, 3)], dtypes=HALF, meta=False)
FEATURES = tensors(*ROWS, S, shapes=CHANNELS, meta=False)
DIAGNOSED = {
    "student": tensors(*ROWS, S, shapes=[*CHANNELS, (2, 5, 3), (8, 3), (4, 2, 3)]),
    "teacher": tensors(*ROWS, T, shapes=[(), (0,), (5,), (0, 4, 5), (2, 5, 5), (8, 5), (4, 2, 5)]),
    "mask": MASK,
}

student, teacher = torch.randn(*ROWS, S), torch.randn(*ROWS, T)
weight = vk.cayley(torch.randn(T, S))
module, linear, whitening = vk.OrthoProjLoss(S, T), vk.OrthogonalLinear(S, T), vk.Whitening(S, momentum=0.1)
distiller = vk.FeatureDistiller(
    nn.Sequential(nn.Linear(S, S)),
    nn.Sequential(nn.Linear(S, T)),
    [{"student": "0", "teacher": "0", "student_pool": "mean_tokens", "teacher_pool": "mean_tokens", "name": "x"}],
    example_input=student,
)


def inside(good, bad):
    """Lists of two whose second is bad."""
    return {f"second {kind}": [good, value] for kind, value in bad.items()}


def assign(weight):
    linear.weight = weight


# A message may name what the bad argument holds: the module's weight, the parameter of that name, the field of a pair.
ALSO = {
    ("orthogonal", "module"): ["weight"],
    ("orthogonal", "name"): ["bias"],
    ("FeatureDistiller", "pairs"): ["studnet"],
}


def also(name, argument):
    return [argument, *ALSO.get((name, argument), [])]


# name: (function, good arguments, {argument: bad values})
CALLS = {
    "ortho_proj_loss": (
        vk.functional.ortho_proj_loss,
        {"student": student, "teacher": teacher, "weight": weight},
        {
            "student": STUDENT,
            "teacher": TEACHER,
            "weight": WEIGHT,
            "mask": MASK,
            **LOSS_OPTIONS,
            "scale": numbers(but=OPTIONAL, tensor=torch.ones(3), column=torch.ones(T, 1), ints=torch.ones(T).int()),
            "bias": tensors(T, shapes=[(), (3,), (6,), (1, 5), (5, 1), (0,)], but=OPTIONAL),
        },
    ),
    "ortho_proj_losses": (
        vk.functional.ortho_proj_losses,
        {"students": [student] * 2, "teachers": [teacher] * 2, "weights": torch.stack([weight] * 2)},
        {
            "students": things(one=[student], of_one_kind=student, **inside(student, STUDENT)),
            "teachers": things(one=[teacher], of_one_kind=teacher, **inside(teacher, TEACHER)),
            "weights": tensors(2, T, S, shapes=[(), (5, 3), (2, 3, 5), (1, 5, 3), (3, 5, 3), (2, 0, 3)], dtypes=DOUBLE),
            "masks": things(but=OPTIONAL, one=[None], three=[None] * 3, **inside(None, MASK)),
            "scale": numbers(but=OPTIONAL, tensor=torch.ones(3), column=torch.ones(2, 1), ints=torch.ones(2).int()),
            "bias": tensors(2, T, shapes=[(), (3,), (5,), (1, 5), (2, 1), (0,)], but=OPTIONAL),
            **LOSS_OPTIONS,
        },
    ),
    "OrthoProjLoss": (
        vk.OrthoProjLoss,
        {"student_dim": S, "teacher_dim": T},
        {
            "student_dim": DIMS,
            "teacher_dim": DIMS,
            **LOSS_OPTIONS,
            "scale": numbers(typo="matched"),
            "backend": ANY_BACKEND,  # what the constructor knows; whether it can serve is seen with the tensors
            "orthogonal_map": MAPS,
            "projection": NAMES,
            "dtype": DTYPE,
            "device": DEVICE,
        },
    ),
    "OrthoProjLoss.for_task": (
        vk.OrthoProjLoss.for_task,
        {"task": "detection", "student_dim": S, "teacher_dim": T},
        {"task": NAMES},
    ),
    "OrthoProjLoss.forward": (
        module,
        {"student": student, "teacher": teacher},
        {"student": STUDENT, "teacher": TEACHER, "mask": MASK},
    ),
    "OrthogonalLinear": (
        vk.OrthogonalLinear,
        {"in_features": S, "out_features": T},
        {"in_features": DIMS, "out_features": DIMS, "orthogonal_map": MAPS, "dtype": DTYPE, "device": DEVICE},
    ),
    "OrthogonalLinear.forward": (
        linear,
        {"x": student},
        {"x": tensors(*ROWS, S, shapes=[(), (0,), (4,), (2, 4, 4), (3, 1)], dtypes=HALF)},
    ),
    "OrthogonalLinear.weight =": (
        assign,
        {"weight": weight},
        # Modules are nn.Module's own business: it registers them before a property is asked.
        {"weight": tensors(T, S, shapes=[(), (5,), (3, 5), (5, 4), (1, 5, 3), (0,)], but=("module",))},
    ),
    "orthogonal": (
        lambda module, name="weight", orthogonal_map="cayley": vk.orthogonal(module(), name, orthogonal_map),
        {"module": lambda: nn.Linear(S, T)},
        {
            "module": {
                **{name: (lambda value=value: value) for name, value in things(but=("module",)).items()},
                "float8": lambda: nn.Linear(S, T).to(torch.float8_e4m3fn),
                "complex weight": lambda: nn.Linear(S, T).to(torch.cfloat),
                "no weight": nn.Identity,
            },
            "name": things(bias="bias", typo="wieght", method="forward", private="_parameters"),
            "orthogonal_map": {name: value for name, value in MAPS.items() if value is not None},
        },
    ),
    "cayley": (vk.cayley, {"weight": weight}, {"weight": MATRIX, "backend": CAYLEY_BACKEND}),
    "cayley_inverse": (
        vk.functional.cayley_inverse,
        {"matrix": weight},
        {"matrix": {**MATRIX, "not orthonormal": torch.ones(T, S), "nan": torch.full((T, S), torch.nan)}},
    ),
    "standardize": (
        vk.functional.standardize,
        {"features": student},
        {"features": FEATURES, "mask": MASK, "eps": EPS, "process_group": GROUP},
    ),
    "whiten": (
        vk.functional.whiten,
        {"features": student},
        {"features": FEATURES, "method": NAMES, "mask": MASK, "eps": EPS_WHITEN, "process_group": GROUP},
    ),
    "Whitening": (
        vk.Whitening,
        {"num_features": S},
        {
            "num_features": DIMS,
            "method": NAMES,
            "eps": EPS_WHITEN,
            "process_group": GROUP,
            "momentum": numbers(but=OPTIONAL, zero=0, above=1.5, **NEGATIVE),
        },
    ),
    "Whitening.forward": (
        whitening,
        {"features": student},
        {"features": {**FEATURES, "shape (2, 4, 4)": torch.randn(2, 4, 4)}, "mask": MASK},
    ),
    "Standardization": (
        vk.Standardization,
        {"num_features": S},
        {
            "num_features": DIMS,
            "eps": EPS,
            "process_group": GROUP,
            "isotropic": things(but=("True",)),
            "momentum": numbers(but=OPTIONAL, zero=0, above=1.5, **NEGATIVE),
        },
    ),
    "Standardization.forward": (
        vk.Standardization(S),
        {"features": student},
        {"features": {**FEATURES, "shape (2, 4, 4)": torch.randn(2, 4, 4)}, "mask": MASK},
    ),
    "FeatureDistiller": (
        vk.FeatureDistiller,
        {
            "student": nn.Sequential(nn.Linear(4, S)),
            "teacher": nn.Sequential(nn.Linear(4, T)),
            "pairs": [{"student": "0", "teacher": "0", "dims": (S, T)}],
        },
        {
            "student": things(but=("module",)),
            "teacher": things(but=("module",)),
            "pairs": things(strings=["0"], none=[None], typo=[{"studnet": "0", "pairs": "0"}]),
            "example_teacher_input": things(but=OPTIONAL),
            "logit_weight": numbers(but=OPTIONAL),
            "temperature": numbers(zero=0, **NEGATIVE),
            "process_group": GROUP,
            "backend": ANY_BACKEND,
        },
    ),
    "FeatureDistiller.forward": (
        lambda masks=None, metrics=False: distiller(student, masks=masks, metrics=metrics),
        {},
        {
            "masks": {
                **things(but=("None", "dict")),
                "typo": {"y": None},
                "two typos": {"x": None, 3: None},
                **{f"of {kind}": {"x": value} for kind, value in things(but=("None", "tensor")).items()},
                "three": {"x": [None] * 3},
                "one thing": {"x": (None, 3)},
            },
            "metrics": things(but=("True",)),
        },
    ),
    "FeatureDistiller.projection": (distiller.projection, {"name": "x"}, {"name": things(but=("str",), typo="y")}),
    "diagnostics.orthogonality_error": (
        vk.diagnostics.orthogonality_error,
        {"weight": weight},
        {"weight": tensors(T, S, shapes=[(), (5,), (0, 3), (5, 0), (2, 0, 3)], meta=False)},
    ),
    "diagnostics.effective_rank": (
        vk.diagnostics.effective_rank,
        {"features": student},
        {"features": FEATURES, "mask": MASK, "process_group": GROUP},
    ),
    "diagnostics.cka": (
        vk.diagnostics.cka,
        {"student": student, "teacher": teacher},
        {**DIAGNOSED, "debiased": things(but=("True",)), "process_group": GROUP},
    ),
    "diagnostics.metrics": (
        vk.diagnostics.metrics,
        {"student": student, "teacher": teacher, "weight": weight},
        {
            **DIAGNOSED,
            "process_group": GROUP,
            "weight": tensors(T, S, shapes=[(), (5,), (3, 5), (5, 4), (6, 3), (1, 5, 3), (0, 3), (5, 0)], meta=False),
        },
    ),
    "OrthoProjLoss.metrics": (module.metrics, {"student": student, "teacher": teacher}, DIAGNOSED),
}


def calls():
    """(label, function, arguments, names of the bad ones): one bad, one missing, one too many; then two bad ones."""
    for name, (function, good, bad) in CALLS.items():
        for argument, values in bad.items():
            for kind, value in values.items():
                yield f"{name}({argument}={kind})", function, {**good, argument: value}, also(name, argument)
        yield f"{name}(unknown)", function, {**good, "unknown": 1}, ["unknown"]
        for argument in good:
            rest = {key: value for key, value in good.items() if key != argument}
            yield f"{name}(no {argument})", function, rest, [argument]
    draw = random.Random(0)
    several = [name for name, (_, _, bad) in CALLS.items() if len(bad) > 1]
    pairs = set()
    while len(pairs) < 1000:
        name = draw.choice(several)
        _, _, bad = CALLS[name]
        arguments = sorted(draw.sample(sorted(bad), 2))
        pairs.add((name, *((argument, draw.choice(list(bad[argument]))) for argument in arguments)))
    for name, *kinds in sorted(pairs):
        function, good, bad = CALLS[name]
        changes = {argument: bad[argument][kind] for argument, kind in kinds}
        label = ", ".join(f"{argument}={kind}" for argument, kind in kinds)
        yield (
            f"{name}({label})",
            function,
            {**good, **changes},
            [x for argument in changes for x in also(name, argument)],
        )


def outcome(function, arguments, names):
    """What the call ended in, and what is wrong with that (or None)."""
    try:
        function(**arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        named = any(re.search(rf"\b{name}\b", str(error), re.IGNORECASE) for name in names)
        return type(error).__name__, None if named else f"names none of {names}: {error!r}"
    except Exception as error:
        return type(error).__name__, repr(error)
    return "accepted", "no error"


def main():
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for function, good, _ in CALLS.values():
        function(**good)
    endings, wrong, seen = collections.Counter(), [], set()
    for label, function, arguments, names in calls():
        assert label not in seen, label
        seen.add(label)
        ended, complaint = outcome(function, arguments, names)
        endings[ended] += 1
        if complaint:
            wrong.append(f"{label}: {complaint[:300]}")
    print(f"{len(seen)} distinct bad calls of {len(CALLS)} functions: {dict(endings)}; {len(wrong)} wrong")
    print("\n".join(wrong))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
