"""What all sections of a recipe have in common: their names, what the recipe sets, and errors that name them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from spec_kd.cli.paths import place_paths
from spec_kd.cli.yaml_files import check_keys
from spec_kd.open_types import JsonObject, JsonValue, Record
from spec_kd.options import refuse, suggest

# In the order of the steps
SECTIONS = (
    "target", "draft", "output_dir", "seed", "prompts", "respond", "plan", "init", "pretrain", "train", "evaluate",
    "export", "check", "costs", "observe", "quick",
)  # fmt: skip
SET_BY_RECIPE = {
    "prompts": ("output_dir", "target"),
    "mix": ("output_dir", "parts"),
    "respond": ("output_dir", "target", "prompts", "split"),
    "plan": ("output_dir", "target"),
    "init": ("output_dir", "target"),
    "pretrain": ("output_dir", "target", "responses", "model_name_or_path", "method"),
    "score": ("output_dir", "target", "corpus"),
    "train": ("output_dir", "target", "responses", "split", "model_name_or_path"),
    "evaluate": ("output_dir", "target", "drafts", "responses_dir"),
    "export": ("output_dir", "target", "draft", "report"),
    "check": ("target", "draft"),
    "costs": ("output_dir", "target", "draft", "acceptance_rates"),
    "observe": ("output_dir", "target", "draft", "prompts", "split", "responses", "report"),
}


def read_section(section: JsonValue, kind: str, folder: str) -> JsonObject:
    """A section with its paths placed in the folder of the recipe; raises `ValueError` for what the recipe sets."""
    section = place_paths(as_mapping({} if section is None else section), folder)
    refuse(*((name in section, f"`{name}` is set by the recipe. Leave it out.") for name in SET_BY_RECIPE[kind]))
    return section


def make_quick(values: Record) -> JsonObject:
    """A recipe with the values of its section `quick` in place of its own, and another `output_dir`.

    Raises:
        ValueError: There is no such section, or it is wrong.
    """
    quick = values.get("quick")
    if not isinstance(quick, Mapping):
        raise ValueError("there is no section `quick` with small budgets. Add one, or run without `--quick`.")
    folder = {"output_dir": f"{values['output_dir']}-quick"} if isinstance(values.get("output_dir"), str) else {}
    return _merge({**values, **folder}, quick)


def _merge(values: Record, others: Record) -> JsonObject:
    """`values` with those of `others` in their place, mapping by mapping."""
    both = {name: value for name, value in others.items() if isinstance(value, Mapping)}
    both = {name: value for name, value in both.items() if isinstance(values.get(name), Mapping)}
    return {**values, **others, **{name: _merge(values[name], value) for name, value in both.items()}}


def is_given(values: Record, name: str) -> bool:
    """Whether a recipe has a section, even an empty one, and not `false` in its place."""
    return name in values and values[name] is not False


def as_mapping(section: JsonValue, name: str = "the section") -> Record:
    """The section; raises `ValueError` if it does not hold `name: value` pairs."""
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} must hold `name: value` pairs, got {section!r}.")
    check_keys(section, name)
    return section


def check_names(section: Record, known: tuple[str, ...]) -> None:
    """Raises `ValueError` for a name that is not among the known ones."""
    refuse(*((name not in known, f"there is no `{name}`.{suggest(str(name), known)}") for name in section))


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Names the section of the recipe in errors."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        kind = next((kind for kind in (ValueError, FileNotFoundError) if isinstance(error, kind)), type(error))
        raise kind(f"{where}: {error}") from error
