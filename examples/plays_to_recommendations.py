# %% [markdown]
# From plays to recommendations, cell by cell: open this file in an editor that supports `# %%` cells, or run it with
# `python examples/plays_to_recommendations.py [workspace]`. It takes under a minute on two cores. The plays are
# generated: each song has a successor in its album, and each user likes a few genres.

# %% A workspace: a folder here, s3://bucket/prefix on a cluster
import sys

import ray

import rayrec

workspace = rayrec.Workspace(sys.argv[1] if len(sys.argv) > 1 else "./workspace-notebook")
# Start Ray once for all cells; otherwise each stage starts it. On a cluster: ray.init("ray://HOST:10001")
ray.init("local", ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level="error")

# %% Plays. To use your own: rayrec.import_data(workspace, rayrec.ImportConfig(format="csv", paths=("plays.csv",)))
generate_config = rayrec.GenerateConfig(
    users=600, songs=120, artists=24, genres=6, plays=40.0, buckets=2, follow=0.6, zipf=1.2
)
manifest = rayrec.generate(workspace, generate_config, repeat=True)  # replaces the plays of an earlier run
print(f"{manifest.plays:,} plays of {manifest.users:,} users over {manifest.songs:,} songs")

# %% Split: the last days are for validation and test, and no training uses the test range
split = rayrec.split_dataset(workspace, rayrec.SplitConfig(test_days=20.0, validation_days=7.0))

# %% Song embeddings by word2vec over sessions
embeddings = rayrec.embed(workspace, rayrec.EmbedConfig(dim=16, epochs=5, workers=1), split=split)
print(
    f"coverage {embeddings.metrics['coverage']:.2f}, "
    f"mean cosine of random pairs {embeddings.metrics['mean_cosine']:.2f}"
)

# %% The network. workers=0 trains in this process, which suits a notebook
train_config = rayrec.TrainConfig(
    hidden_dim=32, negatives=64, batch=16, learning_rate=0.01, epochs=3, window=50, workers=0
)
model = rayrec.train(workspace, train_config, songs_id=embeddings.id, split=split)
print(f"validation recall@20 {model.metrics['validation_recall@20']:.3f} after {model.metrics['epochs']} epochs")

# %% Retrieval proposes candidates, and rankers order them
retrieval = rayrec.fit_retrieval(workspace, rayrec.RetrievalConfig(), split=split)
rankers = rayrec.fit_rankers(workspace, rayrec.RankConfig(), model_id=model.id, retrieval_id=retrieval.id)

# %% Evaluate: rank the next plays of the test range over the full catalog, and compare with baselines
model_names = ("two-step", "taste", "sequential-rules", "popularity")
report = rayrec.evaluate(
    workspace,
    rayrec.EvaluateConfig(models=model_names, ks=(10, 20), bootstrap_samples=100),
    split=split,
    model_id=model.id,
)
for row in rayrec.read_results(workspace, report)["results"]:
    if (row["metric"], row["k"], row["users"], row["target"]) == ("recall", 20, "all", "next"):
        print(f"{row['model']:20} recall@20 {row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})")

# %% Taste vectors of all users and an index complete the release
taste_vectors = rayrec.compute_tastes(workspace, rayrec.TasteConfig(), model_id=model.id)
index = rayrec.build_index(workspace, rayrec.IndexConfig(), model_id=model.id)
release = rayrec.create_release(
    workspace, model_id=model.id, tastes_id=taste_vectors.id, index_id=index.id, rankers_id=rankers.id
)
print(f"release {release.id} is live")

# %% Recommendations for one user, a moment after the last play
dataset = rayrec.Dataset(workspace)
user = str(next(dataset.read_all()).user_ids[0])
parts = rayrec.default_parts(workspace, model.id)
recommender = rayrec.load_recommender(workspace, dataset, parts)
options = rayrec.RecommendConfig(k=5)
answer = rayrec.answer(dataset, recommender, options, parts=parts, at=dataset.manifest.last_play, user=user)
print(f"{user} last played: {', '.join(song.name for song in answer.last_plays[-3:])}")
for title, score in zip(answer.titles, answer.scores, strict=True):
    print(f"  {score:.3f}  {title}")
