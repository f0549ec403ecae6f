import contextlib
import io
import itertools

import pytest

from bert4rec import progress
from bert4rec.progress import Line, duration, track

pytestmark = pytest.mark.unit


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


def test_rate_and_time_left_are_of_the_work_alone(clock):
    line = Line("scoring", 100, "users")
    assert str(line) == "scoring: starting"
    clock[0] += 50  # start-up
    line.skip(20)
    line.advance(10)  # what the first report tells took an unknown time
    clock[0] += 10
    line.advance(20)
    assert str(line) == "scoring: 50%, 0:25 left, 2 users/s"
    clock[0] += 5  # nothing is reported meanwhile
    assert str(line) == "scoring: 50%, 0:20 left, 2 users/s"
    line.text = "epoch 1/2"
    assert str(line) == "scoring: 50%, 0:20 left, epoch 1/2"


def test_less_than_one_a_second(clock):
    line = Line("sorting", 10, "ranges")
    line.start()
    clock[0] += 5
    line.advance(2)
    assert str(line) == "sorting: 20%, 0:20 left, 2.5 s/range"


def test_a_terminal_has_one_line_that_never_wraps(terminal, clock):
    with contextlib.redirect_stdout(terminal):
        line = Line("scoring", 100, "users")
        line.text = "x" * 100
        line.advance(50)
        line.show()
        line.show()
        line.end()
    drawn = terminal.getvalue().split("\r\x1b[2K")
    assert drawn[0] == drawn[-1] == ""  # the last thing is a cleared line
    assert len(drawn) == 4
    assert [len(each) for each in drawn[1:3]] == [39, 39]
    assert drawn[1].startswith("scoring: 50%, xxx")
    assert drawn[1].endswith("…")


def test_a_log_has_plain_lines_ever_more_seldom(clock):
    times = []
    with contextlib.redirect_stdout(io.StringIO()) as out:
        line = Line("training", 100, "epochs", seconds_between_lines=10)
        line.start()
        for second in range(3601):
            before = len(out.getvalue())
            line.show()
            if len(out.getvalue()) > before:
                times.append(second)
            clock[0] += 1
        line.end()
    assert times[:3] == [10, 20, 30]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps == sorted(gaps)
    assert 60 <= gaps[-1] <= 75
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_track_clears_its_line_also_when_the_work_fails(terminal):
    def work():
        for item in track([1, 2, 3], "checking", "files", 3):
            if item == 2:
                raise ValueError

    with contextlib.redirect_stdout(terminal), pytest.raises(ValueError):  # noqa: PT011
        work()
    assert terminal.getvalue().endswith("\r\x1b[2K")
    assert "checking: 33%" in terminal.getvalue()
    assert list(track([1, 2, 3], "checking", "files", 3)) == [1, 2, 3]


def test_durations():
    assert [duration(seconds) for seconds in (7, 750, 11100)] == ["0:07", "12:30", "3:05:00"]
