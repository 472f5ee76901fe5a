"""Gives the columns of several datasets the same types, without loss."""

import json
from collections.abc import Mapping

import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value

from spec_kd.data.arrow_padding import remove_padding
from spec_kd.open_types import JsonValue

Feature = object  # what `datasets` calls a feature type: a `Value`, a `List`, a dictionary of them, ...
NULL = Value("null")
JSON_ITEMS = List(Json())  # messages of which each keeps the keys and the types that it has


def unify_columns(datasets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Casts columns of the same name to a type that fits all of them; values are not changed.

    `tools` become JSON text, as in every prompt set. Messages with different keys become JSON items, each of which
    keeps its own keys, also those that are `None`. Numbers get the wider type.

    Args:
        datasets (`Mapping[str, Dataset]`): Datasets by name.

    Returns:
        `dict[str, Dataset]`: Datasets for `concatenate_datasets`. A dataset that fits already is the same object.

    Raises:
        ValueError: A column is, for example, text in one dataset and messages in another; names the column.
    """
    plain = (NULL, Value("string"), Value("large_string"))
    datasets = {
        name: d if d.features.get("tools", NULL) in plain else _write_as_json(d, "tools", Value("string"))
        for name, d in datasets.items()
    }
    columns = dict.fromkeys(column for dataset in datasets.values() for column in dataset.column_names)
    features = {
        column: _unify_features(column, {n: d.features[column] for n, d in datasets.items() if column in d.features})
        for column in columns
    }
    return {
        name: _cast(dataset, Features({column: features[column] for column in dataset.column_names}))
        for name, dataset in datasets.items()
    }


def _unify_features(column: str, features: Mapping[str, Feature]) -> Feature:
    known = [feature for feature in features.values() if feature != NULL]
    if all(feature == known[0] for feature in known):
        return known[0] if known else NULL
    if all(isinstance(feature, List) and isinstance(feature.feature, dict | Json) for feature in known):
        return JSON_ITEMS
    schemas = [Features({column: feature}).arrow_schema.remove_metadata() for feature in known]
    try:
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))[column]
    except pa.ArrowTypeError as error:
        found = "; ".join(f"in `{name}`: {feature}" for name, feature in features.items())
        raise ValueError(
            f"The column `{column}` has types without a common one ({found}). Cast it with `dataset.map` or "
            f"`dataset.cast_column`, or leave it out with `dataset.remove_columns({column!r})`."
        ) from error


def _cast(dataset: Dataset, features: Features) -> Dataset:
    for column, feature in features.items():
        if feature == JSON_ITEMS and dataset.features[column] not in (JSON_ITEMS, NULL):
            dataset = _write_as_json(dataset, column, List(Value("string")))
    return dataset if dataset.features == features else dataset.cast(features)


def _write_as_json(dataset: Dataset, column: str, feature: Feature) -> Dataset:
    """Turns the values of a column, or with a `List` feature the items of its values, into JSON text.

    Casting to `Json` directly would encode JSON inside the values a second time.
    """

    def write(value: JsonValue) -> JsonValue:
        if value is None:
            return None
        value = remove_padding(value, dataset.features[column])
        items = value if isinstance(feature, List) else [value]
        texts = [json.dumps(item, ensure_ascii=False) for item in items]
        return texts if isinstance(feature, List) else texts[0]

    return dataset.map(
        lambda value: {column: write(value)},
        input_columns=[column],
        features=Features({**dataset.features, column: feature}),
        desc=f"`{column}` as JSON",
    )
