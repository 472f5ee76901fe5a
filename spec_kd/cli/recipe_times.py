"""How long the steps of a recipe take: what budgets say before the first one, and what was measured before training."""

from dataclasses import dataclass

from spec_kd.cli.recipe import Recipe
from spec_kd.cli.steps import tell
from spec_kd.cli.train import TrainCall
from spec_kd.loading import load_config
from spec_kd.trainer.budget import TIMED_STEPS

SHORT, UNKNOWN = "short", "unknown"
ITSELF = "it says what is left"


@dataclass(frozen=True)
class StepTime:
    """What is known of the time of a step.

    Args:
        step (`str`): Name of the step.
        minutes (`float`, *optional*): Minutes that it takes, about or at most; `None` if that is not known.
        why (`str`): Where the number comes from, or what the step does and when its time is known.
        word (`str`, *optional*, defaults to `"unknown"`): What stands in place of the number.
    """

    step: str
    minutes: float | None
    why: str
    word: str = UNKNOWN

    @property
    def shown(self) -> str:
        """The minutes, or a word."""
        return self.word if self.minutes is None else f"{self.minutes:,.1f} min".replace(".0 ", " ")


@dataclass(frozen=True)
class Pace:
    """What the steps so far have measured.

    Args:
        response_seconds (`float`, *optional*): Seconds of a response to a training prompt.
        step_seconds (`float`, *optional*): Seconds of a plain step of the target in the engine.
    """

    response_seconds: float | None = None
    step_seconds: float | None = None


def list_times(recipe: Recipe, pace: Pace | None = None) -> list[StepTime]:
    """What is known of the time of each step, in the order of the steps.

    Args:
        recipe (`Recipe`): The recipe.
        pace (`Pace`, *optional*): What was measured so far; nothing by default.
    """
    pace = pace or Pace()
    times = [StepTime("prompts", None, "no model runs", SHORT)]
    for name, part in recipe.parts.items():
        if part.scenario == "synthetic":
            why = f"the target writes {part.call[1].num_queries:,} prompts; once it has begun, {ITSELF}"
            times.append(StepTime(f"parts/{name}", None, why))
    if recipe.respond is not None:
        files, sampling, _, _ = recipe.respond
        most = [number for number in (files.num_prompts, recipe.mix[1].num_prompts) if number is not None]
        prompts = f"{min(most):,} prompts" if most else "all training prompts"
        why = f"the target writes up to {sampling.max_new_tokens} tokens to {prompts}; once it has begun, {ITSELF}"
        times.append(StepTime("responses", None, why))
    if recipe.plan is not None:
        times.append(_time_plan(recipe))
    if recipe.init is not None:
        times.append(StepTime("initial_draft", None, "the target reads a few responses", SHORT))
    if recipe.pretrain is not None:
        if recipe.pretrain.score is not None:
            times.append(StepTime("corpus", None, f"the target reads the corpus; once it has begun, {ITSELF}"))
        times.append(_time_training("pretrained", recipe.pretrain.train))
    return [*times, _time_training("draft", recipe.train), _time_evaluation(recipe, pace), *_time_serving(recipe, pace)]


def _time_plan(recipe: Recipe) -> StepTime:
    files, options, timing = recipe.plan  # type: ignore[misc]  # its caller has looked
    shapes = len(options.list_shapes(load_config(files.target).get_text_config()))
    timed = f"{shapes} shapes are timed at {len(options.gammas)} numbers of drafted tokens, {timing.repeats} times each"
    if files.costs is not None:
        timed = f"{shapes} shapes are compared by given costs"
    if options.run_minutes is None:
        return StepTime("plan", None, f"{timed}; before it begins, it says how long that takes")
    why = f"{shapes} short runs of {options.run_minutes:g} minutes, fewer if a shape cannot pay; before that, {timed}"
    return StepTime("plan", shapes * options.run_minutes, why)


def _time_training(step: str, call: TrainCall) -> StepTime:
    config = call.config
    if config.max_train_minutes is not None:
        return StepTime(step, config.max_train_minutes, "`max_train_minutes`")
    if config.max_train_tokens is not None:
        return StepTime(step, None, f"{config.max_train_tokens:,} tokens; after {TIMED_STEPS} steps {ITSELF}")
    steps = f"{config.max_steps:,} steps" if config.max_steps > 0 else f"{config.num_train_epochs:g} epochs"
    return StepTime(step, None, f"{steps}; once it has begun, {ITSELF}")


def _time_evaluation(recipe: Recipe, pace: Pace) -> StepTime:
    files, options, target = recipe.evaluate
    options = options.fill_in()
    temperatures, limit = len(options.temperatures or ()), options.max_new_tokens or 0
    prompts = "all test prompts" if files.num_prompts is None else f"up to {files.num_prompts:,} prompts"
    why = f"the target writes up to {limit} tokens to {prompts}"
    why += f", at {temperatures} temperatures" if temperatures > 1 else ""
    is_same = recipe.respond is not None and target.engine == recipe.respond[-1].engine
    if recipe.respond is None or pace.response_seconds is None or files.num_prompts is None or not is_same:
        return StepTime("evaluation", None, f"{why}, and the drafts read them; once it has begun, {ITSELF}")
    share = limit / (recipe.respond[1].max_new_tokens or limit)
    seconds = pace.response_seconds * share * temperatures * files.num_prompts
    return StepTime("evaluation", seconds / 60, f"{why}, at the pace of `responses`; then the drafts read them")


def _time_serving(recipe: Recipe, pace: Pace) -> list[StepTime]:
    serving, times = recipe.serving, []
    if serving.export is not None:
        has_gguf = serving.export[1].llama_cpp_dir is not None
        times.append(StepTime("export", None, "both models become GGUF" if has_gguf else "a draft is saved", SHORT))
    if serving.costs is not None:
        files, timing = serving.costs
        why = f"{len(files.gammas) + 1} settings of {timing.num_rounds} rounds, {timing.repeats} times each"
        times.append(StepTime("costs", None, why, SHORT))
    if serving.observe is not None:
        asked, options = serving.observe
        servers = 2 if serving.servers is not None or asked.plain_url is not None else 1
        prompts = "all test prompts" if asked.num_prompts is None else f"up to {asked.num_prompts:,} prompts"
        why = f"{prompts} of up to {options.max_new_tokens} tokens, asked {'twice' if servers > 1 else 'once'}"
        if pace.step_seconds is None or asked.num_prompts is None or serving.servers is None:
            times.append(StepTime("observation", None, f"{why}; the server's pace is not known yet"))
        else:
            seconds = pace.step_seconds * servers * asked.num_prompts * options.max_new_tokens / options.concurrency
            times.append(StepTime("observation", seconds / 60, f"{why}, at the pace of plain steps in the plan"))
    return times


def tell_times(title: str, times: list[StepTime]) -> None:
    """Prints a table of them, with the minutes that are known together."""
    known = sum(one.minutes for one in times if one.minutes is not None)
    rows = [*times, StepTime("together", known, "of those that are known")] if known else times
    name_width, time_width = (max(len(getattr(one, name)) for one in rows) for name in ("step", "shown"))
    lines = [f"  {one.step:<{name_width}}  {one.shown:>{time_width}}  {one.why}" for one in rows]
    tell("\n".join([f"run: {title}", *lines]))
