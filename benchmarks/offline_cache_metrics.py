"""What offline_cache.py reads off its parts: sizes of columns, alpha, differences from the live teacher."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.offline_cache_report import LIVE
from spec_kd.evaluation import bootstrap


def sum_column_bytes(path: Path) -> dict[str, int]:
    """Compressed bytes of every top-level column of a Parquet file."""
    metadata, sizes = pq.ParquetFile(path).metadata, {}
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            column = metadata.row_group(group).column(index)
            name = column.path_in_schema.split(".")[0]
            sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    return sizes


def compare(results: dict[str, dict], temperature: float) -> dict[str, list[float]]:
    """alpha of each method minus the live teacher's, paired over prompts, with its 95 % interval."""
    live = results[LIVE][f"T={temperature:g}"]
    differences = {}
    for method, result in results.items():
        own = result[f"T={temperature:g}"]
        columns = (np.array(own["alpha_sum"]), np.array(live["alpha_sum"]), np.array(own["tokens"]))
        differences[method] = list(bootstrap(lambda a, b, tokens: (a - b) / tokens, *columns))
    return differences


def describe_alpha(results: dict[str, dict], temperature: float) -> dict[str, list[float]]:
    """alpha of each method with its 95 % interval."""
    described = {}
    for method, result in results.items():
        own = result[f"T={temperature:g}"]
        described[method] = list(
            bootstrap(lambda a, tokens: a / tokens, np.array(own["alpha_sum"]), np.array(own["tokens"]))
        )
    return described


def describe_without_target(result: dict) -> dict:
    """Replay from the stored text alone beside replay with the target in memory, of one draft."""
    alone, tokens = result["without_target"], sum(result["tokens"])
    return {
        "block_efficiency": result["block_efficiency"],
        "block_efficiency_without_target": alone["block_efficiency"],
        "largest_difference_of_acceptance": alone["largest_difference_of_acceptance"],
        "alpha": sum(result["alpha_sum"]) / tokens,
        "alpha_without_target": sum(alone["alpha_sum"]) / tokens,
    }
