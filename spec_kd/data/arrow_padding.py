"""Messages and tools as they were before Arrow gave all of them the same keys.

A struct of Arrow has every key in every value, `None` where a value lacks it; chat templates would print those. A
column of JSON (text, or `List(Json())`) keeps the keys that each value has, `None` among them, and is left alone.
"""

from collections.abc import Iterator, Mapping

from datasets import Dataset, Features, IterableDataset, Json, LargeList, List, Value

from spec_kd.open_types import JsonObject, JsonValue, Record

ALWAYS_NONE = Value("null")
DATA_KEYS = ("arguments", "parameters", "input_schema", "input")
"""What users fill with keys of their own; the other keys are those of a format, where `null` stands for nothing."""


def remove_padding(value: JsonValue, feature: JsonValue) -> JsonValue:
    """Removes from `value` the `None` entries that stand for absent keys.

    Inside of a tool's parameters and of a call's arguments, a key that is `None` in the whole column was written by
    somebody, or it would not be there: it stays. A key that has values elsewhere is taken as absent where it is `None`.

    Args:
        value: Of a row.
        feature: What the dataset's `features` say of it.
    """
    return _remove(value, feature, is_data=False)


def remove_row_padding(row: Record, features: Features | None) -> JsonObject:
    """A row as it was written, columns that are `None` in it left out.

    Args:
        row (`Mapping[str, Any]`): Of a dataset.
        features (`Features`, *optional*): Of the dataset. An `IterableDataset` that does not know its features yields
            the objects that somebody wrote, without padding.
    """
    present = {name: value for name, value in row.items() if value is not None}
    return present if features is None else {name: remove_padding(v, features.get(name)) for name, v in present.items()}


def iterate_rows(dataset: Dataset | IterableDataset) -> Iterator[JsonObject]:
    """The rows of a dataset as [`remove_row_padding`] gives them back."""
    return (remove_row_padding(row, dataset.features) for row in dataset.with_format(None))


def _remove(value: JsonValue, feature: JsonValue, is_data: bool) -> JsonValue:
    if isinstance(feature, Json) or feature is None:
        return value
    if isinstance(value, Mapping) and isinstance(feature, dict):
        return {
            key: _remove(item, feature.get(key), is_data or key in DATA_KEYS)
            for key, item in value.items()
            if item is not None or (is_data and feature.get(key) == ALWAYS_NONE)
        }
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [_remove(item, feature.feature, is_data) for item in value]
    return value
