"""Every night: python examples/nightly.py WORKSPACE PLAYS...   (cluster/kuberay/nightly.yaml runs it as a RayJob)

Appends the new plays, adds the new songs, brings the tastes of all users up to date with the live model, judges it
with the new plays among those it has to predict, and makes the new release live only where its figures
hold. Then it joins the parts of many nights, and deletes what no recent release needs. The exit code says
what became of it: 0 live or nothing new, 1 kept back. `{yesterday}` in a path stands for yesterday's date,
UTC: plays/day={yesterday} names what is new, and nothing is read twice.

The model itself stays; when a release is kept back, it is time for a new one: rayrec run pipeline.toml.
"""

import sys
from datetime import datetime, timedelta, timezone

from rayrec import Dataset, Workspace
from rayrec.data.split import choose_split
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_figures
from rayrec.importing.import_plan import ImportConfig
from rayrec.importing.merging import PARTS_BEFORE_COMPACT
from rayrec.jobs.add_songs import add_songs
from rayrec.jobs.compact import compact
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.import_data import append_plays
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.model.train_config import TasteConfig
from rayrec.storage.artifacts import Manifest, load
from rayrec.storage.cleaning import delete_garbage, find_garbage
from rayrec.storage.releases import activate_release, active_release, create_release, default_parts

FORMAT = "parquet"
COLUMNS = {"user": "user_id", "song": "song_id", "played_at": "ts"}
JUDGED_AT = 20
KEPT_RELEASES = 3  # to go back to
FLOOR = 0.97  # of yesterday's recall@20: a night's noise, not a fall


def main(folder: str, *plays: str) -> int:
    workspace = Workspace(folder)
    yesterday = (datetime.now(timezone.utc) - timedelta(days=1)).date().isoformat()
    paths = tuple(path.replace("{yesterday}", yesterday) for path in plays)
    live = active_release(workspace)
    if live is None:
        raise SystemExit(f"{folder} has no live release; make the first one with rayrec run")
    model = load(workspace, "models", live.inputs["models"])
    with ray_cluster():
        before = recall(workspace, model)
        added = append_plays(workspace, ImportConfig(format=FORMAT, paths=paths, columns=COLUMNS))
        print(f"{added.plays:,} new plays, {added.users:,} new users, {added.merged:,} were there already")
        dataset = Dataset(workspace)
        if dataset.manifest.plays_id == dataset.earlier(live.inputs["dataset"]).plays_id:
            print("nothing is new: the live release stays")
            return 0
        add_songs(workspace, model_id=model.id)  # vectors of songs that the model has not seen
        tastes = compute_tastes(workspace, TasteConfig(), model_id=model.id)
        made = create_release(
            workspace, model_id=model.id, tastes_id=tastes.id, index_id=live.inputs["indexes"], activate=False
        )
        after = recall(workspace, model)
    print(f"recall@{JUDGED_AT} of the next play: {before:.3f} before, {after:.3f} with the new plays")
    if after < FLOOR * before:
        print(f"release {made.id} is kept back: its figures do not hold; train a new model")
        return 1
    activate_release(workspace, made.id)
    print(f"release {made.id} is live")
    if len(dataset.manifest.spans) > PARTS_BEFORE_COMPACT:
        compact(workspace)
    freed = delete_garbage(workspace, find_garbage(workspace, keep=KEPT_RELEASES))
    print(f"{freed / 1e9:.1f} GB of earlier releases deleted")
    return 0


def recall(workspace: Workspace, model: Manifest) -> float:
    """How many of the plays after the model's cut it finds; a report that is there already costs nothing."""
    split = choose_split(workspace, model.inputs.get("split"))
    if split is None:
        raise SystemExit(
            "the live model was trained on all plays, so nothing is left to judge it by; train with a split"
        )
    name = "two-step" if "rankers" in default_parts(workspace, model.id) else "taste"
    config = EvaluateConfig(models=(name,), ks=(JUDGED_AT,), bootstrap_samples=0, offsets=0)
    report = evaluate(workspace, config, split=split, model_id=model.id)
    wanted = {"model": name, "metric": "recall", "k": JUDGED_AT, "users": "all", "target": "next"}
    results = read_figures(workspace, report)["results"]
    return float(next(row["value"] for row in results if wanted.items() <= row.items()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
