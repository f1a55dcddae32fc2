"""From a file of your own plays to recommendations: python examples/own_data.py plays.csv USER [FOLDER]

A CSV or Parquet file with a user, a song and a time in each row, or any other format that `rayrec fit` knows.
"""

import sys

import rayrec


def main(plays: str, user: str, folder: str = "./model") -> None:
    model = rayrec.Recommender(epochs=12).fit(plays)
    if model.quality is not None:
        for name, recall, *_ in model.quality.table():
            print(f"{name} finds {recall:.0%} of the next new songs among its first 20")
    print(model.recommend(users=[user], k=5).to_string(index=False))
    model.save(folder)  # rayrec.load(folder) opens it, and so does rayrec --workspace FOLDER serve


if __name__ == "__main__":
    main(*sys.argv[1:])
