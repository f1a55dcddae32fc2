"""Readable, unique, invented names for the songs and artists of generated data."""

# ruff: noqa: SIM905 - lists of words read better as prose

import numpy as np

FIRST = (
    "Amber Blue Broken Burning Coastal Crooked Distant Drifting Electric Empty Endless Fading Foreign Frozen Gentle "
    "Golden Hidden Hollow Honest Hungry Invisible Lazy Lonely Lost Lucky Midnight Morning Naked Northern Paper "
    "Quiet Restless Rolling Secret Silver Sleeping Southern Stolen Summer Velvet Wandering Winter"
).split()
SECOND = (
    "Avenue Bridges Carousel Cathedral Circles Compass Curtains Diamonds Engine Feathers Fever Fires Garden Gravity "
    "Harbour Highway Horses Island Kites Lanterns Letters Machine Mirrors Mountains Ocean Orchard Promises Radio "
    "Rain Rivers Rooms Satellites Shadows Signals Stairs Stations Strangers Telephones Tides Trains Umbrellas "
    "Weather Windows"
).split()
SYLLABLES = "ba de fi go ha ja ke li mo na or pa qui ra sa to ul va we xi ya zo".split()
ENSEMBLES = (  # one a genre, so that a reader sees in a list of names which songs belong together
    "Quartet Choir Collective Orchestra Brothers Sound System Trio Machine Band Ensemble Sisters Project Family "
    "Society Express Club"
).split()


def song_titles(count: int, seed: int) -> np.ndarray:
    """object (count,): titles such as `Velvet Harbour`, all different; after the pairs are used up, `..., Part 2`."""
    pairs = len(FIRST) * len(SECOND)
    order = np.random.default_rng(seed).permutation(pairs)[np.arange(count) % pairs]
    titles = np.array(FIRST, dtype=object)[order // len(SECOND)] + " "
    titles = titles + np.array(SECOND, dtype=object)[order % len(SECOND)]
    return _numbered(titles, np.arange(count) // pairs, ", Part ")


def artist_names(genres: np.ndarray) -> np.ndarray:
    """object (artists,): names such as `Kelimo Quartet`, all different; `genres`, int (artists,), give the last."""
    size = len(SYLLABLES)
    # A step prime to the number of names spreads neighbours apart and still meets every name once.
    number = np.arange(len(genres)) * 7_919 % size**3
    syllables = np.array(SYLLABLES, dtype=object)
    names = syllables[number // size**2] + syllables[number // size % size] + syllables[number % size]
    capital = np.array([name.capitalize() for name in names], dtype=object)
    words = np.array(ENSEMBLES, dtype=object)[genres % len(ENSEMBLES)]
    return _numbered(capital + " " + words, np.arange(len(genres)) // size**3, " ")


def _numbered(names: np.ndarray, repeats: np.ndarray, between: str) -> np.ndarray:
    again = np.array([f"{between}{repeat + 1}" if repeat else "" for repeat in repeats], dtype=object)
    return np.asarray(names + again)
