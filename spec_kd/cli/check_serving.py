"""`spec-kd check-serving`: will engines serve a draft, and draft with it?"""

from dataclasses import asdict

from spec_kd.cli.model_checks import naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.serving_arguments import CheckServingArguments
from spec_kd.cli.steps import tell
from spec_kd.open_types import JsonObject
from spec_kd.serving.check import check_pair
from spec_kd.serving.pair import ServedPair, read_model


def run(arguments: CheckServingArguments) -> JsonObject:
    """Checks a draft for each engine; returns the findings, and whether none of them is an error.

    Raises:
        ValueError: A configuration or a tokenizer cannot be read.
        OSError: A model does not exist or cannot be reached.
    """
    models = {}
    for role, name in (("draft", arguments.draft), ("target", arguments.target)):
        check_exists(role, name)
        with naming_model(role, name):
            models[role] = read_model(role, name)
    options = (arguments.tensor_parallel_size, arguments.max_length, arguments.num_assistant_tokens)
    pair = ServedPair(models["draft"], models["target"], *options)
    findings = check_pair(pair, arguments.serving_engine)
    for engine in dict.fromkeys(arguments.serving_engine):
        if not (found := [one for one in findings if one.engine == engine]):
            tell(f"check-serving: {engine}: nothing found")
        for one in found:
            tell(f"check-serving: {one.severity}: {one}")
    return {
        "findings": [{**asdict(one), "severity": one.severity} for one in findings],
        "has_passed": all(one.severity != "error" for one in findings),
    }
