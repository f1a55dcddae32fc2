"""From a file of your own plays to recommendations: python examples/own_data.py plays.csv USER [FOLDER]

The file is CSV or Parquet with a user, a song and a time in each row, or has another format that `rayrec fit` reads.
"""

import sys

import rayrec


def main(plays: str, user: str, folder: str = "./model") -> None:
    # A second run replaces the plays. Use the folder with rayrec.load(folder) or rayrec --workspace FOLDER serve.
    model = rayrec.Recommender(workspace=folder, epochs=12).fit(plays)
    if model.quality is not None:
        for name, recall, *_ in model.quality.table():
            print(f"{name} finds {recall:.0%} of the next new songs among its first 20")
    print(model.recommend(users=[user], k=5).to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
