"""What the benchmarks share: the models they run, the device they ran on, and how results are written."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import pandas
import psutil
import torch
import transformers
from diffusers import SanaTransformer2DModel


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
EXAMPLES = ROOT / "examples" / "tbcm"
EMBEDDED_TEACHER = EXAMPLES / "sana_emoji_mini"
CONFIGS = {
    "0.6b": {
        "num_layers": 28,
        "num_attention_heads": 36,
        "num_cross_attention_heads": 16,
        "cross_attention_head_dim": 72,
        "cross_attention_dim": 1152,
    },
    "1.6b": {
        "num_layers": 20,
        "num_attention_heads": 70,
        "num_cross_attention_heads": 20,
        "cross_attention_head_dim": 112,
        "cross_attention_dim": 2240,
    },
}
PROMPT_TOKENS = 300
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def random_transformer(model: str, resolution: int, **overrides: Any) -> SanaTransformer2DModel:
    """A transformer of a published size, in dense time, for a resolution in pixels, with changes of its config."""
    config = {**CONFIGS[model], "sample_size": resolution // 32, **overrides}
    return SanaTransformer2DModel(qk_norm="rms_norm_across_heads", timestep_scale=0.001, **config)


def load_transformer(model: str, resolution: int) -> SanaTransformer2DModel:
    """The embedded teacher's transformer, or one of a published size with random weights."""
    if model == "embedded":
        return SanaTransformer2DModel.from_pretrained(EMBEDDED_TEACHER, subfolder="transformer")
    return random_transformer(model, resolution)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the versions, to stand beside every figure."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "cores": psutil.cpu_count(),
        "load_average": round(psutil.getloadavg()[0], 1),  # what else runs on this machine
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def made_folder(path: str) -> Path:
    """The type of an argument that names a folder of results: it is there before hours are spent on what it is for."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Flags by name as a command has them: True stands alone, a list has several values, False is left out."""
    found = []
    for name, value in flags.items():
        if value is not False:
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            found += [f"--{name}", *map(str, values)]
    return found


def medians(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of every entry, rounded to a hundredth of a millisecond where it is in seconds."""
    return {name: round(median(record[name] for record in records), 5) for name in records[0]}


def markdown(frame: pandas.DataFrame) -> str:
    """A table in Markdown, its index first; pandas would need another package for it."""
    lines = [[frame.index.name or "", *frame.columns], ["---"] * (1 + len(frame.columns))]
    for name, row in frame.iterrows():
        lines.append([name, *("" if pandas.isna(value) else value for value in row)])
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def write_results(
    name: str, table: pandas.DataFrame, details: dict[str, Any], folder: Path = RESULTS, **more: Any
) -> None:
    """Print a table and keep it as <name>.json and .md, beside what it was measured on; `more` goes into the JSON."""
    record = {"details": details, "rows": json.loads(table.to_json(orient="records")), **more}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    settings = ", ".join(f"{key} {value}" for key, value in details.items())
    text = f"{settings}\n\n{markdown(table.set_index(table.columns[0]))}"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(table.to_string(index=False, na_rep=""), f"\n{settings}\n{folder / name}.json, .md")
