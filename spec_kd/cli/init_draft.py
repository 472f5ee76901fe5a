"""`spec-kd init-draft`: makes a draft from a target, or from another donor, before any training."""

import spec_kd
from spec_kd.cli.arguments import InitDraftFiles
from spec_kd.cli.model_checks import check_model, naming_model
from spec_kd.cli.paths import check_exists
from spec_kd.cli.rows import load_rows
from spec_kd.cli.steps import Workspace, list_options, tell
from spec_kd.cli.train import PRODUCTS
from spec_kd.evaluation import read_costs
from spec_kd.loading import load_tokenizer
from spec_kd.open_types import JsonObject

NOT_INPUTS = ("target", "donor", "responses", "costs", "output_dir")  # these by their content


def run(files: InitDraftFiles, options: spec_kd.DraftShapeOptions, workspace: Workspace | None = None) -> JsonObject:
    """Writes the draft to `output_dir`; returns its size, its layers and its acceptance before training.

    Raises:
        ValueError: The donor cannot give such a draft, or a model or the responses cannot be read.
        OSError: A model or the responses do not exist.
    """
    workspace = workspace or Workspace()
    models = {"target": files.target} | ({} if files.donor is None else {"donor": files.donor})
    for name, source in {**models, "responses": files.responses, "costs": files.costs}.items():
        check_exists(name, source)
    inputs: JsonObject = {
        **{name: workspace.fingerprints.of_model(source) for name, source in models.items()},
        "responses": None if files.responses is None else workspace.fingerprints.of_data(files.responses),
        **({} if files.costs is None else {"costs": workspace.fingerprints.of_data(files.costs)}),
        "options": list_options(files, NOT_INPUTS) | list_options(options),
    }
    if not workspace.is_finished(files.output_dir, inputs):
        for name, source in models.items():
            check_model(name, source)

    def work() -> JsonObject:
        tokenizers = {}
        for name, source in models.items():
            with naming_model(f"tokenizer of the {name}", source):
                tokenizers[name] = load_tokenizer(source)
        found = spec_kd.init_draft(
            files.target,
            options,
            donor=files.donor,
            responses=None if files.responses is None else load_rows(files.responses, option="responses"),
            temperature=files.temperature,
            costs=None if files.costs is None else read_costs(files.costs)[0],
            processing_class=tokenizers["target"],
            donor_processing_class=tokenizers.get("donor"),
        )
        found.save_pretrained(files.output_dir)
        tell(found.summary)
        names = ("layers", "num_parameters", "num_head_parameters", "num_bytes", "alpha", "matched_ids", "cost_ratio")
        return {name: getattr(found, name) for name in names}

    return workspace.do(files.output_dir, "init-draft", inputs, PRODUCTS, work)
