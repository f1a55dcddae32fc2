"""From a CSV of your own plays to recommendations: python examples/own_data.py plays.csv [workspace]

The file has the columns user_id, song_id and ts (unix seconds or milliseconds, or ISO 8601 with a
zone); where yours are called otherwise, change COLUMNS. Titles and artists are optional.
"""

import sys
import time

from rayrec import Dataset, Workspace
from rayrec.jobs.pipeline import run
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.storage.releases import default_parts

COLUMNS = {"user": "user_id", "song": "song_id", "played_at": "ts"}


def main(plays: str, folder: str = "./workspace") -> None:
    workspace = Workspace(folder)
    # Without a [split] section every play is learned from, as one does in production.
    stages = run(
        workspace,
        {"import": {"format": "csv", "paths": [plays], "columns": COLUMNS}},
        on_stage=lambda stage: print(f"{stage.stage}: {stage.status}, {stage.seconds:.0f} s"),
    )
    ids = {stage.stage: stage.id for stage in stages}
    dataset = Dataset(workspace)
    recommender = load_recommender(workspace, dataset, default_parts(workspace, ids["train"]))
    user = str(next(dataset.read_all()).user_ids[0])
    told = answer(dataset, recommender, RecommendConfig(k=5), at=round(time.time() * 1000), user=user)
    print(f"For {user}:")
    for title, score in zip(told.titles, told.scores, strict=True):
        print(f"  {score:.3f}  {title}")


if __name__ == "__main__":
    main(*sys.argv[1:])
