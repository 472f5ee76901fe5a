"""The command line; see the package's first lines."""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness import describe_machine
from examples.made_up.embedded_run import use_all_cores

from . import __doc__ as DESCRIPTION
from .answers import Lab, make_answers
from .measure import measure_drift
from .models import build_all
from .plan import find_cells_left, find_questions, format_plan
from .profile import Profile, read_profile
from .record import Record, Workspace
from .report import write_report
from .run_cell import DivergedError, run_cell

RESULTS = Path(__file__).parent / "results"
STAGES = ("plan", "targets", "drift", "answers", "runs", "report")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "paper_claims", description=DESCRIPTION, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--profile", default="cpu", help="cpu, gpu or the path of a YAML file")
    parser.add_argument("--data_dir", help="in place of the profile's data.folder")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/paper_claims"), help="models, queries, answers")
    parser.add_argument("--results_dir", type=Path, default=RESULTS, help="the record and the report")
    parser.add_argument("--domains", nargs="+", help="all stages but plan and report: these domains only")
    parser.add_argument("--questions", nargs="+", help="runs: the cells of these questions only")
    parser.add_argument("--max_hours", type=float, default=float("inf"), help="runs: begin no cell after so long")
    return parser


def main(argv: list[str] | None = None) -> None:
    arguments = build_parser().parse_args(argv)
    profile = read_profile(arguments.profile, arguments.data_dir)
    record = Record(arguments.results_dir / profile.name / "record.jsonl")
    workspace = Workspace(profile, arguments.work_dir / profile.name, record)
    if arguments.stage == "plan":
        print(format_plan(profile, record))
        return
    if arguments.stage == "report":
        print(write_report(record.path))
        return
    domains = arguments.domains or list(profile.domains)
    if unknown := sorted(set(domains) - set(profile.domains)):
        raise ValueError(f"There are no domains {unknown}. Known are {list(profile.domains)}.")
    use_all_cores()
    note_profile(profile, record)
    if arguments.stage == "targets":
        build_all(workspace, domains)
    elif arguments.stage == "runs":
        run_cells(workspace, domains, arguments.questions, arguments.max_hours)
    else:
        stage = {"drift": measure_drift, "answers": make_answers}[arguments.stage]
        for domain in domains:
            stage(Lab(workspace, domain))


def note_profile(profile: Profile, record: Record) -> None:
    """The record begins with what it is of and where it is made; a changed profile or another machine is noted too."""
    line = record.find("profile", "profile")
    if line is None or line["profile"] != asdict(profile):
        record.append("profile", "profile", profile=asdict(profile))
    machine = describe_machine()
    key = f"{machine['cpu']}, {machine['threads']} threads"
    if record.find("machine", key) is None:
        record.append("machine", key, machine=machine)


def run_cells(workspace: Workspace, domains: list[str], names: list[str] | None, max_hours: float) -> None:
    """Runs what has no line yet, in the order of the plan; what the search finds adds cells on the way.

    Processes that are given different domains can work side by side.

    Raises:
        `ValueError`: A question that there is not.
        `RuntimeError`: Cells that could not be run, after all others.
    """
    started, failed, lab = time.monotonic(), {}, None
    builds = {domain: Lab(workspace, domain).build for domain in domains}
    known = [question.name for question in find_questions(workspace.profile, workspace.record)]
    unknown = sorted(set(names or []) - {*known, "recipe", "recipe_tuned"})
    if unknown:
        raise ValueError(
            f"There are no questions {unknown}. Known are {known}, and `recipe` and `recipe_tuned` after the search."
        )
    while time.monotonic() - started < 3600 * max_hours:
        asked = [
            question
            for question in find_questions(workspace.profile, workspace.record)
            if names is None or question.name in names
        ]
        left = find_cells_left(workspace.profile, workspace.record, asked, builds)
        left = [(cell, own) for cell, own in left.items() if cell not in failed]
        if not left:
            break
        cell, questions = left[0]
        print(f"{len(left)} cells left; {cell}", flush=True)
        if lab is None or lab.domain != cell.domain:
            lab = Lab(workspace, cell.domain)
        try:
            line = run_cell(lab, cell, questions)
        except DivergedError as error:
            print(f"  {error}", flush=True)
            continue
        except ValueError as error:  # the other cells do not depend on it
            failed[cell] = error
            print(f"  failed: {error}", flush=True)
            continue
        efficiency = {s: f["tokens"] and sum(f["tokens"]) / sum(f["target_calls"]) for s, f in line["figures"].items()}
        print(f"  {line['steps']} steps, {line['train_seconds']:.0f} s, tokens a pass {efficiency}", flush=True)
    if failed:
        raise RuntimeError(
            "Cells could not be run:\n" + "\n".join(f"{cell}: {error}" for cell, error in failed.items())
        )


if __name__ == "__main__":
    main()
