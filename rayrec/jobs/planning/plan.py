"""Plans what a data set needs on a cluster before money is spent: memory, disk, storage, batches and hours.

A plan is computed from the size of the data, the nodes of the cluster and measured rates of one CPU. All sizes are in
bytes. The formulas of the stages are in formulas.py; this module spreads the stages over nodes.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from rayrec.data.dataset import PLAYS_PER_READ
from rayrec.data.windows import divisors
from rayrec.embeddings.word2vec import MAX_WORKERS
from rayrec.errors import InputError
from rayrec.evaluation.protocol import COUNTED_BUCKETS
from rayrec.importing.import_plan import MAX_PIECES, UNGROUPED_UNITS, bucket_groups
from rayrec.importing.staging import PLAYS_PER_ROW_GROUP, ROWS_PER_CHUNK
from rayrec.jobs.planning.formulas import (
    EVALUATE_PASSES,
    IDLE_WORKER,
    INDEX_REQUESTS,
    NEW_SONG_SHARE,
    ROW_BYTES,
    SONG_TEXT_BYTES,
    ImportSize,
    bucket_memory,
    checkpoint_bytes,
    corpus_bytes,
    counting_memory,
    embed_requests,
    embedding_memory,
    encoding_memory,
    evaluate_requests,
    evaluated_files,
    evaluating_memory,
    examples_memory,
    histories_bytes,
    histories_requests,
    import_requests,
    index_bytes,
    indexing_memory,
    input_requests,
    joining_memory,
    keys_store,
    merging_memory,
    model_bytes,
    rank_requests,
    ranking_memory,
    reading_memory,
    recommend_requests,
    recommendations_bytes,
    recommending_memory,
    replica_memory,
    replicas_for,
    retrieval_bytes,
    retrieval_requests,
    served_files,
    serving_memory,
    songs_bytes,
    states_bytes,
    table_bytes,
    taste_requests,
    tastes_bytes,
    train_requests,
    training_gpu_memory,
    training_host_memory,
    training_memory,
    vocabulary_memory,
)
from rayrec.jobs.planning.plan_inputs import (
    ANSWERS,
    ASSUMED_SKEW,
    BUILT_IN,
    BUILT_IN_FROM,
    CSV_BYTES,
    GIB,
    TRAIN_ON_GPU,
    ClusterFile,
    DataSize,
    NodeType,
    PlanConfig,
)
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.stored_retrieval import MAX_DISTANCE, RECENT_DAYS, song_ranges
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig

UNIT_BYTES = 64 << 20  # bytes of input that one task reads
GPU_HOST = GIB  # host memory of a training worker with a GPU, apart from song tables; not measured
STORE_SHARE = 0.3  # share of a node's memory that Ray gives its object store; tasks have the other 0.7
SHARDS = TrainConfig().shards
_RETRIEVAL_DEFAULTS = RetrievalConfig()
RANK_QUERIES = RankConfig().queries
CACHED_RELEASES = 2  # releases on the disk of a node of the server while one replaces the other
COLUMNS = 3  # columns of the histories that a stage reads: user, songs, moments
RULE_DISTANCE = MAX_DISTANCE  # number of plays ahead that a rule reaches
USERS_AT_ONCE = 1_000  # users per batch of `recommend --all`
DISTINCT_PAIRS = 0.6  # share of the pairs of a song and a follower in a bucket or range that are distinct
SONGS_PER_SESSION = 10
GPU_SLACK = 2 * GIB  # GPU memory apart from song tables: CUDA itself, activations of a batch; not measured


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """The plan of one stage: where it runs and what it needs there."""

    stage: str
    node: str  # type of the nodes; of several types the one with the least memory per CPU
    nodes: int  # nodes at the same time
    workers: int  # processes on all nodes together
    memory: int  # bytes needed per node
    memory_there: int  # bytes available per node
    store: int  # bytes needed in the object store of each node, in addition to `memory`
    batches: int  # units of work
    batch_of: str  # name of a unit of work
    requests: int | None  # requests to object storage; None without a formula
    hours: float | None  # None without a measured rate
    rate: float | None  # work per second of one worker
    rate_from: str  # origin of the rate


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """The plan of the server for a rate of requests. Memory is in bytes."""

    replicas: int
    replicas_per_node: int  # one CPU each; limited by the CPUs and the memory of a node
    nodes: int
    replica_memory: int  # private
    shared_memory: int  # mapped files of the release, once per node
    node_memory: int
    memory_there: int
    requests_per_second: float
    answers_per_second: float  # of one replica at full load


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of all stages: what they need, what they store, and problems that make them fail."""

    stages: list[StagePlan]
    storage: dict[str, int]  # kind of data -> bytes in object storage
    disk: int  # bytes on the disk of the node of `embed`
    states: int  # bytes of the server's store of user states
    serving: "ServingPlan | None"  # None without a measured rate of answers
    problems: list[str]
    notes: list[str]
    data: DataSize
    cluster: str
    skew: dict[str, Any] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON, with the total hours and the total bytes in object storage."""
        hours = [stage.hours for stage in self.stages if stage.hours is not None]
        return {**asdict(self), "hours": round(sum(hours), 2), "storage_total": sum(self.storage.values())}


def make_plan(
    data: DataSize,
    cluster: ClusterFile,
    config: PlanConfig,
    rates: dict[str, float] | None = None,
    skew: dict[str, Any] | None = None,
) -> Plan:
    """Return the plan of all stages for data of this size on a cluster.

    `rates` maps names to rates that `rayrec bench ... --save` measured. Built-in rates replace missing ones, and
    `StagePlan.rate_from` says so. `skew` is copied into the plan.

    Raises `InputError` for a cluster without a worker node that has CPUs.
    """
    planner = _Planner(data, cluster, config, rates or {})
    stages, serving = planner.stages(), planner.serving()
    disk_bytes = planner.corpus_bytes()
    problems = [*planner.setting_problems(), *(problem for stage in stages for problem in _memory_problems(stage))]
    return Plan(
        stages=stages,
        storage=planner.storage(),
        disk=disk_bytes,
        states=planner.states_bytes(),
        serving=serving,
        problems=[*problems, *planner.other_problems(disk_bytes), *planner.serving_problems(serving)],
        notes=planner.notes(stages),
        data=data,
        cluster=cluster.name,
        skew=skew or {},
    )


class _Planner:
    """Computes the plan of each stage."""

    def __init__(self, data: DataSize, cluster: ClusterFile, config: PlanConfig, rates: dict[str, float]) -> None:
        self.data, self.cluster, self.config, self.rates = data, cluster, config, rates
        cpu_nodes = _without_head([node for node in cluster.workers if not node.gpus] or cluster.workers)
        if not cpu_nodes:
            raise InputError(f"cluster {cluster.name} has no worker node with CPUs; give workers CPUs")
        # The type with the least memory per CPU runs out of memory first; stages on one node get the largest type.
        self.tight_node = min(cpu_nodes, key=lambda node: node.memory / node.cpus)
        self.large_node = max(cpu_nodes, key=lambda node: (node.cpus, node.memory))
        self.most_nodes = min(_most_at_once(cluster, cpu_nodes), sum(node.most for node in cpu_nodes))
        self.node_count = config.nodes or self.most_nodes
        self.most_cpus = _max_total([(node.cpus, node.most) for node in cpu_nodes], self.node_count)
        gpu_nodes = _without_head([node for node in cluster.workers if node.gpus])
        self.most_gpus = _max_total([(node.gpus, node.most) for node in gpu_nodes], _most_at_once(cluster, gpu_nodes))
        self.gpu_node = min(gpu_nodes, key=lambda node: (node.gpu_memory or 0, node.memory)) if gpu_nodes else None
        self.vector_table_bytes = table_bytes(data.songs, config.dim)

    @property
    def average_floats(self) -> int:
        """Number of values in a user's state for the sums of song vectors, which averages are computed from."""
        return len(TrainConfig().averages) * self.config.dim

    def stages(self) -> list[StagePlan]:
        """Return the plans of the stages in the order in which the stages run."""
        return [
            *(self.importing(), self.embed(), self.train(), self.retrieval(), self.rank(), self.taste()),
            *(self.index(), self.evaluate(), self.recommend()),
        ]

    def importing(self) -> StagePlan:
        """Plan `import`: each CPU reads a unit of text, then merges a bucket; the larger of the two sets the memory."""
        worker_memory = IDLE_WORKER + max(reading_memory(ROWS_PER_CHUNK), bucket_memory(self.data.largest_bucket))
        stage_plan = self._spread_plan(
            "import", self.tight_node.cpus * worker_memory, self.data.buckets, "bucket of users", self.data.plays
        )
        return replace(stage_plan, store=keys_store(self.data.songs))

    def embed(self) -> StagePlan:
        """Plan `embed`: gensim's tables and dictionaries on one node; more than MAX_WORKERS threads do not help."""
        needed_memory = IDLE_WORKER + embedding_memory(self.data.songs, self.config.dim)
        threads = min(self.large_node.cpus, MAX_WORKERS)
        work = self.data.plays * self.config.embed_epochs * self.config.fits
        return self._stage_plan(
            "embed",
            self.large_node,
            1,
            threads,
            needed_memory,
            batches=self.config.embed_epochs * self.config.fits,
            batch_of="pass over the corpus",
            work=work,
            rate_name="embed_tokens_per_second_per_cpu",
        )

    def train(self) -> StagePlan:
        """Plan `train`: each of W workers holds every W-th row of the song tables.

        A worker with a GPU holds them in GPU memory, and its part of a checkpoint in host memory.
        """
        node = self.gpu_node if self.config.gpu and self.gpu_node else self.large_node
        workers = self.train_workers()
        workers_per_node = min(workers, node.gpus) if node.gpus else ceil(workers / self.node_count)
        worker_memory = training_memory(self.data.songs, self.config.dim, self.config.hidden_dim, workers)
        if self.config.gpu:
            worker_memory = GPU_HOST + training_host_memory(self.data.songs, self.config.dim, workers)
        windows = ceil(self.data.plays / self.config.window)
        batch = self.config.batch or TrainConfig().batch * workers
        steps = ceil(windows / batch) * self.config.epochs * self.config.fits
        has_gpu_rate = self.config.gpu and TRAIN_ON_GPU in self.rates
        return self._stage_plan(
            "train",
            node,
            ceil(workers / workers_per_node),
            workers,
            workers_per_node * (IDLE_WORKER + worker_memory),
            batches=steps,
            batch_of=f"step of {batch} windows",
            work=self.data.plays * self.config.epochs * self.config.fits,
            rate_name=TRAIN_ON_GPU if has_gpu_rate else "train_plays_per_second_per_cpu",
        )

    def train_workers(self) -> int:
        """Return the number of training workers: `config.workers`, or about one per GPU or CPU node if that is 0.

        The number found is the largest divisor of the number of shards that does not exceed the GPUs or nodes.
        """
        if self.config.workers:
            return self.config.workers
        max_workers = self.most_gpus if self.config.gpu and self.gpu_node else self.node_count
        return max(divisor for divisor in divisors(SHARDS) if divisor <= max(1, max_workers))

    def retrieval(self) -> StagePlan:
        """Plan `retrieval`: each CPU counts a group of buckets, then merges ranges of songs; one task joins them."""
        songs, plays, largest_bucket = self.data.songs, self.data.plays, self.data.largest_bucket
        ranges = song_ranges(songs, plays)
        plays_at_once = max(min(largest_bucket, PLAYS_PER_READ), int(largest_bucket * DISTINCT_PAIRS))
        counter_memory = counting_memory(songs, plays_at_once * RULE_DISTANCE)
        pairs = int(plays / len(ranges) * RULE_DISTANCE * DISTINCT_PAIRS)
        merger_memory = merging_memory(ceil(songs / len(ranges)), pairs)
        group_count = len(bucket_groups(len(ranges), self.data.buckets))
        # Ray limits the merges that run at once on a node to those that fit into its memory.
        mergers_per_node = max(
            1, min(self._workers_per_node(len(ranges)), self.tight_node.memory // (IDLE_WORKER + merger_memory))
        )
        needed_memory = max(
            self._workers_per_node(group_count) * (IDLE_WORKER + counter_memory),
            mergers_per_node * (IDLE_WORKER + merger_memory),
            IDLE_WORKER + self._joining_memory(len(ranges)),
        )
        return self._spread_plan("retrieval", needed_memory, group_count, "group of buckets", plays * self.config.fits)

    def _joining_memory(self, range_count: int) -> int:
        """Return the private bytes of the task that joins `range_count` ranges.

        This is an upper bound: each entry of a song may belong to a session of its own.
        """
        songs, plays = ceil(self.data.songs / range_count), ceil(self.data.plays / range_count)
        sessions = min(plays, songs * _RETRIEVAL_DEFAULTS.sessions_per_song, self.data.plays // SONGS_PER_SESSION)
        largest_range_bytes = retrieval_bytes(
            songs,
            rules=min(int(RULE_DISTANCE * plays * DISTINCT_PAIRS), songs * _RETRIEVAL_DEFAULTS.rules_per_song),
            session_songs=sessions * SONGS_PER_SESSION,
            sessions=sessions,
            day_songs=min(plays, songs * RECENT_DAYS),
        )
        return joining_memory(self.data.songs, largest_range_bytes, sessions * range_count)

    def retrieval_bytes(self) -> int:
        """Return the approximate bytes of a retrieval, from the bounds on the entries that it keeps per song."""
        songs, plays = self.data.songs, self.data.plays
        session_songs = min(plays, songs * _RETRIEVAL_DEFAULTS.sessions_per_song)
        return retrieval_bytes(
            songs,
            rules=min(int(RULE_DISTANCE * plays * DISTINCT_PAIRS), songs * _RETRIEVAL_DEFAULTS.rules_per_song),
            session_songs=session_songs,
            sessions=session_songs // SONGS_PER_SESSION,
            day_songs=min(plays, songs * RECENT_DAYS),
        )

    def rank(self) -> StagePlan:
        """Plan `rank`: one task builds an index, then all CPUs collect the queries of all buckets.

        After that, one task per kind of ranker grows its trees, which takes longest. As many of these tasks run at
        once as fit into the memory of a node.
        """
        songs, dim = self.data.songs, self.config.dim
        indexer_memory = IDLE_WORKER + indexing_memory(songs, dim)
        collector_memory = self.large_node.cpus * (
            IDLE_WORKER + examples_memory(songs, dim, ceil(RANK_QUERIES / self.data.buckets))
        )
        trainer_memory = IDLE_WORKER + ranking_memory(songs, dim, RANK_QUERIES)
        needed_memory = (
            max(indexer_memory, collector_memory, trainer_memory)
            + 2 * self.vector_table_bytes
            + index_bytes(songs, dim)
            + self.retrieval_bytes()
        )
        return self._stage_plan(
            "rank",
            self.large_node,
            1,
            self.large_node.cpus,
            needed_memory,
            batches=self.data.buckets,
            batch_of="bucket of users",
            work=RANK_QUERIES,
            rate_name="rank_queries_per_second_per_cpu",
        )

    def taste(self) -> StagePlan:
        """Plan `taste`: each CPU runs a process; all processes of a node share one memory-mapped song table."""
        worker_memory = IDLE_WORKER + encoding_memory(self.config.hidden_dim, self.config.dim)
        needed_memory = self.tight_node.cpus * worker_memory + self.vector_table_bytes
        return self._spread_plan("taste", needed_memory, self.data.buckets, "bucket of users", self.data.plays)

    def index(self) -> StagePlan:
        """Plan `index`: the song vectors and their index on one node."""
        needed_memory = IDLE_WORKER + indexing_memory(self.data.songs, self.config.dim)
        return self._stage_plan(
            "index", self.large_node, 1, self.large_node.cpus, needed_memory, batches=1, batch_of="index", work=None
        )

    def evaluate(self) -> StagePlan:
        """Plan `evaluate`: all histories are read, and two recommenders, mapped once per node, answer the queries."""
        worker_memory = IDLE_WORKER + evaluating_memory(ceil(self.config.queries / self.data.buckets))
        needed_memory = self.tight_node.cpus * worker_memory + evaluated_files(
            self.data.songs, self.config.dim, self.retrieval_bytes()
        )
        stage_plan = self._spread_plan(
            "evaluate",
            needed_memory,
            self.data.buckets,
            "bucket of users",
            self.config.queries,
            "queries_per_second_per_cpu",
        )
        read_rate = self.rate("read_plays_per_second_per_cpu")
        hours = (stage_plan.hours or 0) + EVALUATE_PASSES * self.data.plays / (read_rate * stage_plan.workers) / 3600
        return replace(stage_plan, hours=hours)

    def recommend(self) -> StagePlan:
        """Plan `recommend --all`: each CPU answers the users of a bucket, from tables that a node holds once."""
        worker_memory = IDLE_WORKER + recommending_memory(self.data.songs, USERS_AT_ONCE)
        needed_memory = self.tight_node.cpus * worker_memory + 2 * self.vector_table_bytes + self.retrieval_bytes()
        users = self.data.users
        return self._spread_plan(
            "recommend", needed_memory, self.data.buckets, "bucket of users", users, "users_per_second_per_cpu"
        )

    def requests(self, stage: str) -> int | None:
        """Return the number of object storage requests of a stage; an import is assumed to read text files."""
        if stage == "import":
            text_bytes = self.data.plays * CSV_BYTES
            units = max(1, ceil(text_bytes / UNIT_BYTES))
            pieces = units if units <= UNGROUPED_UNITS else MAX_PIECES
            import_size = ImportSize(pieces=pieces, buckets=self.data.buckets)
            return input_requests(text_bytes, UNIT_BYTES) + import_requests(import_size)
        buckets, fits, epochs = self.data.buckets, self.config.fits, self.config.epochs
        row_groups = max(1, ceil(self.data.plays / buckets / PLAYS_PER_ROW_GROUP))
        bucket_requests = histories_requests(1, row_groups, COLUMNS)
        if stage == "retrieval":
            ranges = song_ranges(self.data.songs, self.data.plays)
            range_counts = {"groups": len(bucket_groups(len(ranges), buckets)), "ranges": len(ranges), "fits": fits}
            return retrieval_requests(buckets, 1, row_groups=row_groups, columns=COLUMNS, **range_counts)
        requests_by_stage = {
            "embed": embed_requests(buckets, bucket_requests, fits=fits),
            "train": train_requests(buckets, bucket_requests, fits=fits, epochs=epochs),
            "rank": rank_requests(buckets, bucket_requests),
            "taste": taste_requests(buckets, bucket_requests),
            "evaluate": evaluate_requests(buckets, bucket_requests, counted=min(buckets, COUNTED_BUCKETS)),
            "recommend": recommend_requests(buckets, bucket_requests),
        }
        return requests_by_stage.get(stage, INDEX_REQUESTS)

    def storage(self) -> dict[str, int]:
        """Return bytes in object storage by kind of data; the names of temporary data begin with "temporary"."""
        floats = len(TrainConfig().horizons) * self.config.dim + self.config.hidden_dim + self.average_floats
        checkpoint = checkpoint_bytes(self.data.songs, self.config.dim)
        return {
            "histories": histories_bytes(self.data.plays),
            "songs": songs_bytes(self.data.songs, int(self.data.songs * SONG_TEXT_BYTES)),
            "song embeddings": self.config.fits * self.vector_table_bytes,
            "model": self.config.fits * model_bytes(self.data.songs, self.config.dim),
            "retrieval": self.config.fits * self.retrieval_bytes(),
            "tastes": tastes_bytes(self.data.users, int(self.data.plays * NEW_SONG_SHARE), floats=floats),
            "index": index_bytes(self.data.songs, self.config.dim),
            "recommendations": recommendations_bytes(self.data.users, self.config.k),
            "temporary, import": int(self.data.plays * ROW_BYTES) + histories_bytes(self.data.plays),
            "temporary, train": 2 * checkpoint + self.data.songs * 8 * self.config.fits,
        }

    def states_bytes(self) -> int:
        """Return the bytes of the server's store of user states."""
        return states_bytes(
            self.data.users,
            self.data.plays,
            hidden_dim=self.config.hidden_dim,
            average_floats=self.average_floats,
        )

    def serving(self) -> ServingPlan | None:
        """Plan the server on CPU nodes, each with one copy of the release; None without a rate of answers."""
        songs, answer_rate = self.data.songs, self.rates.get(ANSWERS)
        if answer_rate is None:
            return None
        shared_bytes = served_files(songs, self.config.dim, self.retrieval_bytes())
        replicas = replicas_for(self.config.serve_rate, answer_rate)
        max_replicas = max(1, (self.tight_node.memory - serving_memory(songs, 0, shared_bytes)) // replica_memory())
        replicas_per_node = min(replicas, self.tight_node.cpus, max_replicas)
        return ServingPlan(
            replicas=replicas,
            replicas_per_node=replicas_per_node,
            nodes=ceil(replicas / replicas_per_node),
            replica_memory=replica_memory(),
            shared_memory=shared_bytes,
            node_memory=serving_memory(songs, replicas_per_node, shared_bytes),
            memory_there=self.tight_node.memory,
            requests_per_second=self.config.serve_rate,
            answers_per_second=answer_rate,
        )

    def corpus_bytes(self) -> int:
        """Return the bytes of the corpus on the local disk of the node of `embed`."""
        return corpus_bytes(self.data.plays, self.data.songs)

    def setting_problems(self) -> Iterator[str]:
        """Yield problems with settings that the cluster cannot meet: nodes, GPUs, CPUs, workers and batch."""
        if self.node_count > self.most_nodes:
            yield (
                f"--nodes is {self.node_count}, and cluster {self.cluster.name} has at most {self.most_nodes} CPU "
                "nodes: use fewer --nodes, or raise the maximum in its file"
            )
        workers = self.train_workers()
        if self.config.gpu and self.gpu_node is not None and workers > self.most_gpus:
            yield (
                f"train has {workers} workers with a GPU each, and cluster {self.cluster.name} has at most "
                f"{self.most_gpus} GPUs: use fewer --workers, or raise the maximum in its file"
            )
        if not self.config.gpu and workers > self.most_cpus:
            yield (
                f"train has {workers} workers, and the CPU nodes ({self.node_count}) have {self.most_cpus} CPUs, fewer "
                "than one per worker: use fewer --workers or more --nodes"
            )
        if self.config.gpu and self.gpu_node is None:
            yield f"--gpu needs a node type with a GPU, and cluster {self.cluster.name} has no node type with a GPU"
        if SHARDS % workers:
            choices = ", ".join(map(str, divisors(SHARDS)))
            yield f"workers is {workers}; expected a divisor of the {SHARDS} shards: {choices}"
        if 0 < self.config.batch < workers:
            yield (
                f"batch is {self.config.batch}, less than one window for each of {workers} workers: "
                "use a larger --batch or fewer --workers"
            )

    def other_problems(self, disk_bytes: int) -> Iterator[str]:
        """Yield problems with the disk of `embed`, the memory of the head node and the memory of GPUs."""
        if self.large_node.disk is not None and disk_bytes > 0.8 * self.large_node.disk:
            yield (
                f"embed writes a corpus of {gib(disk_bytes)} to the disk of a {self.large_node.name} node, which has "
                f"{gib(self.large_node.disk)}; use a larger disk, or import embeddings with "
                "`rayrec embed --vectors FILE`"
            )
        driver_memory = IDLE_WORKER + vocabulary_memory(self.data.songs)
        for head in (node for node in self.cluster.nodes if node.head):
            if driver_memory > head.memory:
                yield (
                    f"import needs {gib(driver_memory)} of memory on the head node for the songs, and {head.name} has "
                    f"{gib(head.memory)}; give the head more memory"
                )
        if self.config.gpu and self.gpu_node is not None and self.gpu_node.gpu_memory is not None:
            workers = self.train_workers()
            needed_memory = GPU_SLACK + training_gpu_memory(self.data.songs, self.config.dim, workers)
            if needed_memory > self.gpu_node.gpu_memory:
                yield (
                    f"train needs {gib(needed_memory)} of memory on each of {workers} GPUs for song tables, optimizer "
                    f"state and averages, and a GPU of a {self.gpu_node.name} node has "
                    f"{gib(self.gpu_node.gpu_memory)}: use more or larger GPUs, or a smaller --dim"
                )

    def serving_problems(self, serving: ServingPlan | None) -> Iterator[str]:
        """Yield problems with the nodes of the server, their memory and their disk, which holds copies of releases."""
        if serving is None:
            return
        disk_bytes = CACHED_RELEASES * serving.shared_memory
        if self.tight_node.disk is not None and disk_bytes > 0.8 * self.tight_node.disk:
            yield (
                f"the server keeps copies of {CACHED_RELEASES} releases, {gib(disk_bytes)}, on the disk of a "
                f"{self.tight_node.name} node, which has {gib(self.tight_node.disk)}: use a larger disk or a smaller "
                "--dim"
            )
        if serving.node_memory > serving.memory_there:
            yield (
                f"one replica of the server needs {gib(serving.node_memory)} of memory on a {self.tight_node.name} "
                f"node, which has {gib(serving.memory_there)}: use nodes with more memory or a smaller --dim"
            )
        elif serving.nodes > self.node_count:
            yield (
                f"the server needs {serving.nodes} nodes for {serving.requests_per_second:g} requests per second, and "
                f"the plan has {self.node_count}: use more or larger nodes, or a lower --serve-rate"
            )

    def notes(self, stages: list[StagePlan]) -> list[str]:
        """Return notes on assumptions behind the figures of the plan."""
        texts = [EVALUATED_MODELS]
        if any(stage.rate_from == BUILT_IN_FROM for stage in stages):
            texts.append(
                f"the rates were measured on {BUILT_IN_FROM}; measure your own with `rayrec bench scale --save FILE`"
            )
        if self.config.gpu and TRAIN_ON_GPU not in self.rates:
            texts.append(f"no GPU rate ({TRAIN_ON_GPU}): each GPU counts as one CPU")
        if ANSWERS not in self.rates:
            texts.append(
                "no measured rate of answers, so the server is not planned; measure it with "
                "`rayrec bench answers --save FILE`"
            )
        if not self.data.looked_at:
            texts.append(
                f"the largest bucket is assumed to have {ASSUMED_SKEW} times the mean number of plays; "
                "to measure it, plan for an existing data set with --workspace"
            )
        if self.config.gpu and self.gpu_node is not None and self.gpu_node.gpu_memory is None:
            texts.append(f"node type {self.gpu_node.name} does not name its GPU model, so GPU memory is not checked")
        return texts

    def rate(self, name: str) -> float:
        """Return a rate from the file of rates, or else the built-in one."""
        return self.rates.get(name, BUILT_IN[name])

    def _workers_per_node(self, unit_count: int) -> int:
        """Return the number of workers per node when Ray spreads `unit_count` units over all nodes."""
        return min(self.tight_node.cpus, ceil(unit_count / self.node_count))

    def _spread_plan(
        self,
        stage: str,
        memory: int,
        unit_count: int,
        unit_name: str,
        work: int,
        rate_suffix: str = "plays_per_second_per_cpu",
    ) -> StagePlan:
        """Plan a stage whose units Ray spreads over all CPU nodes."""
        workers = min(self.most_cpus, unit_count)
        rate_name = f"{stage}_{rate_suffix}"
        nodes = min(self.node_count, ceil(workers / self.tight_node.cpus))
        if workers == self.most_cpus:
            nodes = self.node_count
        return self._stage_plan(
            stage,
            self.tight_node,
            nodes,
            workers,
            memory,
            batches=unit_count,
            batch_of=unit_name,
            work=work,
            rate_name=rate_name,
        )

    def _stage_plan(
        self,
        stage: str,
        node: NodeType,
        nodes: int,
        workers: int,
        memory: int,
        *,
        batches: int,
        batch_of: str,
        work: int | None,
        rate_name: str = "",
    ) -> StagePlan:
        rate = self.rates.get(rate_name, BUILT_IN.get(rate_name)) if work is not None else None
        origin = "the file of rates" if rate_name in self.rates else BUILT_IN_FROM
        return StagePlan(
            stage=stage,
            node=node.name,
            nodes=nodes,
            workers=workers,
            memory=memory,
            memory_there=node.memory,
            store=0,
            batches=batches,
            batch_of=batch_of,
            requests=self.requests(stage),
            hours=None if rate is None or work is None else work / (rate * workers) / 3600,
            rate=rate,
            rate_from="not measured" if rate is None else origin,
        )


EVALUATED_MODELS = (
    "evaluate is planned for `--models two-step,taste`; by default it also fits and tunes every baseline, in one "
    "thread of the driver"
)
ADVICE: dict[str, str] = {
    "import": "more --buckets, fewer CPUs per node or more memory",
    "embed": "a smaller --dim or more memory",
    "train": "more nodes (each then trains fewer rows of the song tables), a smaller --dim or more memory",
    "taste": "fewer CPUs per node, a smaller --dim or more memory",
}


def _without_head(nodes: list[NodeType]) -> list[NodeType]:
    """Return the types of node without the head, or the head if there is no other type."""
    return [node for node in nodes if not node.head] or nodes


def _most_at_once(cluster: ClusterFile, nodes: list[NodeType]) -> int:
    """Return how many nodes of these types may run at the same time; `cluster.most_nodes` does not count the head."""
    return cluster.most_nodes + sum(node.most for node in nodes if node.head)


def _max_total(node_types: list[tuple[int, int]], nodes: int) -> int:
    """Return the largest total amount of CPUs or GPUs on `nodes` nodes.

    `node_types` are (amount per node, maximum number of nodes) of each type of node.
    """
    total = 0
    for amount, max_nodes in sorted(node_types, reverse=True):
        node_count = min(nodes, max_nodes)
        total, nodes = total + amount * node_count, nodes - node_count
    return total


def _memory_problems(stage: StagePlan) -> Iterator[str]:
    if stage.memory > stage.memory_there:
        advice = ADVICE.get(stage.stage, "more memory")
        yield (
            f"{stage.stage} needs {gib(stage.memory)} of memory on a {stage.node} node, which has "
            f"{gib(stage.memory_there)}: use {advice}"
        )
    available_store = int(stage.memory_there * STORE_SHARE / (1 - STORE_SHARE))
    if stage.store > available_store:
        yield (
            f"{stage.stage} puts {gib(stage.store)} into the object store of a {stage.node} node, which has "
            f"{gib(available_store)}: give the node more memory"
        )


def gib(size: int) -> str:
    """Format bytes as GiB, such as `1.5 GiB`."""
    return f"{size / GIB:,.1f} GiB"
