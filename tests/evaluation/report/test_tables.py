import dataclasses

from example_report import AFTER, BEFORE

from spec_kd.evaluation.report import tables


def test_every_draft_and_setting_has_a_row(report):
    table = tables.tabulate_metrics(report)
    assert [row[:2] for row in table.rows] == [["t1", BEFORE], ["t1", AFTER], ["greedy", BEFORE], ["greedy", AFTER]]
    after = dict(zip(table.header, table.rows[1], strict=True))
    assert after["alpha"] == "0.620 [0.608, 0.632]" and after["block efficiency"] == "2.48 [2.36, 2.61]"
    assert after["alpha is"] == "estimate, bounded by 0.610 and 0.635" and after["tokens"] == "5,432"
    assert table.rows[3][-1] == "exact"


def test_settings_that_only_one_draft_has(report):
    before, after = report.drafts
    mixed = dataclasses.replace(report, drafts=[before, dataclasses.replace(after, settings=after.settings[1:])])
    assert tables.list_settings(mixed) == ["greedy", "t1"]
    assert [row[:2] for row in tables.tabulate_metrics(mixed).rows] == [
        ["greedy", BEFORE],
        ["greedy", AFTER],
        ["t1", BEFORE],
    ]


def test_what_is_left_out(report):
    table = tables.tabulate_left_out(report)
    assert [row[:2] for row in table.rows] == [["t1", BEFORE], ["t1", AFTER], ["greedy", BEFORE], ["greedy", AFTER]]
    cells = dict(zip(table.header, table.rows[1], strict=True))
    assert (cells["left out"], cells["responses"], cells["share"]) == ("looping completions", "16", "12.5%")
    assert (cells["alpha"], cells["alpha without them"]) == ("0.620 [0.608, 0.632]", "0.570 [0.550, 0.590]")


def test_comparisons(report):
    rows = tables.tabulate_comparisons(report).rows
    pair = f"{AFTER} minus {BEFORE}"
    assert rows[1] == ["t1", "block efficiency", pair, "+1.180 [+1.080, +1.280]", "yes"]
    assert rows[2] == ["greedy", "alpha", pair, "+0.554 [-0.046, +1.154]", "no"]


def test_costs_and_speedups(report):
    table = tables.tabulate_costs(report)
    row = dict(zip(table.header, table.rows[2], strict=True))
    assert row["draft"] == AFTER and row["batch size"] == "1" and row["cost ratio"] == "0.120"
    assert row["verify cost at gamma 5"] == "1.020" and row["target step, ms"] == "21.30"
    assert row["break-even alpha"] == "0.161"
    assert table.rows[3][5:7] == ["–", "0.203"]
    speedups = tables.tabulate_speedups(report).rows
    assert len(speedups) == 8 and speedups[2][:3] == ["t1", AFTER, "1"]


def test_break_even_alpha_by_setting_where_it_differs(report):
    settings = [
        dataclasses.replace(setting, break_even_alpha={"1": 0.1 * i}) for i, setting in enumerate(report.draft.settings)
    ]
    changed = dataclasses.replace(report, drafts=[dataclasses.replace(report.draft, settings=settings)])
    row = tables.tabulate_costs(changed).rows[0]
    assert row[6] == "t1: 0.000, greedy: 0.100"


def test_drafts_stand_together_in_a_breakdown(report):
    collected = tables.collect_breakdowns(report, "t1")
    assert list(collected) == ["position", "token class", "tool <b>name</b>"]
    assert [index for index, _ in collected["token class"]["digit"]] == [0, 1]
    table = tables.tabulate_breakdown(report, "position", collected["position"])
    assert "block efficiency" not in table.header and len(table.rows) == 6
    with_blocks = tables.tabulate_breakdown(report, "tool", collected["tool <b>name</b>"])
    assert with_blocks.rows[1][2:] == ["0.620 [0.590, 0.650]", "2.48 [2.38, 2.58]", "3,200", "80"]


def test_provenance_is_flat(report):
    rows = dict(tables.tabulate_provenance(report).rows)
    assert rows["target.revision"] == "0123abc" and rows["data.temperatures"] == "[1.0, 0.0]"
    assert rows["revision_of_the_data"] == "–" and rows["rule of acceptance"] == report.serving_rule


def test_every_row_has_a_cell_for_every_column(report, small_report):
    for shown in (report, small_report):
        for name in tables.list_settings(shown):
            collected = tables.collect_breakdowns(shown, name)
            all_tables = [
                tables.tabulate_metrics(shown),
                tables.tabulate_comparisons(shown),
                tables.tabulate_positions(shown, name),
                tables.tabulate_gammas(shown, name),
                tables.tabulate_costs(shown),
                tables.tabulate_speedups(shown),
                tables.tabulate_assisted(shown),
                tables.tabulate_provenance(shown),
                *(tables.tabulate_breakdown(shown, title, rows) for title, rows in collected.items()),
            ]
            for table in all_tables:
                assert {len(row) for row in table.rows} <= {len(table.header)}, table.title
