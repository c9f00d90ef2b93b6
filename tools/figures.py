"""Draws the figures of README and docs as SVG: `python tools/figures.py` writes docs/images/*.svg.

The evidence comes from benchmarks/results/fashion-mnist-8seeds.json; a test holds the committed files to this script.
"""

import json
import math
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
RECORD = ROOT / "benchmarks" / "results" / "fashion-mnist-8seeds.json"
INK, FAINT, STUDENT, TEACHER, OURS = "#1f2937", "#6b7280", "#2563eb", "#b45309", "#047857"
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


def svg(width: int, height: int, title: str, body: list[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    arrow = (
        "<defs><marker id='arrow' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        f"<path d='M0 0L8 4L0 8z' fill='{FAINT}'/></marker></defs>"
    )
    card = f"<rect width='{width}' height='{height}' rx='10' fill='white'/>"
    lines = [f"{head} role='img' {FONT}>", f"<title>{escape(title)}</title>", arrow, card, *body, "</svg>"]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, *, size: int = 14, color: str = INK, anchor: str = "middle") -> str:
    return f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' text-anchor='{anchor}'>{words}</text>"


def box(x: float, y: float, *, width: float, height: float, color: str, fill: str = "white") -> str:
    size = f"x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}'"
    return f"<rect {size} rx='6' fill='{fill}' stroke='{color}' stroke-width='1.8'/>"


def bars(x: float, y: float, *, count: int, color: str) -> list[str]:
    """A row of `count` channels, as cells: a feature vector."""
    cells = (f"<rect x='{x + 9 * i:g}' y='{y:g}' width='8' height='20' fill='{color}'" for i in range(count))
    return [f"{cell} opacity='{0.35 + 0.6 * ((i * 7) % 5) / 4:.2f}'/>" for i, cell in enumerate(cells)]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    line = f"x1='{x1:g}' y1='{y1:g}' x2='{x2:g}' y2='{y2:g}'"
    return f"<line {line} stroke='{FAINT}' stroke-width='1.6' marker-end='url(#arrow)'/>"


def method() -> str:
    top, bottom = 62, 222  # the student's row and the teacher's
    body = [
        text(52, 152, "images"),
        arrow(82, 136, 118, top + 42),
        arrow(82, 160, 118, bottom - 6),
        box(122, top - 8, width=96, height=56, color=STUDENT, fill="#eff6ff"),
        text(170, top + 16, "student", color=STUDENT),
        text(170, top + 35, "small, trained", size=12, color=FAINT),
        box(122, bottom - 34, width=96, height=84, color=TEACHER, fill="#fffbeb"),
        text(170, bottom + 6, "teacher", color=TEACHER),
        text(170, bottom + 25, "large, frozen", size=12, color=FAINT),
        arrow(222, top + 20, 256, top + 20),
        *bars(262, top + 10, count=5, color=STUDENT),
        text(284, top - 4, "features X"),
        text(284, top + 48, "S channels", size=12, color=FAINT),
        arrow(312, top + 20, 346, top + 20),
        box(350, top - 14, width=122, height=68, color=OURS, fill="#ecfdf5"),
        text(411, top + 11, "projection P", color=OURS),
        text(411, top + 31, "PᵀP = I, trained", size=12, color=FAINT),
        arrow(476, top + 20, 510, top + 20),
        *bars(516, top + 10, count=14, color=OURS),
        text(579, top - 4, "Z = X Pᵀ"),
        text(579, top + 48, "T channels", size=12, color=FAINT),
        arrow(222, bottom + 8, 256, bottom + 8),
        *bars(262, bottom - 2, count=14, color=TEACHER),
        text(325, bottom - 16, "features Y"),
        text(325, bottom + 36, "T channels", size=12, color=FAINT),
        arrow(394, bottom + 8, 510 - 96, bottom + 8),
        box(418, bottom - 22, width=150, height=60, color=TEACHER, fill="#fffbeb"),
        text(493, bottom + 3, "normalize", color=TEACHER),
        text(493, bottom + 22, "as the task asks for", size=12, color=FAINT),
        arrow(572, bottom + 8, 606, bottom + 8),
        *bars(612, bottom - 2, count=14, color=TEACHER),
        text(675, bottom - 16, "target"),
        arrow(648, top + 28, 762, 132),
        arrow(742, bottom - 4, 782, 172),
        box(766, 112, width=140, height=56, color=INK, fill="#f9fafb"),
        text(836, 136, "loss"),
        text(836, 155, "mean \u03c1(Z \u2212 target)", size=12, color=FAINT),
        text(480, 304, "P keeps every length and every angle between student features, so the student itself", size=13),
        text(
            480,
            323,
            "has to take on the teacher's geometry; a projection that may stretch could do it instead.",
            size=13,
        ),
    ]
    return svg(960, 340, "The method: student features, projected by a semi-orthogonal P, against the teacher's", body)


ARMS = {
    "alone": "student alone",
    "logits": "+ logits",
    "linear": "+ logits + linear projection",
    "vkd": "+ logits + V_kD, as published",
    "vkd-match": '+ logits + V_kD, scale="match"',
}


def evidence() -> str:
    record = json.loads(RECORD.read_text())
    left, right, step = 250, 800, 38
    values = [value for arm in ARMS for value in record["summary"][arm]["values"]]
    low, high = 2 * math.floor(min(values) / 2), 2 * math.ceil(max(values) / 2)

    def at(accuracy: float) -> float:
        return left + (right - left) * (accuracy - low) / (high - low)

    title = "Fashion-MNIST, 1000 labels: test accuracy of the same student, eight seeds"
    body = [text(24, 32, title, size=16, anchor="start")]
    bottom = 62 + step * len(ARMS)
    for tick in range(low, high + 1, 2):
        body.append(f"<line x1='{at(tick):g}' y1='52' x2='{at(tick):g}' y2='{bottom - 8}' stroke='#e5e7eb'/>")
        body.append(text(at(tick), bottom + 10, f"{tick} %", size=12, color=FAINT))
    for index, (arm, name) in enumerate(ARMS.items()):
        y = 74 + step * index
        summary = record["summary"][arm]
        color = OURS if arm.startswith("vkd") else FAINT
        body.append(text(left - 14, y + 5, escape(name), size=13, anchor="end"))
        for value in summary["values"]:
            body.append(f"<circle cx='{at(value):.1f}' cy='{y}' r='4' fill='{color}' opacity='0.45'/>")
        x = at(summary["mean"])
        body.append(f"<line x1='{x:.1f}' y1='{y - 11}' x2='{x:.1f}' y2='{y + 11}' stroke='{color}' stroke-width='3'/>")
        label = f"{summary['mean']:.1f} ± {summary['std']:.1f}"
        body.append(text(right + 16, y + 5, label, size=13, color=color, anchor="start"))
    note = "Dots are seeds, bars their mean; ± is the standard deviation. Every arm trains on the same seeds."
    body.append(text(24, bottom + 38, note, size=12, color=FAINT, anchor="start"))
    return svg(900, bottom + 54, "Test accuracy of five ways to train the same student", body)


STOPS = [
    ("loss.py", "OrthoProjLoss.forward: its weight P, its spec and its execution"),
    ("ops/ortho_proj_loss/api.py", "the public functions, and what they promise"),
    ("validation.py", "dtypes, shapes, devices, options: errors name the argument"),
    ("dispatch.py", "rows and their weights, statistics of all ranks, targets, scale"),
    ("reference.py, chunked.py, without_z.py or triton/", "loss(spec, inputs)"),
    ("ops/library.py", "the operator: the loss and its unscaled gradients in one pass"),
    ("ranks.py", "the sum over the ranks, in one collective"),
]


def architecture() -> str:
    body, left, width, step = [], 30, 520, 66
    for index, (where, what) in enumerate(STOPS):
        y = 24 + step * index
        body.append(box(left, y, width=width, height=46, color=STUDENT, fill="#eff6ff"))
        body.append(text(left + width / 2, y + 19, where, size=14))
        body.append(text(left + width / 2, y + 37, what, size=12, color=FAINT))
        if index:
            body.append(arrow(left + width / 2, y - 19, left + width / 2, y - 2))
    y = 24 + step * 3
    body.append(box(590, y, width=230, height=46, color=OURS, fill="#ecfdf5"))
    body.append(text(705, y + 19, "ops/implementations.py", size=14))
    body.append(text(705, y + 37, "decides which one serves", size=12, color=FAINT))
    body.append(arrow(left + width + 3, y + 16, 586, y + 16))
    body.append(arrow(587, y + 32, left + width + 4, y + 32))
    return svg(
        850, 24 + step * len(STOPS), "The life of a loss call, from OrthoProjLoss to the sum over the ranks", body
    )


FIGURES = {"method.svg": method, "evidence.svg": evidence, "architecture.svg": architecture}

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (IMAGES / name).write_text(draw())
        print(IMAGES / name)
