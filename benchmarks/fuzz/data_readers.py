"""Data files."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from benchmarks.fuzz.loop import Reader
from treepo.config.data import ColumnsConfig, PromptsConfig
from treepo.data.prompts import check_prompts
from treepo.data.row_files import open_rows

_ROWS = [
    {"prompt": "1 + 1?", "reward_model": {"ground_truth": "2"}, "data_source": "a", "extra": {"n": 1}},
    {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reward_model": {"ground_truth": '["4"]'},
        "data_source": "b",
        "extra": None,
    },
    {"prompt": "3?", "reward_model": {"ground_truth": [3.0]}, "data_source": "a", "extra": [1]},
]
_WORDS = (
    b'"prompt"',
    b'"reward_model"',
    b'"ground_truth"',
    b'"data_source"',
    b'"extra"',
    b'"role"',
    b'"content"',
)


def json_lines(folder: Path) -> Reader:
    lines = "\n".join(map(json.dumps, _ROWS)).encode()
    return _reader("json_lines", folder / "rows.jsonl", [lines, b"\xef\xbb\xbf" + lines + b"\r\n\n"])


def parquet(folder: Path) -> Reader:
    seeds = []
    plain = [
        {
            "prompt": f"{number}?",
            "reward_model": {"ground_truth": str(number)},
            "data_source": "a",
            "extra": None,
        }
        for number in range(5)
    ]
    chat = [row | {"prompt": [{"role": "user", "content": "2?"}]} for row in plain]
    for rows in (plain, chat):
        for options in ({"compression": "NONE", "use_dictionary": False}, {"compression": "SNAPPY"}):
            path = folder / "seed.parquet"
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2, **options)
            seeds.append(path.read_bytes())
    return _reader("parquet", folder / "rows.parquet", seeds)


def _reader(name: str, path: Path, seeds: list[bytes]) -> Reader:
    columns = ColumnsConfig(extra="extra")
    settings = PromptsConfig.model_validate({"bad_rows": "skip"})

    def read(data: bytes) -> object:
        path.write_bytes(data)
        report = check_prompts(path, columns, settings, extra_as_json=True)
        rows = open_rows(path, frozenset({"prompt", "data_source"}))
        places = [(row.index, row.at) for row in rows]
        rows.read(places[::-1])
        return report.summary()

    return Reader(name, read, seeds, _WORDS, share=1.0 if name == "json_lines" else 0.5)
