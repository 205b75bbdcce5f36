"""`lightspine report`: output and usage errors."""

from pathlib import Path

import pytest

from lightspine.benchmark.results import save_results
from lightspine_cli.main import main
from support.bench_results import a_result, a_row


def test_report_is_written_where_asked_with_its_title(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_results(a_result([a_row("shvit_s1"), a_row("shvit_s2")]), tmp_path / "run")
    out = tmp_path / "page"
    arguments = [
        "report",
        str(tmp_path / "run" / "results.json"),
        "--out",
        str(out),
        "--title",
        "My <models>",
    ]
    assert main(arguments) == 0
    assert "<h1>My &lt;models&gt;</h1>" in (out / "report.html").read_text(encoding="utf-8")
    assert sorted(path.suffix for path in (out / "charts").iterdir()) == [".png", ".svg"]
    assert f"{out / 'report.html'}: 2 rows (2 measured), 1 chart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "part", "status"),
    [
        (None, "No such file", 1),
        ("not json", "is not JSON", 1),
        ('{"some": "thing"}', "expected a result of `lightspine bench`", 1),
    ],
    ids=["no file", "no JSON", "other JSON"],
)
def test_what_is_no_result_is_one_sentence(
    content: str | None, part: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert part in lines[0]
    assert not (tmp_path / "out").exists()


def test_call_without_a_file_is_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report"]) == 2
    assert "RESULTS" in capsys.readouterr().err
