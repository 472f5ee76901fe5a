"""Restores messages and tools as they were before Arrow gave all of them the same keys.

An Arrow struct has every key in every value, with `None` where a value lacks the key; chat templates would print
those. A column of JSON (text, or `List(Json())`) keeps the keys of each value as they are, and is left alone.
"""

from collections.abc import Iterator, Mapping

from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value

from spec_kd.open_types import JsonObject, JsonValue, Record

ALWAYS_NONE = Value("null")
DATA_KEYS = ("arguments", "parameters", "input_schema", "input")
"""Users fill these with their own keys; all other keys belong to a format, in which `null` means nothing."""


def remove_padding(value: JsonValue, feature: JsonValue, is_data: bool = False) -> JsonValue:
    """Removes the `None` entries of `value` that stand for absent keys.

    Inside the parameters of a tool and the arguments of a call, a key that is `None` in the whole column stays: Arrow
    knows the key only because somebody wrote it. A key that has values in other rows counts as absent where it is
    `None`.

    Args:
        value: Value of a row.
        feature: Its entry in the `features` of the dataset.
        is_data (`bool`, *optional*, defaults to `False`): Whether the value lies inside such parameters or arguments.
    """
    if isinstance(feature, Json) or feature is None:
        return value
    if isinstance(value, Mapping) and isinstance(feature, dict):
        return {
            key: remove_padding(item, feature.get(key), is_data or key in DATA_KEYS)
            for key, item in value.items()
            if item is not None or (is_data and feature.get(key) == ALWAYS_NONE)
        }
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [remove_padding(item, feature.feature, is_data) for item in value]
    return value


def remove_row_padding(row: Record, features: Features | None) -> JsonObject:
    """A row as it was written, without the columns that are `None` in it.

    Args:
        row (`Mapping[str, Any]`): Row of a dataset.
        features (`Features`, *optional*): Features of the dataset. An `IterableDataset` without features yields the
            objects that somebody wrote, without padding.
    """
    present = {name: value for name, value in row.items() if value is not None}
    return present if features is None else {name: remove_padding(v, features.get(name)) for name, v in present.items()}


def iterate_rows(dataset: Dataset | IterableDataset) -> Iterator[JsonObject]:
    """The rows of a dataset, each without padding as in [`remove_row_padding`]."""
    return (remove_row_padding(row, dataset.features) for row in dataset.with_format(None))
