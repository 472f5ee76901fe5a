"""Checks of a recipe's files, models and tokenizers, before the first step."""

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import spec_kd
from spec_kd.cli import train
from spec_kd.cli.arguments import InitDraftFiles
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.recipe import PlanCall, Recipe
from spec_kd.cli.recipe_sections import naming
from spec_kd.cli.recipe_serving import ServingSteps
from spec_kd.cli.respond import ResponseCall
from spec_kd.cli.rows import load_rows
from spec_kd.cli.target import check_target, load_processing_class
from spec_kd.data.responses import describe_teacher
from spec_kd.data.teacher_signal import TeacherInfo
from spec_kd.engines import Engine
from spec_kd.engines.vllm import LOGPROBS_MODES
from spec_kd.hub.gguf import find_tools
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import Arguments
from spec_kd.prompts.logs.prompt_store import FEATURES
from spec_kd.serving.llama_server import find_llama_server
from spec_kd.trainer.arguments import get_load_options
from spec_kd.trainer.teachers.stored import check_stored_teacher
from spec_kd.vocabulary import ProcessingClass, check_same_tokenizer


def check_sources(recipe: Recipe) -> None:
    """Checks the files, folders and tokenizers that a recipe names; loads no weights.

    Raises:
        ValueError: The models do not share a tokenizer, the target has no chat template, the teacher signal cannot
            serve the loss at these temperatures, or a file is wrong; names the section.
        OSError: A file or a model does not exist.
        ImportError: A package is not installed.
    """
    method, config = recipe.train.method, cast(spec_kd.WhiteBoxDistillConfig, recipe.train.config)
    *_, target = recipe.evaluate
    check_target(target)
    first = recipe.train if recipe.pretrain is None else recipe.pretrain.train
    name = cast(str, first.draft.model_name_or_path)
    if recipe.init is not None:
        with naming("init"):
            check_init(recipe.init[0], recipe.output_dir)
        # the draft that will be made has the target's tokenizer, and modules of the same names
        name = cast(str, target.target)
    training = replace(recipe.train, draft=replace(recipe.train.draft, model_name_or_path=name))
    processing_class = load_processing_class(target)
    if not getattr(processing_class, "chat_template", None):
        raise ValueError(f"the tokenizer of the target `{target.target}` has no chat template.")
    if recipe.respond is not None:
        with naming("respond"):
            check_target(recipe.respond[-1], recipe.respond[-2])
    for part_name, part in recipe.parts.items():
        with naming(f"prompts: {part_name}"):
            part.module.check(*part.call)
    load_options = get_load_options(config, {"revision": training.draft.model_revision})
    check_model("draft", name, load_options)
    with naming_model("tokenizer of the draft", name):
        draft_class = load_tokenizer(name, load_options)
    if method != "black_box":
        check_same_tokenizer(draft_class, processing_class)
    if recipe.pretrain is not None:
        with naming("pretrain"):
            check_same_tokenizer(draft_class, processing_class)
            recipe.pretrain.check(name)
    with naming("train"):
        train.check_call(training)
        check_teacher(recipe)
        is_stored = method == "white_box" and config.teacher_model_name_or_path is None
        if is_stored and recipe.respond is not None and (info := describe_signal(recipe.respond, processing_class)):
            check_stored_teacher(info, config.build_loss(), processing_class)
    with naming("evaluate"):
        check_evaluation_prompts(recipe)
    check_tools(recipe.serving)
    if recipe.plan is not None:
        with naming("plan"):
            check_plan(recipe)


def check_init(files: InitDraftFiles, output_dir: str) -> None:
    """Raises `ValueError` or `OSError` for models and responses from which no draft can be made."""
    for role, source in {"target": files.target, "donor": files.donor}.items():
        if source is not None:
            check_model(role, source)
    if files.responses is not None and not files.responses.startswith(f"{output_dir}/"):
        check_exists("responses", files.responses)


def check_plan(recipe: Recipe) -> None:
    """Raises `ValueError` or `OSError` for what a plan needs and is not there."""
    files, options, timing = cast(PlanCall, recipe.plan)
    for name, source in {"costs": files.costs, "target_gguf": options.target_gguf}.items():
        check_exists(name, source)
    if files.responses is not None and not files.responses.startswith(f"{recipe.output_dir}/"):
        check_exists("responses", files.responses)
    if options.llama_cpp_dir is not None:
        find_tools(options.llama_cpp_dir, options.quantization)
        find_llama_server(timing.server)


def check_tools(serving: ServingSteps) -> None:
    """Raises `ValueError` or `OSError` for a llama.cpp, or a file with costs, that is not there."""
    if serving.export is not None and serving.export[1].llama_cpp_dir is not None:
        with naming("export"):
            find_tools(serving.export[1].llama_cpp_dir, serving.export[1].quantization)
    with naming("observe"):
        if serving.servers is not None:
            find_llama_server(str(serving.servers.options.server))
        if serving.observe is not None and serving.costs is None:
            check_exists("costs", serving.observe[0].costs)


def check_teacher(recipe: Recipe) -> None:
    """Raises `ValueError` for a training whose teacher, or whose reference draft, will not be there."""
    method, config = recipe.train.method, cast(spec_kd.WhiteBoxDistillConfig, recipe.train.config)
    has_signal = method == "white_box" and recipe.respond is not None and recipe.respond[1].teacher_signal is not None
    needs_teacher = method != "black_box" and not has_signal
    if needs_teacher and config.teacher_model_name_or_path is None:
        check_model(
            "teacher", cast(str, recipe.train.arguments.target), cast(Arguments, config.teacher_model_init_kwargs)
        )
    if getattr(config, "token_selection", None) == "adaspec" and config.ref_model_name_or_path is None:
        raise ValueError(
            "`token_selection: adaspec` compares with a reference draft. Set `ref_model_name_or_path` to a draft that "
            "was trained before."
        )


def check_evaluation_prompts(recipe: Recipe) -> None:
    """Raises `ValueError` for test prompts without the columns to group by, `OSError` for those that are not there."""
    files, options, _ = recipe.evaluate
    columns = [*FEATURES, "chat_template_kwargs"]
    if not files.prompts.startswith(f"{recipe.output_dir}/"):
        check_exists("prompts", files.prompts)
        if not os.path.exists(files.prompts):
            return  # of the Hub
        columns = load_rows(files.prompts, files.split, option="prompts").column_names
        if not {"prompt", "prompt_ids"} & set(columns):
            raise ValueError(f"`prompts` has the columns {columns}, but neither `prompt` nor `prompt_ids`.")
    options.check_columns(columns)


def describe_signal(call: ResponseCall, processing_class: ProcessingClass) -> TeacherInfo | None:
    """The description of the teacher signal that the responses will have, or `None` if they will have none."""
    _, options, _, target = call
    if options.signal is None:
        return None
    mode = target.init_kwargs.get("logprobs_mode")
    modes = {
        "transformers": "processed",
        "vllm": LOGPROBS_MODES.get(mode or "processed_logprobs", "raw"),
        "server": mode or "raw",
    }
    # what a teacher signal records of the engine that will make it; no check depends on what it describes
    engine = SimpleNamespace(
        name=target.engine, target_name=target.target, logprobs_mode=modes[target.engine], describe=dict
    )
    return describe_teacher(cast(Engine, engine), processing_class, options)
