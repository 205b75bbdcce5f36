"""Lines of progress where there is no terminal."""

import pytest

from lightspine.utils.progress import LineTimer, format_seconds, progress_bar


def test_lines_have_the_position_and_the_remaining_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar([1, 2, 3], "reading", every_seconds=0)) == [1, 2, 3]
    assert capsys.readouterr().err.splitlines() == ["reading: 1/3, 0:00 left", "reading: 2/3, 0:00 left"]


def test_lines_of_an_iterator_have_no_total(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(iter("ab"), "reading", every_seconds=0)) == ["a", "b"]
    assert capsys.readouterr().err == "reading: 1\n"


@pytest.mark.parametrize("options", [{"shown": False, "every_seconds": 0}, {"every_seconds": 3600}])
def test_nothing_is_printed_before_the_time_or_if_not_shown(
    options: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress_bar([1, 2, 3], "reading", **options)) == [1, 2, 3]  # type: ignore[arg-type]
    assert capsys.readouterr() == ("", "")


def test_line_is_due_once_in_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timer, due = LineTimer(30), []
    for now[0] in (29.0, 30.0, 31.0, 59.0, 60.0):
        due.append(timer.is_due())
    assert due == [False, True, False, False, True]


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05")])
def test_duration(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
