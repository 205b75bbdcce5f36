"""The table of models in docs/models.md; `python tests/support/docs_tables.py` regenerates it."""

from pathlib import Path

import torch

import lightspine
from lightspine.benchmark.macs import count_macs
from lightspine.models import get_record

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = "docs_tables.py`, checked by tests/test_docs.py -->\n", "<!-- end -->"


def model_table() -> str:
    """Return the table in Markdown, counted on the meta device."""
    rows = [
        "| model | parameters | GMACs counted | published | top-1 published | input | maps (stride: width) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name in lightspine.list_models():
        record = get_record(name)
        with torch.device("meta"):
            model = record.create()
        macs = count_macs(model, record.input_size).total / 1e9
        published = record.published
        note = f" ({published.note})" if published.note else ""
        widths = {info["reduction"]: info["num_chs"] for info in model.feature_info}
        maps = ", ".join(f"{stride}: {channels}" for stride, channels in sorted(widths.items()))
        rows.append(
            f"| {name} | {record.params:,} | {macs:.3f} | {published.macs_g or '-'} "
            f"| {published.top1 or '-'}{note} | {record.input_size[1]} | {maps} |"
        )
    return "\n".join(rows) + "\n"


def written_table() -> str:
    """Return the table in the page."""
    return PAGE.read_text().split(START)[1].split(END)[0]


if __name__ == "__main__":
    head, rest = PAGE.read_text().split(START)
    PAGE.write_text(head + START + model_table() + END + rest.split(END, 1)[1])
