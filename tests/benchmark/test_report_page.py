"""HTML page of `lightspine report`: complete, consistent with the results, escaped, self-contained."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from lightspine.benchmark.interleaved_timing import Timing
from lightspine.benchmark.presets import find_preset
from lightspine.benchmark.report import Report, write_report
from lightspine.benchmark.results import BenchResult, PublishedFigures, save_results
from lightspine.errors import LightspineError, UsageError
from support.bench_results import a_result, a_row, a_timing, sizes_result, steps_result, table_result
from support.html_pages import ReadPage, read_page

HOSTILE = "<img src=x onerror=alert(1)></script>\"'&$x$\x1b[2J\r\u202e"


def _report(folder: Path, *results: BenchResult, title: str = "Title") -> Report:
    for number, result in enumerate(results):
        save_results(result, folder / str(number))
    return write_report([folder / str(number) for number in range(len(results))], folder / "out", title=title)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return _report(tmp_path_factory.mktemp("report"), table_result(), sizes_result(), steps_result())


@pytest.fixture(scope="module")
def page(whole: Report) -> ReadPage:
    return read_page(whole.page.read_text(encoding="utf-8"))


def test_every_time_of_the_files_stands_in_the_tables(page: ReadPage) -> None:
    exact = {cell.attributes.get("title") for table in page.tables for row in table for cell in row}
    times = [
        time
        for result in (table_result(), sizes_result(), steps_result())
        for row in result.rows
        for time in (row.forward, row.train_step)
        if time
    ]
    assert len(times) > 70
    expected = {repr(value) for time in times for value in (time.median_ms, time.p90_ms, time.images_per_s)}
    assert expected - exact == set()


def test_shown_number_is_that_of_the_file_rounded(page: ReadPage) -> None:
    cells = [cell for table in page.tables for row in table for cell in row if "title" in cell.attributes]
    times = [cell for cell in cells if float(cell.attributes["title"]) < 1e5]
    assert len(times) > 100
    for cell in times:
        assert float(cell.text.replace(",", "")) == pytest.approx(float(cell.attributes["title"]), rel=1e-3)


def test_tables_have_a_row_for_each_row_of_the_files(page: ReadPage) -> None:
    tables = [table for table in page.tables if any(cell.text == "median ms" for cell in table[1])]
    results = (table_result(), sizes_result(), steps_result())
    assert [len(table) - 2 for table in tables] == [len(result.rows) for result in results]


def test_published_columns_are_headed_as_published(page: ReadPage) -> None:
    groups, names = page.tables[0][0], page.tables[0][1]
    spread = [cell.text for cell in groups for _ in range(int(cell.attributes.get("colspan", "1")))]
    heads = dict(zip([cell.text for cell in names], spread, strict=True))
    assert (heads["top-1 %"], heads["source"]) == ("published", "published")
    assert heads["median ms"] == "measured here"


@pytest.mark.parametrize("status", ["failed", "out of memory", "absent"])
def test_what_was_not_measured_is_shown_with_its_reason(page: ReadPage, status: str) -> None:
    reasons = {"failed": "the compiler gave up", "out of memory": "over 9000 MiB", "absent": "no such model"}
    told = [[cell.text for cell in row] for table in page.tables for row in table]
    assert any(status in row and any(reasons[status] in text for text in row) for row in told)


def test_commands_that_repeat_the_runs_are_told(page: ReadPage) -> None:
    assert "lightspine bench --preset vmamba-steps --threads 2" in page.text


def test_machine_is_described_once_for_runs_on_the_same(page: ReadPage) -> None:
    assert page.text.count("Made-up processor") == 1


def test_identifiers_are_unique(page: ReadPage) -> None:
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []


def test_references_inside_the_page_lead_somewhere(page: ReadPage) -> None:
    inside = [value[1:] for name, value in page.attributes if name == "href" and value.startswith("#")]
    assert inside
    assert set(inside) <= set(page.ids)


def test_nothing_is_fetched_from_anywhere(whole: Report, page: ReadPage) -> None:
    assert not {"img", "image", "iframe", "object", "embed", "base"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "srcset", "data")]
    assert [value for value in sources if not value.startswith(("#", "charts/", "data:"))] == []
    assert "@import" not in whole.page.read_text(encoding="utf-8")


def test_charts_can_be_read_without_seeing_them(page: ReadPage) -> None:
    labels = [value for name, value in page.attributes if name == "aria-label"]
    assert any("vim_tiny, eager, forward pass: 1.03" in label for label in labels)
    assert page.tags["svg"] == sum(pair == ("role", "img") for pair in page.attributes)


def test_text_of_the_charts_is_text(page: ReadPage) -> None:
    assert page.tags["text"] > 100
    assert "efficientvim_m1" in page.text


def test_each_chart_is_there_as_png_and_svg(whole: Report, page: ReadPage) -> None:
    linked = {value for name, value in page.attributes if name == "href" and value.startswith("charts/")}
    assert linked == {f"charts/{path.name}" for path in whole.charts}
    assert len(linked) == page.tags["figure"] * 2
    for path in whole.charts:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300
        else:
            assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    report = _report(tmp_path, a_result([a_row("shvit_s1")]))
    text = read_page(report.page.read_text(encoding="utf-8")).text
    absent = ("Modes", "Training step", "Cost over image size", "Accuracy over latency", "Not measured")
    assert not any(title in text for title in absent)
    assert "All measurements" in text


def test_everything_out_of_a_file_is_escaped(tmp_path: Path) -> None:
    published = PublishedFigures(top1=70.0, throughput=5.0, throughput_device=HOSTILE, source=HOSTILE)
    rows = [
        a_row(f"{HOSTILE}{number}", variant=f"{HOSTILE}{number}", note=HOSTILE, published=published)
        for number in range(2)
    ]
    rows += [a_row(f"{HOSTILE}{number}", published=published) for number in range(2)]
    rows.append(a_row("shvit_s1", status="failed", error=HOSTILE, forward=None))
    result = a_result(rows, preset=HOSTILE, settings={HOSTILE: HOSTILE}, system={HOSTILE: [HOSTILE]})
    report = _report(tmp_path, result, title=HOSTILE)
    page = read_page(report.page.read_text(encoding="utf-8"))
    assert (page.tags["img"], page.tags["script"]) == (0, 1)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert page.text.count("onerror=alert(1)") > 10
    assert page.text.count("\\x1b[2J\\r\\u202e") > 10
    assert not {"\x1b", "\r", "\u202e"} & set(report.page.read_bytes().decode())


def test_report_of_two_machines_tells_which_run_was_on_which(tmp_path: Path) -> None:
    other = a_result([a_row("shvit_s2", forward=a_timing(3.0))], system={"processor": "Another one"})
    report = _report(tmp_path, a_result([a_row("shvit_s1")]), other)
    page = read_page(report.page.read_text(encoding="utf-8"))
    assert "Another one" in page.text
    assert "Measured on one machine" not in page.text


def test_file_without_any_time_is_refused(tmp_path: Path) -> None:
    row = a_row("shvit_s1", status="failed", error="it broke", forward=None)
    with pytest.raises(LightspineError, match=r"no row of .* has a time"):
        _report(tmp_path, a_result([row]))


def test_time_that_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    row = a_row("shvit_s1", forward=Timing(median_ms=0, p90_ms=0, repeats=1, images_per_s=0))
    with pytest.raises(LightspineError, match=r"times above zero, .* has 0 ms in row 0 \(shvit_s1\)"):
        _report(tmp_path, a_result([row]))


def test_same_file_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="each result file once"):
        write_report([tmp_path, tmp_path], tmp_path / "out")


def test_older_page_stays_when_a_file_is_bad(tmp_path: Path) -> None:
    report = _report(tmp_path, a_result([a_row("shvit_s1")]))
    before = report.page.read_bytes()
    (tmp_path / "0" / "results.json").write_text("{}")
    with pytest.raises(LightspineError):
        write_report([tmp_path / "0"], tmp_path / "out")
    assert report.page.read_bytes() == before


def test_preset_is_named_with_what_it_compares(page: ReadPage) -> None:
    preset = find_preset("vim-resolution")
    assert preset.title in page.text
    assert preset.about in page.text


def test_status_is_told_where_only_some_rows_are_absent(tmp_path: Path) -> None:
    absent = a_row("other", status="absent", error="not here", forward=None, height=0, width=0)
    report = _report(tmp_path, a_result([a_row("shvit_s1"), absent]))
    measured, unmeasured = read_page(report.page.read_text(encoding="utf-8")).tables
    assert [[cell.text for cell in row if cell.text in ("ok", "absent")] for row in measured[2:]] == [
        ["ok"],
        ["absent"],
    ]
    assert "not here" in [cell.text for cell in unmeasured[1]]
