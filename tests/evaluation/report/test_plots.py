import dataclasses
import io
import sys

import pytest

from spec_kd.evaluation.report.plots import find_worst_breakdown, plot_report


def test_panels(report):
    figure = plot_report(report)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        *("block efficiency, t1", "predicted speed-up, t1", "acceptance by position, t1", "alpha by token class, t1"),
        "block efficiency, greedy",
        "predicted speed-up, greedy",
        "acceptance by position, greedy",
        "alpha by token class, greedy",
    ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [draft.name for draft in report.drafts]
    for line, draft in zip(figure.axes[0].get_lines(), report.drafts, strict=True):
        expected = [at_gamma.block_efficiency.value for at_gamma in draft.settings[0].by_gamma]
        assert line.get_ydata().tolist() == expected
    assert [text.get_text() for text in figure.axes[1].get_legend().get_texts()] == ["batch 1", "batch 8"]
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels[1] == "digit (543)"


def test_a_small_report_has_no_empty_panels(small_report):
    assert len(plot_report(small_report).axes) == 2


def test_names_are_no_formulas(small_report):
    draft = dataclasses.replace(small_report.draft, name=r"_$\frac{$")
    figure = plot_report(dataclasses.replace(small_report, drafts=[draft]))
    figure.savefig(io.BytesIO(), format="png")
    (label,) = figure.legends[0].get_texts()
    assert label.get_text() == r" _\$\frac{\$"


def test_the_worst_breakdown_has_the_worst_part_that_is_not_rare(report):
    setting = report.draft.settings[0]
    assert find_worst_breakdown(setting).title == "token class"  # "rare" has 0.2 % of the tokens, "CJK" decides
    shorter = [dataclasses.replace(b, rows=[r for r in b.rows if "CJK" not in r.label]) for b in setting.breakdowns]
    rows = [r for r in shorter[1].rows if r.label != "digit"]
    shorter[1] = dataclasses.replace(shorter[1], rows=rows)
    assert find_worst_breakdown(dataclasses.replace(setting, breakdowns=shorter)).title == "position"


def test_too_many_parts_are_said_to_be_left_out(report):
    setting = report.draft.settings[0]
    row = setting.breakdowns[0].rows[0]
    rows = [
        dataclasses.replace(row, label=f"part {i}", alpha=row.alpha._replace(value=0.3 + 0.5 * (i % 20) / 20))
        for i in range(20)
    ]
    breakdown = dataclasses.replace(setting.breakdowns[0], rows=rows)
    draft = dataclasses.replace(report.draft, settings=[dataclasses.replace(setting, breakdowns=[breakdown])])
    axis = plot_report(dataclasses.replace(report, drafts=[draft])).axes[-1]
    assert [label.get_text() for label in axis.get_yticklabels()] == [f"part {i} ({row.tokens:,})" for i in range(12)]
    assert axis.get_xlabel().endswith("the worst 12 of 20")


def test_no_global_state(report, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    plot_report(report).savefig(io.BytesIO(), format="png")
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install spec_kd\[report\]"):
        plot_report(report)


def test_fonts_are_installed_ones(report):
    from matplotlib.font_manager import get_font_names

    labels = plot_report(report).axes[3].get_yticklabels()
    families = labels[0].get_fontfamily()
    assert families[0] == "DejaVu Sans" and set(families) <= set(get_font_names())
