"""The target, with the engine that runs it: checked without weights, identified, loaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

from spec_kd import engines
from spec_kd.cli.arguments import TargetArguments
from spec_kd.cli.fingerprints import Fingerprints
from spec_kd.cli.model_checks import check_engine_package, check_loading_options, check_model, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.engines.ray.engine import import_ray
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject
from spec_kd.vocabulary import ProcessingClass


def check_target(target: TargetArguments, workers: engines.RayOptions | None = None) -> None:
    """Checks the target, the engine and the workers that run it without weights.

    Raises:
        ValueError: The target is missing, its files are damaged, the engine does not know an option, or it is a server,
            which needs no workers.
        FileNotFoundError: The target's folder does not exist.
        ImportError: The engine, or Ray, is not installed.
    """
    if workers is not None and workers.num_workers:
        if target.engine == "server":
            raise ValueError("`num_workers` is for targets that run here, but `engine` is a server. Leave it out.")
        import_ray()
    if target.target is None:
        raise ValueError("`target` is missing: a folder, or a name on the Hub.")
    check_exists("target", target.target)
    check_engine_package(target.engine)
    if target.engine == "server":
        load_target(target)  # asks the server nothing
        return
    check_model("target", target.target, target.init_kwargs)
    if target.engine == "transformers":
        check_loading_options(target.target, target.init_kwargs)


def list_inputs(target: TargetArguments, fingerprints: Fingerprints) -> JsonObject:
    """What the target's completions depend on; not the address of a server, which may move."""
    return {
        "model": fingerprints.of_model(target.target),
        "engine": target.engine,
        "served_model_name": target.served_model_name,
        "engine_kwargs": target.init_kwargs,
    }


def load_processing_class(target: TargetArguments) -> ProcessingClass:
    """Loads the target's tokenizer."""
    name = cast(str, target.target)
    with naming_model("tokenizer of the target", name):
        return load_tokenizer(name, target.init_kwargs if target.engine != "server" else {})


@contextmanager
def loaded_target(
    target: TargetArguments, workers: engines.RayOptions
) -> Iterator[tuple[engines.Engine, ProcessingClass]]:
    """The target as `load_target` gives it, or in the workers of a Ray cluster, which end with the block."""
    if not workers.num_workers:
        yield load_target(target)
        return
    with engines.RayEngine(partial(_load_engine, target), workers) as engine:
        yield engine, load_processing_class(target)


def _load_engine(target: TargetArguments) -> engines.Engine:
    return load_target(target)[0]


def load_target(target: TargetArguments) -> tuple[engines.Engine, ProcessingClass]:
    """Loads the target as [`~spec_kd.generate_responses`] takes it, and its processing class.

    Raises:
        ValueError: The target cannot be loaded, or an option does not fit.
        OSError: The target does not exist or cannot be reached.
        ImportError: The engine is not installed.
    """
    processing_class, name, options = load_processing_class(target), cast(str, target.target), target.init_kwargs
    if target.engine == "server":
        try:
            engine = engines.ServerEngine(
                target.served_model_name or name, processing_class, cast(str, target.base_url), **options
            )
        except TypeError as error:
            raise ValueError(f"`engine_kwargs` does not fit: {error}") from error
        return engine, processing_class
    with naming_model("target", name):
        if target.engine == "vllm":
            return engines.VLLMEngine(name, **options), processing_class
        return engines.TransformersEngine(name, processing_class, init_kwargs=options), processing_class
