import dataclasses

import pytest
from example_report import BEFORE, around

from spec_kd.evaluation.report.content import EvaluationReport
from spec_kd.evaluation.report.recommended import DraftingPlan, Recommendations
from spec_kd.evaluation.report.recommended_section import tabulate_plans
from spec_kd.evaluation.report.rendering import render_html, render_markdown
from spec_kd.serving.configuration import EngineConfiguration

COMMAND = 'vllm serve org/target --speculative-config \'{"model": "<b>|`draft`"}\''


@pytest.fixture
def advised(report):
    """The example with what to set in the engine; a threshold leaves the speed-up between two numbers."""
    fixed = DraftingPlan(
        setting="t1", temperature=1.0, batch_size=8, draft_sampling="greedy", method="fixed", num_assistant_tokens=4,
        threshold=0.0, block_efficiency=around(2.4, 0.1), drafted=(4.0, 4.0), predicted_speedup=around(1.5, 0.1),
        highest_speedup=1.5,
    )  # fmt: skip
    early = dataclasses.replace(
        fixed, method="threshold", threshold=0.4, drafted=(2.0, 3.5), highest_speedup=1.7, is_recommended=True
    )
    configuration = EngineConfiguration(
        title="temperature 1, batch size 8", serving_engine="vllm", num_assistant_tokens=4, flags=[], command=COMMAND,
        language="bash",
    )  # fmt: skip
    advice = Recommendations(plans=[fixed, early], configurations=[configuration], notes=["A note."])
    *others, last = report.drafts
    return dataclasses.replace(report, drafts=[*others, dataclasses.replace(last, recommendations=advice)])


def test_plans_stand_in_a_table_with_their_bounds(advised):
    table = tabulate_plans(advised)
    fixed, early = (dict(zip(table.header, row, strict=True)) for row in table.rows)
    assert fixed["drafted in a round"] == "4.00" and fixed["at most"] == "–" and fixed["recommended"] == ""
    assert early["drafted in a round"] == "2.00 to 3.50" and early["at most"] == "1.70"
    assert early["drafting"] == "ends where the draft is not sure (0.4)" and early["recommended"] == "yes"
    assert early["predicted speed-up"] == "1.50 [1.40, 1.60]" and early["batch size"] == "8"


def test_the_section_has_the_command_as_it_is(advised):
    text = render_markdown(advised)
    section = text[text.index("## Recommended configuration") : text.index("## Cross-check")]
    assert f"```bash\n{COMMAND}\n```" in section
    assert "**temperature 1, batch size 8**" in section and "A note." in section
    page = render_html(advised)
    assert "&lt;b&gt;|`draft`" in page and "<b>|" not in page
    assert page.index("<h2>Recommended configuration</h2>") > page.index("<h2>Costs</h2>")


def test_a_report_keeps_them(advised):
    again = EvaluationReport.from_json(advised.to_json())
    assert again.draft.recommendations == advised.draft.recommendations
    assert again.draft.recommendations.plans[1].drafted == (2.0, 3.5)
    assert again.drafts[0].name == BEFORE and again.drafts[0].recommendations is None


def test_there_is_no_section_without_them(report):
    assert "Recommended configuration" not in render_markdown(report)
    assert "Recommended configuration" not in render_html(report)
