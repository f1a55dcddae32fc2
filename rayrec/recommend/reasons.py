"""Why a song was recommended, in words, from the features that the ranker saw of it."""

from __future__ import annotations

from collections.abc import Mapping

MOST = 3  # reasons given for a song
LAST_PLAYS = 5  # shown beside reasons
POPULAR = "it is among the most played songs"  # where nothing is known of the user
NEAR = 0.1  # a rank feature, 1 / (1 + rank), that says a song is among the first ten


def reasons(features: Mapping[str, float], last_title: str | None) -> list[str]:
    """At most three reasons for one song, the strongest kind first.

    `features` are by name, those of a catalog without artists may be missing; `last_title` is that of the song played
    last, None where there is none.
    """

    def value(name: str) -> float:
        return float(features.get(name, 0.0))

    last = last_title or "your last play"
    said: list[str] = []
    if value("user_rules_score") > 0:
        said.append(f"you played it after {last} before")
    if value("user_plays") > 0:
        said.append(f"you played it {_times(value('user_plays'))}, {_ago(features)}")
    if value("album_of_last_song"):
        said.append("same album as your last play")
    elif value("artist_of_last_song"):
        said.append("same artist as your last play")
    elif value("artist_user_plays") > 0:
        said.append(f"you played its artist {_times(value('artist_user_plays'))}")
    if value("next_rules_rank") >= NEAR:
        said.append(f"all listeners together played it right after {last} {_times(value('next_rules_score'))}")
    elif value("rules_rank") >= NEAR:
        said.append(f"other listeners often play it soon after {last}")
    elif value("recent_rules_rank") >= NEAR:
        said.append("other listeners often play it soon after your last songs")
    if value("sessions_rank") >= NEAR:
        said.append("it is in sessions like yours")
    elif value("history_sessions_rank") >= NEAR:
        said.append("listeners with your songs play it")
    if value("taste_short_rank") >= NEAR:
        said.append("it is near to what you listen to now")
    if value("taste_long_rank") >= NEAR:
        said.append("it fits what you listen to over time")
    if value("popular_score") > 0:
        said.append("it is popular this week")
    return said[:MOST] or ["it is near to what you listen to"]


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:.0f} times"


def _ago(features: Mapping[str, float]) -> str:
    """When it was played last: hours or days ago where times are known, else in plays."""
    hours, plays = float(features.get("user_hours_since", 0.0)), float(features.get("user_plays_since", 0.0))
    if hours <= 0:
        return "last just now" if plays < 1 else f"last {plays + 1:.0f} plays ago"
    if hours < 1:
        return "last within the hour"
    if hours < 48:
        return f"last {hours:.0f} {'hour' if round(hours) == 1 else 'hours'} ago"
    return f"last {hours / 24:.0f} days ago"
