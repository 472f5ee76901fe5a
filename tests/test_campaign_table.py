from campaign_table import Cell, Table, choose_cells

TABLE = Table(
    "made_up",
    {f"row {i}": i for i in range(20)},
    columns=("cheap", "dear", "dearest"),
    missing={"row 3": {"cheap": "nothing to do"}},
)


def test_cells_are_rows_times_columns_without_the_missing_ones():
    cells = list(TABLE)
    assert len(cells) == 20 * 3 - 1
    assert Cell("made_up", "row 3", "cheap") not in cells
    assert TABLE[Cell("made_up", "row 7", "dear")] == 7


def test_the_cheapest_cell_of_each_row_is_always_chosen():
    chosen = choose_cells(list(TABLE), "a", num_chosen=0)
    assert len(chosen) == 20
    assert {cell.column for cell in chosen if cell.row != "row 3"} == {"cheap"}
    assert {cell.column for cell in chosen if cell.row == "row 3"} == {"dear"}


def test_the_commit_picks_the_others():
    cells = list(TABLE)
    first, again, other = (choose_cells(cells, commit, num_chosen=10) for commit in ("a", "a", "b"))
    assert len(first) == 30
    assert first == again != other
