# SPDX-License-Identifier: Apache-2.0
"""Pictures and small tables of the pages show the numbers that the code gives now."""

import re
from pathlib import Path

import pytest

from benchmarks import dropped_mass, lattice_picture, plot, report, results

Image = pytest.importorskip("PIL.Image")
ROOT = Path(__file__).resolve().parents[1]
STEP = ROOT / "benchmarks" / "results" / "cpu_step.json"


def test_the_picture_of_the_readme_shows_the_committed_run():
    run = results.merged(results.read(STEP))[0]
    drawn = Image.open(ROOT / "docs" / "images" / "step.png").info["Source"]
    assert drawn == results.fingerprint(run), "draw it again: python -m benchmarks.report --help"


def test_no_two_names_in_the_picture_of_the_readme_overlap(tmp_path, monkeypatch):
    (tmp_path / "step.json").write_text(STEP.read_text())
    monkeypatch.setattr(
        "sys.argv", ["report", str(tmp_path / "step.json"), "--step", str(tmp_path / "step.png")]
    )
    boxes = []
    named = plot._name_points

    def remember(axes, rows):
        named(axes, rows)
        boxes.extend(text.get_window_extent() for text in axes.texts)

    monkeypatch.setattr(plot, "_name_points", remember)
    report.main()
    assert Image.open(tmp_path / "step.png").size[0] > 1000
    assert not (tmp_path / "step.md").exists()
    assert len(boxes) == 10
    assert not any(one.overlaps(two) for one in boxes for two in boxes if one is not two)


@pytest.fixture(scope="module")
def panels():
    return lattice_picture.panels()


def test_the_lattice_picture_shows_what_backward_visits(panels, tmp_path, capsys):
    for panel in panels:
        # The loss bins occupancies, so it may keep a few cells more than the exact rule.
        visited = float(panel.visited.float().mean())
        assert visited <= panel.kept + 1e-6 <= 1.03 * visited + 0.01
        assert float(panel.occupancy.sum()) == pytest.approx(sum(panel.occupancy.shape) - 1)
    assert panels[1].kept < 0.5 * panels[0].kept
    lattice_picture.check(ROOT / "docs" / "images" / "lattice.png", *panels)
    path = tmp_path / "lattice.png"
    lattice_picture.draw(path, panels[1], panels[1])
    with pytest.raises(SystemExit, match="draw it again"):
        lattice_picture.check(path, *panels)
    page = (ROOT / "docs" / "fused.md").read_text()
    shares = [int(share) for share in re.search(r"visits (\d+) % and (\d+) %", page).groups()]
    assert shares == pytest.approx([100 * panel.kept for panel in panels], abs=5)


def test_the_table_of_dropped_masses_is_what_the_module_prints():
    def rows(text):
        found = re.findall(r"^\| ((?:un)?fused.*?) \|(.*)\|$", text, flags=re.MULTILINE)
        return {name: [float(cell.strip().rstrip("%")) for cell in cells.split("|")]
                for name, cells in found}  # fmt: skip

    printed = rows(dropped_mass.table())
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    page = page.partition("## Occupancy filter")[2].partition("\n## ")[0]
    assert rows(page).keys() == printed.keys() and len(printed) == 7
    for name, shown in rows(page).items():
        # Errors at the level of rounding differ between processors.
        assert printed[name][::2] == pytest.approx(shown[::2], rel=2), name
        assert printed[name][1::2] == pytest.approx(shown[1::2], abs=5), name
