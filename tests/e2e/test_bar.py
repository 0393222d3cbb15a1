"""The line of progress at a real terminal, while nothing happens for a while."""

import re
import sys

import pytest

# two of six records come after a second, and no more for three
CODE = """
import sys, time
from vla2cli.console import Console
from vla2cli.progress import Watch
from vla2cli.stats import Stats
stats = Stats(1)
with Watch(Console(quiet="quiet" in sys.argv), stats, 6, is_shown=False) as watch:
    time.sleep(1)
    watch.advance(2)
    with stats.working("language"):
        time.sleep(3)
    watch.advance(6)
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*[34][0-9]m")


@pytest.fixture
def shown(vla2):
    """Run it at a terminal; give its stderr."""

    def run(*args, **env):
        done = vla2("-c", CODE, *args, program=sys.executable, terminals=("stderr",), env=env)
        assert (done.code, done.stdout) == (0, "")
        return done.stderr

    return run


def test_rate_and_time_left_and_shares_are_of_the_present(shown):
    text = shown(NO_COLOR="1", TERM="xterm-256color")
    assert not COLOUR.search(text)
    waiting = re.findall(r"2/6 (\S+)/(?:s|min) (\S+) s left.*?language (\d+)%", text)
    rates, left_s, shares = zip(*((float(a), float(b), int(c)) for a, b, c in waiting))
    assert len(set(rates)) >= 4
    # 2 of 6 in 1 s is 2 s for the others, in 4 s it is 8 s
    assert list(left_s) == sorted(left_s)
    assert left_s[0] < 4
    assert 6 < left_s[-1] < 10
    assert list(shares) == sorted(shares)
    assert shares[-1] > 60
    assert "0/6 --:-- left" in text
    assert "0.0 s left" in text.rpartition("6/6")[2]


def test_bar_has_colours_where_they_are_wanted_and_is_silent_where_asked(shown):
    assert COLOUR.search(shown(NO_COLOR=None, TERM="xterm-256color"))
    assert shown("quiet") == ""
