"""Reports and tables of timings, and the README's figures made from saved files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

from vtprune.evals.report import Report, Row, one_line, share, show
from vtprune.evals.speed.flops import FORMULA
from vtprune.evals.speed.limits import Limits


def notes_of(shrunk: str, device: str, left_out: Iterable[str]) -> tuple[str, ...]:
    """The sentences under a table."""
    memory = {
        "cuda": "Peak: growth of what CUDA's allocator handed out, prefill and decode; weights and inputs not counted.",
        "cpu": "Peak: tensors alive at once beside weights and inputs, counted operator by operator in a run of its "
        "own; scratch inside an operator is not seen.",
    }
    return tuple(filter(None, (shrunk, *NOTES, memory[device], FORMULA, *left_out)))


NOTES = (
    "TTFT: vision, selection and LLM prefill up to the first token on the host, median of interleaved repeats. "
    "prefill: the text model alone. selector: the method alone, and its share of the dense prefill (budget 2 %, ! is "
    "above); signals it reads from a tower or a decoder layer count there.",
    "Speed-ups are against dense with the same prefill in the same round, median over rounds, with their share of the "
    "roofline limit (every kernel at the measured peak) and of the stack limit (TTFT: vision and a forward pass of one "
    "token; prefill and decode: that pass alone).",
)


class BenchReport(Report):
    """Timings by method and keep."""

    kind = "bench"

    def cells(self) -> tuple[list[str], list[list[str]]]:
        gain = "faster (roof, stack)"
        header = ["method", "kept", "TTFT ms", gain, "prefill ms", gain, "selector ms (of prefill)", "decode ms", gain]
        header += ["KV MiB", "peak MiB", "TFLOP"]
        return header, [_line(row) for row in self.rows]

    def plot(self, path: str | Path) -> Path:
        """TTFT against kept tokens, with both limits."""
        return plot([json.loads(self.to_json())], path)

    def file_name(self) -> str:
        """geometry_device_dtype_batch_time.json"""
        env = self.environment
        stamp = "".join(c for c in env["time"][:19] if c.isalnum())
        shrunk = "_shrunk" if env.get("shrunk") else ""
        return f"{Path(env['geometry']).name}{shrunk}_{env['device']}_{env['dtype']}_b{env['batch']}_{stamp}.json"

    def write(self, folder: str | Path) -> Path:
        """Save under `folder`, one file a run."""
        return self.save(Path(folder) / self.file_name())


def _line(row: Row) -> list[str]:
    def gain(name: str) -> str:
        return "{:.2f}x ({:.0f}, {:.0f} %)".format(
            row[f"{name}_speedup"], 100 * row[f"{name}_of_roofline"], 100 * row[f"{name}_of_stack"]
        )

    return [
        _name(row),
        share(row["keep"]),
        show(row["ttft_ms"]),
        gain("ttft"),
        show(row["prefill_ms"]),
        gain("prefill"),
        show(row["selector_ms"]) if row["selector_ms"] is None else f"{show(row['selector_ms'])} ({_spent(row)})",
        show(row["decode_ms_per_token"]),
        gain("decode"),
        _mebi(row["kv_bytes"]),
        _mebi(row["peak_bytes"]),
        f"{row['flops'] / 1e12:.3g}",
    ]


def _name(row: Row) -> str:
    return row["method"] if row["prefill"] == "eager" else f"{row['method']}, {row['prefill']}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _spent(row: Row) -> str:
    spent = row["selector_of_prefill"]
    return "–" if spent is None else f"{100 * spent:.1f} %" + ("" if row["selector_affordable"] else " !")


def _mebi(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**20:.1f}"


# -- from saved files -----------------------------------------------------------------------------------------------


def load(path: str | Path) -> Row:
    """A saved benchmark, with its path under "path"; ValueError for any other JSON."""
    try:
        read = json.loads(Path(path).read_text())
        if "limits" in read["environment"] and read["rows"]:
            return {**read, "path": str(path)}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no benchmark that vtprune bench wrote") from error
    raise ValueError(
        f"{path} holds no timings of prefill: draw files that vtprune bench wrote without --hooks or --serve"
    )


def kept(row: Row) -> float:
    """Visual tokens in the LLM, mean over its layers."""
    return mean(row["kept_by_layer"])


HEADER = ("method", "kept", "TTFT ms", "speed-up", "of roofline", "of stack", "selector ms", "of dense prefill",
          "decode ms", "KV MiB", "peak MiB")  # fmt: skip


def table(paths: Iterable[str | Path], root: Path | None = None) -> str:
    """Markdown: one table a file, what was run above it, the machine below, and a link to the file.

    root: the folder of the page that shows it; None: that of a checkout, with the file in benchmarks/.
    """
    parts = []
    for saved in map(load, paths):
        env, rows = saved["environment"], saved["rows"]
        shrunk = f" **{env['shrunk']}.**" if env["shrunk"] else ""
        lines = [HEADER, ["---"] + ["---:"] * (len(HEADER) - 1), *map(_cells, rows)]
        parts.append(f"{saved['title']}.{shrunk}")
        parts.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
        path = Path(saved["path"])
        link = f"benchmarks/{path.name}" if root is None else path.relative_to(root).as_posix()
        parts.append(f"{one_line(env)}; median of {env['repeats']} ([raw]({link})).")
    return "\n\n".join(parts)


def _cells(row: Row) -> list[str]:
    return [
        _name(row),
        f"{kept(row):.0f}",
        show(row["ttft_ms"]),
        f"{row['ttft_speedup']:.2f}x",
        _percent(row["ttft_of_roofline"]),
        _percent(row["ttft_of_stack"]),
        show(row["selector_ms"]),
        _spent(row).removesuffix(" !"),
        show(row["decode_ms_per_token"]),
        _mebi(row["kv_bytes"]),
        _mebi(row["peak_bytes"]),
    ]


BLOCK = re.compile(r"(<!-- vtprune bench --table ([^>]+?) -->\n\n).*?(\n\n<!-- end of table -->)", re.DOTALL)


def refreshed(text: str, root: Path) -> str:
    """`text` with the table of every block made anew from the files its opening comment names, relative to root."""
    return BLOCK.sub(lambda block: block[1] + table((root / name for name in block[2].split()), root) + block[3], text)


def plot(saved: Sequence[Row], path: str | Path) -> Path:
    """A PNG with a panel a benchmark; see figures.ttft."""
    from vtprune.evals.figures import ttft

    return ttft([(one, Limits.of(one["environment"]["limits"])) for one in saved], path)
