# %% [markdown]
# From plays to recommendations, cell by cell: open it in an editor that knows `# %%`, or run it whole with
# `python examples/plays_to_recommendations.py [workspace]`. It takes under a minute on two cores; the plays come
# from a planted world, in which a song has a successor in its album and each listener a taste over few genres.

# %% A workspace: a folder here, s3://bucket/prefix on a cluster
import sys

from rayrec import Dataset, Workspace
from rayrec.data.split import SplitConfig, split_dataset
from rayrec.data.synthetic import GenerateConfig
from rayrec.embeddings.word2vec import EmbedConfig
from rayrec.evaluation.protocol import EvaluateConfig
from rayrec.evaluation.report import read_figures
from rayrec.jobs.build_index import build_index
from rayrec.jobs.embed import embed
from rayrec.jobs.evaluate import evaluate
from rayrec.jobs.generate import generate
from rayrec.jobs.rank import fit_rankers
from rayrec.jobs.retrieval import fit_retrieval
from rayrec.jobs.runtime import ray_cluster
from rayrec.jobs.taste import compute_tastes
from rayrec.jobs.train import train
from rayrec.model.train_config import TasteConfig, TrainConfig
from rayrec.recommend.answer import RecommendConfig, answer, load_recommender
from rayrec.recommend.index import IndexConfig
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig
from rayrec.storage.releases import create_release, default_parts

workspace = Workspace(sys.argv[1] if len(sys.argv) > 1 else "./workspace-notebook")
cluster = ray_cluster()  # one for all cells; without it each stage starts one of its own
cluster.__enter__()

# %% Plays. Of your own: import_data(workspace, ImportConfig(format="csv", paths=("plays.csv",), columns={...}))
world = GenerateConfig(users=600, songs=120, artists=24, genres=6, plays=40.0, buckets=2, follow=0.6, zipf=1.2)
plays = generate(workspace, world)
print(f"{plays.plays:,} plays of {plays.users:,} users over {plays.songs:,} songs")

# %% The last days are set aside: nothing that learns ever sees them
split = split_dataset(workspace, SplitConfig(test_days=20.0, validation_days=7.0))

# %% Song vectors by word2vec over sessions
songs = embed(workspace, EmbedConfig(dim=16, epochs=5, workers=1), split=split)
print(f"coverage {songs.metrics['coverage']:.2f}, mean cosine of random pairs {songs.metrics['mean_cosine']:.2f}")

# %% The network. workers=0 trains in this process, which suits a notebook
settings = TrainConfig(hidden_dim=32, negatives=64, batch=16, learning_rate=0.01, epochs=3, window=50, workers=0)
model = train(workspace, settings, songs_id=songs.id, split=split)
print(f"validation recall@20 {model.metrics['validation_recall@20']:.3f} after {model.metrics['epochs']} epochs")

# %% Retrieval proposes candidates, and rankers order them
retrieval = fit_retrieval(workspace, RetrievalConfig(), split=split)
rankers = fit_rankers(workspace, RankConfig(), model_id=model.id, retrieval_id=retrieval.id)

# %% What it is worth: the next play of the last days, over the full catalog, beside baselines
report = evaluate(
    workspace,
    EvaluateConfig(models=("two-step", "taste", "sequential-rules", "popularity"), ks=(10, 20), bootstrap_samples=100),
    split=split,
    model_id=model.id,
)
for row in read_figures(workspace, report)["results"]:
    if (row["metric"], row["k"], row["users"], row["target"]) == ("recall", 20, "all", "next"):
        print(f"{row['model']:20} recall@20 {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})")

# %% Tastes of all users and an index make it a release
tastes = compute_tastes(workspace, TasteConfig(), model_id=model.id)
index = build_index(workspace, IndexConfig(), model_id=model.id)
release = create_release(workspace, model_id=model.id, tastes_id=tastes.id, index_id=index.id, rankers_id=rankers.id)
print(f"release {release.id} is live")

# %% Recommendations for one listener, a moment after the last play
dataset = Dataset(workspace)
listener = str(next(dataset.read_all()).user_ids[0])
recommender = load_recommender(workspace, dataset, default_parts(workspace, model.id))
told = answer(dataset, recommender, RecommendConfig(k=5), at=dataset.manifest.last_play, user=listener)
print(f"{listener} heard last: {', '.join(song.name for song in told.last_plays[-3:])}")
for title, score in zip(told.titles, told.scores, strict=True):
    print(f"  {score:.3f}  {title}")

# %% Done
cluster.__exit__(None, None, None)
