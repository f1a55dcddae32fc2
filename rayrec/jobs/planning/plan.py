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
_RETRIEVAL = RetrievalConfig()
RANK_QUERIES = RankConfig().queries
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
    node: str  # type of the nodes
    nodes: int  # nodes of this type, at the same time
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
    disk = planner.corpus_bytes()
    problems = [*planner.missing(), *(problem for stage in stages for problem in _too_little(stage))]
    return Plan(
        stages=stages,
        storage=planner.storage(),
        disk=disk,
        states=planner.states_bytes(),
        serving=serving,
        problems=[*problems, *planner.other_problems(disk), *planner.serving_problems(serving)],
        notes=planner.notes(stages),
        data=data,
        cluster=cluster.name,
        skew=skew or {},
    )


class _Planner:
    """Computes the plan of each stage."""

    def __init__(self, data: DataSize, cluster: ClusterFile, config: PlanConfig, rates: dict[str, float]) -> None:
        self.data, self.cluster, self.config, self.rates = data, cluster, config, rates
        plain = [node for node in cluster.workers if not node.gpus] or cluster.workers
        if not plain:
            raise InputError(f"cluster {cluster.name} has no worker node with CPUs; give workers CPUs")
        # The type with the least memory per CPU runs out of memory first; stages on one node get the largest type.
        self.tight = min(plain, key=lambda node: node.memory / node.cpus)
        self.large = max(plain, key=lambda node: (node.cpus, node.memory))
        self.most_nodes = min(cluster.most_nodes, sum(node.most for node in plain))
        self.nodes = config.nodes or self.most_nodes
        self.cpus = self.nodes * self.tight.cpus
        self.most_cpus = _most([(node.cpus, node.most) for node in plain], self.nodes)
        with_gpu = [node for node in cluster.workers if node.gpus]
        self.most_gpus = _most([(node.gpus, node.most) for node in with_gpu], cluster.most_nodes)
        self.gpu = min(with_gpu, key=lambda node: (node.gpu_memory or 0, node.memory)) if with_gpu else None
        self.vectors = table_bytes(data.songs, config.dim)

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
        worker = IDLE_WORKER + max(reading_memory(ROWS_PER_CHUNK), bucket_memory(self.data.largest_bucket))
        stage = self._spread("import", self.tight.cpus * worker, self.data.buckets, "bucket of users", self.data.plays)
        return replace(stage, store=keys_store(self.data.songs))

    def embed(self) -> StagePlan:
        """Plan `embed`: gensim's tables and dictionaries on one node; more than MAX_WORKERS threads do not help."""
        needed = IDLE_WORKER + embedding_memory(self.data.songs, self.config.dim)
        threads = min(self.large.cpus, MAX_WORKERS)
        work = self.data.plays * self.config.embed_epochs * self.config.fits
        return self._stage(
            "embed",
            self.large,
            1,
            threads,
            needed,
            batches=self.config.embed_epochs * self.config.fits,
            batch_of="pass over the corpus",
            work=work,
            rate="embed_tokens_per_second_per_cpu",
        )

    def train(self) -> StagePlan:
        """Plan `train`: each of W workers holds every W-th row of the song tables.

        A worker with a GPU holds them in GPU memory, and its part of a checkpoint in host memory.
        """
        node = self.gpu if self.config.gpu and self.gpu else self.large
        workers = self.train_workers()
        on_node = min(workers, node.gpus) if node.gpus else ceil(workers / self.nodes)
        worker = training_memory(self.data.songs, self.config.dim, self.config.hidden_dim, workers)
        if self.config.gpu:
            worker = GPU_HOST + training_host_memory(self.data.songs, self.config.dim, workers)
        windows = ceil(self.data.plays / self.config.window)
        batch = self.config.batch or TrainConfig().batch * workers
        steps = ceil(windows / batch) * self.config.epochs * self.config.fits
        on_gpu = self.config.gpu and TRAIN_ON_GPU in self.rates
        return self._stage(
            "train",
            node,
            ceil(workers / on_node),
            workers,
            on_node * (IDLE_WORKER + worker),
            batches=steps,
            batch_of=f"step of {batch} windows",
            work=self.data.plays * self.config.epochs * self.config.fits,
            rate=TRAIN_ON_GPU if on_gpu else "train_plays_per_second_per_cpu",
        )

    def train_workers(self) -> int:
        """Return the number of training workers: `config.workers`, or about one per GPU or CPU node if that is 0.

        The number found is the largest divisor of the number of shards that does not exceed the GPUs or nodes.
        """
        if self.config.workers:
            return self.config.workers
        most = self.most_gpus if self.config.gpu and self.gpu else self.nodes
        return max(number for number in divisors(SHARDS) if number <= max(1, most))

    def retrieval(self) -> StagePlan:
        """Plan `retrieval`: each CPU counts a group of buckets, then merges ranges of songs; one task joins them."""
        songs, plays, largest = self.data.songs, self.data.plays, self.data.largest_bucket
        ranges = song_ranges(songs, plays)
        at_once = max(min(largest, PLAYS_PER_READ), int(largest * DISTINCT_PAIRS))
        counting = counting_memory(songs, at_once * RULE_DISTANCE)
        pairs = int(plays / len(ranges) * RULE_DISTANCE * DISTINCT_PAIRS)
        merging = merging_memory(ceil(songs / len(ranges)), pairs)
        groups = len(bucket_groups(len(ranges), self.data.buckets))
        # Ray limits the merges that run at once on a node to those that fit into its memory.
        at_a_time = max(1, min(self._on_node(len(ranges)), self.tight.memory // (IDLE_WORKER + merging)))
        needed = max(
            self._on_node(groups) * (IDLE_WORKER + counting),
            at_a_time * (IDLE_WORKER + merging),
            IDLE_WORKER + self._joining(len(ranges)),
        )
        return self._spread("retrieval", needed, groups, "group of buckets", plays)

    def _joining(self, ranges: int) -> int:
        """Return the private bytes of the task that joins `ranges` ranges.

        This is an upper bound: each entry of a song may belong to a session of its own.
        """
        songs, plays = ceil(self.data.songs / ranges), ceil(self.data.plays / ranges)
        sessions = min(plays, songs * _RETRIEVAL.sessions_per_song, self.data.plays // SONGS_PER_SESSION)
        largest = retrieval_bytes(
            songs,
            rules=min(int(RULE_DISTANCE * plays * DISTINCT_PAIRS), songs * _RETRIEVAL.rules_per_song),
            session_songs=sessions * SONGS_PER_SESSION,
            sessions=sessions,
            day_songs=min(plays, songs * RECENT_DAYS),
        )
        return joining_memory(self.data.songs, largest, sessions * ranges)

    def retrieval_bytes(self) -> int:
        """Return the approximate bytes of a retrieval, from the bounds on the entries that it keeps per song."""
        songs, plays = self.data.songs, self.data.plays
        postings = min(plays, songs * _RETRIEVAL.sessions_per_song)
        return retrieval_bytes(
            songs,
            rules=min(int(RULE_DISTANCE * plays * DISTINCT_PAIRS), songs * _RETRIEVAL.rules_per_song),
            session_songs=postings,
            sessions=postings // SONGS_PER_SESSION,
            day_songs=min(plays, songs * RECENT_DAYS),
        )

    def rank(self) -> StagePlan:
        """Plan `rank`: one task builds an index, then all CPUs collect the queries of all buckets.

        After that, one task per kind of ranker grows its trees, which takes longest. As many of these tasks run at
        once as fit into the memory of a node.
        """
        songs, dim = self.data.songs, self.config.dim
        indexing = IDLE_WORKER + indexing_memory(songs, dim)
        collecting = self.large.cpus * (
            IDLE_WORKER + examples_memory(songs, dim, ceil(RANK_QUERIES / self.data.buckets))
        )
        growing = IDLE_WORKER + ranking_memory(songs, dim, RANK_QUERIES)
        needed = (
            max(indexing, collecting, growing) + 2 * self.vectors + index_bytes(songs, dim) + self.retrieval_bytes()
        )
        return self._stage(
            "rank",
            self.large,
            1,
            self.large.cpus,
            needed,
            batches=self.data.buckets,
            batch_of="bucket of users",
            work=RANK_QUERIES,
            rate="rank_queries_per_second_per_cpu",
        )

    def taste(self) -> StagePlan:
        """Plan `taste`: each CPU runs a process; all processes of a node share one memory-mapped song table."""
        worker = IDLE_WORKER + encoding_memory(self.config.hidden_dim, self.config.dim)
        needed = self.tight.cpus * worker + self.vectors
        return self._spread("taste", needed, self.data.buckets, "bucket of users", self.data.plays)

    def index(self) -> StagePlan:
        """Plan `index`: the song vectors and their index on one node."""
        needed = IDLE_WORKER + indexing_memory(self.data.songs, self.config.dim)
        return self._stage("index", self.large, 1, self.large.cpus, needed, batches=1, batch_of="index", work=None)

    def evaluate(self) -> StagePlan:
        """Plan `evaluate`: all histories are read, and two recommenders, mapped once per node, answer the queries."""
        worker = IDLE_WORKER + evaluating_memory(ceil(self.config.queries / self.data.buckets))
        needed = self.tight.cpus * worker + evaluated_files(self.data.songs, self.config.dim, self.retrieval_bytes())
        stage = self._spread(
            "evaluate", needed, self.data.buckets, "bucket of users", self.config.queries, "queries_per_second_per_cpu"
        )
        reading = self.rate("read_plays_per_second_per_cpu")
        hours = (stage.hours or 0) + EVALUATE_PASSES * self.data.plays / (reading * stage.workers) / 3600
        return replace(stage, hours=hours)

    def recommend(self) -> StagePlan:
        """Plan `recommend --all`: each CPU answers the users of a bucket, from tables that a node holds once."""
        worker = IDLE_WORKER + recommending_memory(self.data.songs, USERS_AT_ONCE)
        needed = self.tight.cpus * worker + 2 * self.vectors + self.retrieval_bytes()
        users = self.data.users
        return self._spread(
            "recommend", needed, self.data.buckets, "bucket of users", users, "users_per_second_per_cpu"
        )

    def requests(self, stage: str) -> int | None:
        """Return the number of object storage requests of a stage; an import is assumed to read text files."""
        if stage == "import":
            text = self.data.plays * CSV_BYTES
            units = max(1, ceil(text / UNIT_BYTES))
            pieces = units if units <= UNGROUPED_UNITS else MAX_PIECES
            size = ImportSize(pieces=pieces, buckets=self.data.buckets)
            return input_requests(text, UNIT_BYTES) + import_requests(size)
        buckets, fits, epochs = self.data.buckets, self.config.fits, self.config.epochs
        row_groups = max(1, ceil(self.data.plays / buckets / PLAYS_PER_ROW_GROUP))
        reading = histories_requests(1, row_groups, COLUMNS)
        if stage == "retrieval":
            ranges = song_ranges(self.data.songs, self.data.plays)
            cut = {"groups": len(bucket_groups(len(ranges), buckets)), "ranges": len(ranges), "fits": fits}
            return retrieval_requests(buckets, 1, row_groups=row_groups, columns=COLUMNS, **cut)
        by_stage = {
            "embed": embed_requests(buckets, reading, fits=fits),
            "train": train_requests(buckets, reading, fits=fits, epochs=epochs),
            "rank": rank_requests(buckets, reading),
            "taste": taste_requests(buckets, 1, row_groups=row_groups, columns=COLUMNS),
            "evaluate": evaluate_requests(buckets, reading, counted=min(buckets, COUNTED_BUCKETS)),
            "recommend": recommend_requests(buckets, reading),
        }
        return by_stage.get(stage, INDEX_REQUESTS)

    def storage(self) -> dict[str, int]:
        """Return bytes in object storage by kind of data; the names of temporary data begin with "temporary"."""
        floats = len(TrainConfig().horizons) * self.config.dim + self.config.hidden_dim + self.average_floats
        checkpoint = checkpoint_bytes(self.data.songs, self.config.dim)
        return {
            "histories": histories_bytes(self.data.plays),
            "songs": songs_bytes(self.data.songs, int(self.data.songs * SONG_TEXT_BYTES)),
            "song embeddings": self.config.fits * self.vectors,
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
        songs, answers = self.data.songs, self.rates.get(ANSWERS)
        if answers is None:
            return None
        shared = served_files(songs, self.config.dim, self.retrieval_bytes())
        replicas = replicas_for(self.config.serve_rate, answers)
        room = max(1, (self.tight.memory - serving_memory(songs, 0, shared)) // replica_memory())
        on_node = min(replicas, self.tight.cpus, room)
        return ServingPlan(
            replicas=replicas,
            replicas_per_node=on_node,
            nodes=ceil(replicas / on_node),
            replica_memory=replica_memory(),
            shared_memory=shared,
            node_memory=serving_memory(songs, on_node, shared),
            memory_there=self.tight.memory,
            requests_per_second=self.config.serve_rate,
            answers_per_second=answers,
        )

    def corpus_bytes(self) -> int:
        """Return the bytes of the corpus on the local disk of the node of `embed`."""
        return corpus_bytes(self.data.plays, self.data.songs)

    def missing(self) -> Iterator[str]:
        """Yield problems with settings that the cluster cannot meet: nodes, GPUs, CPUs, workers and batch."""
        if self.nodes > self.most_nodes:
            yield (
                f"--nodes is {self.nodes}, and cluster {self.cluster.name} has at most {self.most_nodes} CPU nodes: "
                "use fewer --nodes, or raise the maximum in its file"
            )
        workers = self.train_workers()
        if self.config.gpu and self.gpu is not None and workers > self.most_gpus:
            yield (
                f"train has {workers} workers with a GPU each, and cluster {self.cluster.name} has at most "
                f"{self.most_gpus} GPUs: use fewer --workers, or raise the maximum in its file"
            )
        if not self.config.gpu and workers > self.most_cpus:
            yield (
                f"train has {workers} workers, and the CPU nodes ({self.nodes}) have {self.most_cpus} CPUs, fewer "
                "than one per worker: use fewer --workers or more --nodes"
            )
        if self.config.gpu and self.gpu is None:
            yield f"--gpu needs a node type with a GPU, and cluster {self.cluster.name} has no node type with a GPU"
        if SHARDS % workers:
            choices = ", ".join(map(str, divisors(SHARDS)))
            yield f"workers is {workers}; expected a divisor of the {SHARDS} shards: {choices}"
        if 0 < self.config.batch < workers:
            yield (
                f"batch is {self.config.batch}, less than one window for each of {workers} workers: "
                "use a larger --batch or fewer --workers"
            )

    def other_problems(self, disk: int) -> Iterator[str]:
        """Yield problems with the disk of `embed`, the memory of the head node and the memory of GPUs."""
        if self.large.disk is not None and disk > 0.8 * self.large.disk:
            yield (
                f"embed writes a corpus of {gib(disk)} to the disk of a {self.large.name} node, which has "
                f"{gib(self.large.disk)}; use a larger disk, or import embeddings with `rayrec embed --vectors FILE`"
            )
        driver = IDLE_WORKER + vocabulary_memory(self.data.songs)
        for head in (node for node in self.cluster.nodes if node.head):
            if driver > head.memory:
                yield (
                    f"import needs {gib(driver)} of memory on the head node for the songs, and {head.name} has "
                    f"{gib(head.memory)}; give the head more memory"
                )
        if self.config.gpu and self.gpu is not None and self.gpu.gpu_memory is not None:
            workers = self.train_workers()
            needed = GPU_SLACK + training_gpu_memory(self.data.songs, self.config.dim, workers)
            if needed > self.gpu.gpu_memory:
                yield (
                    f"train needs {gib(needed)} of memory on each of {workers} GPUs for song tables, optimizer state "
                    f"and averages, and a GPU of a {self.gpu.name} node has {gib(self.gpu.gpu_memory)}: use more or "
                    "larger GPUs, or a smaller --dim"
                )

    def serving_problems(self, serving: ServingPlan | None) -> Iterator[str]:
        """Yield problems with the nodes of the server and their memory."""
        if serving is None:
            return
        if serving.node_memory > serving.memory_there:
            yield (
                f"one replica of the server needs {gib(serving.node_memory)} of memory on a {self.tight.name} node, "
                f"which has {gib(serving.memory_there)}: use nodes with more memory or a smaller --dim"
            )
        elif serving.nodes > self.nodes:
            yield (
                f"the server needs {serving.nodes} nodes for {serving.requests_per_second:g} requests per second, and "
                f"the plan has {self.nodes}: use more or larger nodes, or a lower --serve-rate"
            )

    def notes(self, stages: list[StagePlan]) -> list[str]:
        """Return notes on assumptions behind the figures of the plan."""
        texts = []
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
        if self.config.gpu and self.gpu is not None and self.gpu.gpu_memory is None:
            texts.append(f"node type {self.gpu.name} does not name its GPU model, so GPU memory is not checked")
        return texts

    def rate(self, name: str) -> float:
        """Return a rate from the file of rates, or else the built-in one."""
        return self.rates.get(name, BUILT_IN[name])

    def _on_node(self, units: int) -> int:
        """Return the number of workers per node when Ray spreads `units` units over all nodes."""
        return min(self.tight.cpus, ceil(units / self.nodes))

    def _spread(
        self, stage: str, memory: int, units: int, unit: str, work: int, per_second: str = "plays_per_second_per_cpu"
    ) -> StagePlan:
        """Plan a stage whose units Ray spreads over all CPU nodes."""
        workers = min(self.cpus, units)
        rate = f"{stage}_{per_second}"
        nodes = min(self.nodes, ceil(workers / self.tight.cpus))
        return self._stage(
            stage, self.tight, nodes, workers, memory, batches=units, batch_of=unit, work=work, rate=rate
        )

    def _stage(
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
        rate: str = "",
    ) -> StagePlan:
        speed = self.rates.get(rate, BUILT_IN.get(rate)) if work is not None else None
        origin = "the file of rates" if rate in self.rates else BUILT_IN_FROM
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
            hours=None if speed is None or work is None else work / (speed * workers) / 3600,
            rate=speed,
            rate_from="not measured" if speed is None else origin,
        )


ADVICE: dict[str, str] = {
    "import": "more --buckets, fewer CPUs per node or more memory",
    "embed": "a smaller --dim or more memory",
    "train": "more nodes (each then trains fewer rows of the song tables), a smaller --dim or more memory",
    "taste": "fewer CPUs per node, a smaller --dim or more memory",
}


def _most(kinds: list[tuple[int, int]], nodes: int) -> int:
    """Return the largest total amount of CPUs or GPUs on `nodes` nodes.

    `kinds` are (amount per node, maximum number of nodes) of each type of node.
    """
    total = 0
    for each, most in sorted(kinds, reverse=True):
        taken = min(nodes, most)
        total, nodes = total + each * taken, nodes - taken
    return total


def _too_little(stage: StagePlan) -> Iterator[str]:
    if stage.memory > stage.memory_there:
        advice = ADVICE.get(stage.stage, "more memory")
        yield (
            f"{stage.stage} needs {gib(stage.memory)} of memory on a {stage.node} node, which has "
            f"{gib(stage.memory_there)}: use {advice}"
        )
    store_there = int(stage.memory_there * STORE_SHARE / (1 - STORE_SHARE))
    if stage.store > store_there:
        yield (
            f"{stage.stage} puts {gib(stage.store)} into the object store of a {stage.node} node, which has "
            f"{gib(store_there)}: give the node more memory"
        )


def gib(size: int) -> str:
    """Format bytes as GiB, such as `1.5 GiB`."""
    return f"{size / GIB:,.1f} GiB"
