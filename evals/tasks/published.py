"""What the field's papers measure, as presets, and the figures that they published: facts about others, never ours.

The tasks are those of lmms-eval that can be scored without a server: papers report VQAv2 on test-dev and all of
EgoSchema, which only their servers can score. A budget of the papers is a count of tokens where images have a fixed
number of them (576 for LLaVA-1.5, up to 2880 for LLaVA-NeXT), and a share for videos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vtprune import registry
from vtprune.evals.accuracy.plans import parse_method
from vtprune.evals.report import Report, Row, show

TITLE = "Published by others; not measured here"
NOTES = (
    "dense: what the same source says of the unpruned model. relative: value / dense where both are scores; some "
    "sources give only this. Harnesses, prompts and budgets differ between sources, so compare inside one only.",
    "secondary: read in a text by others, not in the paper, its code or its page.",
)


@dataclass(frozen=True)
class Preset:
    """A published protocol: the budgets and the lmms-eval tasks; `models`: what the papers apply it to."""

    models: str
    keeps: tuple[float | int, ...]
    tasks: tuple[str, ...]


IMAGE_TASKS = ("gqa", "mmbench_en_dev", "mme", "pope", "scienceqa_img", "vqav2_val", "vizwiz_vqa_val")
PRESETS = {
    "llava-1.5": Preset("LLaVA-1.5", (192, 128, 64), (*IMAGE_TASKS, "textvqa_val")),
    "llava-next": Preset("LLaVA-NeXT", (640, 320, 160), (*IMAGE_TASKS, "mmbench_cn_dev")),
    "video": Preset(
        "LLaVA-OneVision, LLaVA-Video",
        (0.25, 0.2, 0.15, 0.1),
        ("mvbench", "egoschema_subset", "longvideobench_val_v", "mlvu_dev", "videomme"),
    ),
}


@dataclass(frozen=True)
class Figure:
    """One published number.

    kept: the budget as the source words it. dense: the score of the unpruned model, None where `value` is already in
    percent of it. by: the method whose authors published it, which may be others than those of `method`. how: where
    they did, or "secondary".
    """

    preset: str
    method: str
    model: str
    kept: str
    benchmark: str
    value: float
    dense: float | None
    by: str
    how: str

    @property
    def row(self) -> Row:
        """The figure as a row, with the address of the source's paper."""
        relative = self.value if self.dense is None else round(100 * self.value / self.dense, 1)
        return {
            "method": self.method,
            "model": self.model,
            "kept": self.kept,
            "benchmark": self.benchmark,
            "value": None if self.dense is None else self.value,
            "dense": self.dense,
            "relative": relative,
            "how": self.how,
            "source": registry.get(self.by).paper,
        }


def figures_for(preset: str, methods: Iterable[str]) -> list[Row]:
    """The published figures of a preset for some methods, as rows; none for methods of which none is known.

    methods: names, options behind a colon are left out. Raises ValueError for an unknown preset.
    """
    names = {parse_method(text)[0] for text in methods}
    preset_of(preset)
    return [figure.row for figure in FIGURES if figure.preset == preset and figure.method in names]


def preset_of(name: str) -> Preset:
    """The preset of that name; ValueError, with all names, for another one."""
    if name not in PRESETS:
        raise ValueError(f"no preset is called {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]


class Published(Report):
    """Figures of others as a table."""

    def cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["method", "model", "kept", "benchmark", "value", "dense", "relative, %", "how", "source"]
        names = [name.removesuffix(", %") for name in header]
        return header, [[_cell(row[name]) for name in names] for row in self.rows]


def _cell(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else show(value)


def published(preset: str, methods: Iterable[str]) -> Published:
    """The table of `figures_for`, under a title that lets nobody take it for a measurement of this run."""
    return Published(f"{TITLE}: {preset}", figures_for(preset, methods), {}, NOTES)


def _table(
    preset: str,
    by: str,
    how: str,
    model: str,
    columns: dict[str, float | None],
    lines: dict[tuple[str, str], list[float]],
) -> list[Figure]:
    """Figures of one source. columns: benchmark -> dense score; lines: (method, kept) -> a value for each column."""
    return [
        Figure(preset, method, model, kept, benchmark, value, dense, by, how)
        for (method, kept), values in lines.items()
        for (benchmark, dense), value in zip(columns.items(), values, strict=True)
    ]


_EIGHT = "mean of MME, ScienceQA, GQA, POPE, MMBench en and cn, VizWiz, VQAv2"
_FOUR = "mean of VideoMME, EgoSchema, MLVU, LongVideoBench"
_ONEVISION = "LLaVA-OneVision-7B"
FIGURES: list[Figure] = [
    *_table("llava-1.5", "recoverable", "README", "LLaVA-1.5-7B", {
        "ScienceQA": 68.40, "TextVQA": 58.20, "MME": 1476.9, "VQAv2": 79.10, "POPE": 86.40, "MMBench": 66.10,
    }, {("recoverable", "about 10 %"): [69.01, 55.51, 1284.9, 70.41, 72.00, 57.90]}),
    *_table("llava-1.5", "divprune", "secondary", "LLaVA-1.5-7B", {"COCO CIDEr": None, "POPE F1": None}, {
        ("divprune", "about 16 % of the FLOPs"): [87.3, 100.18],
    }),
    *_table("llava-1.5", "visionzip", "README", "not stated", {"mean": None}, {("visionzip", "10 %"): [95.0]}),
    *_table("llava-next", "todre", "paper", "LLaVA-NeXT-7B", {_EIGHT: None}, {
        ("fastv", "25 %"): [95.4], ("sparsevlm", "25 %"): [93.1], ("cls_topk", "25 %"): [96.0],
        ("divprune", "25 %"): [96.6], ("todre", "25 %"): [98.2],
        ("fastv", "10 %"): [88.8], ("sparsevlm", "10 %"): [86.3], ("cls_topk", "10 %"): [91.4],
        ("divprune", "10 %"): [93.5], ("todre", "10 %"): [95.0],
    }),
    *_table("llava-next", "todre", "paper", "LLaVA-NeXT-13B", {_EIGHT: None}, {
        ("divprune", "25 %"): [96.6], ("todre", "25 %"): [97.3],
        ("divprune", "10 %"): [92.5], ("todre", "10 %"): [93.6],
    }),
    *_table("llava-next", "hiprune", "README", "LLaVA-NeXT", {"mean": None}, {("hiprune", "11.1 %"): [99.5]}),
    *_table("llava-next", "divprune", "secondary", "LLaVA-NeXT-7B", {"POPE F1": None}, {
        ("divprune", "about 11 % of the FLOPs"): [96.6],
    }),
    *_table("video", "todre", "paper", "LLaVA-NeXT-7B", {_FOUR: None}, {
        ("divprune", "25 %"): [102.5], ("todre", "25 %"): [103.1],
        ("divprune", "10 %"): [100.7], ("todre", "10 %"): [100.9],
    }),
    *_table("video", "holitom", "repository", _ONEVISION, {
        "MVBench": 58.3, "EgoSchema": 60.4, "LongVideoBench": 56.4, "VideoMME": 58.6,
    }, {
        ("holitom", "25 %"): [58.4, 61.2, 56.7, 58.9], ("holitom", "20 %"): [58.7, 61.0, 57.1, 58.6],
        ("holitom", "15 %"): [58.1, 61.2, 56.4, 57.3], ("holitom", "10 %"): [57.3, 61.2, 56.3, 56.8],
    }),
    *_table("video", "holitom", "repository", _ONEVISION, {
        "MVBench": 58.3, "LongVideoBench": 56.4, "VideoMME": 58.6,
    }, {("fastvid", "10 %"): [55.9, 56.3, 57.3]}),
    *_table("video", "fastvid", "abstract", _ONEVISION, {"mean": None}, {("fastvid", "9.7 %"): [98.0]}),
    *_table("video", "vidcom2", "project page", _ONEVISION, {
        "MVBench": 56.9, "LongVideoBench": 56.4, "MLVU": 63.0, "VideoMME": 58.6,
    }, {("vidcom2", "25 %"): [57.2, 54.9, 62.5, 58.6], ("vidcom2", "15 %"): [54.3, 52.0, 58.9, 56.2]}),
    *_table("video", "vidcom2", "project page", "LLaVA-Video-7B", {
        "MVBench": 60.4, "LongVideoBench": 59.6, "MLVU": 70.3, "VideoMME": 64.3,
    }, {("vidcom2", "25 %"): [57.0, 55.5, 59.0, 61.7], ("vidcom2", "15 %"): [53.3, 51.5, 56.8, 58.3]}),
    *_table("video", "dycoke", "repository", _ONEVISION, {
        "ActivityNet-QA": 51.93, "NextQA": 79.4, "PerceptionTest": 57.1, "VideoMME": 58.5,
    }, {
        ("dycoke", "23.25 %, both stages"): [51.80, 79.1, 57.2, 58.8],
        ("dycoke", "18.75 %, both stages"): [52.08, 78.5, 57.6, 59.5],
        ("dycoke", "14.25 %, both stages"): [51.80, 78.2, 57.6, 58.3],
    }),
    *_table("video", "prunevid", "README", _ONEVISION, {"MVBench": 58.0, "VideoMME": 58.2}, {
        ("prunevid", "17.0 %"): [57.5, 58.6],
    }),
    *_table("video", "aim", "repository", _ONEVISION, {"VideoMME": 58.2}, {("aim", "14.8 % of the FLOPs"): [58.2]}),
]  # fmt: skip
