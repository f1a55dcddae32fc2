"""What a data set will take on a cluster: memory, disk, storage, batches and hours, before money is spent.

Plain arithmetic from three things: how large the data are, what the nodes have, and how fast a CPU was
measured to be. Sizes are bytes. Every constant says where it comes from: `measured` ones were, on
2026-11-24, on 2,010,839 generated plays of 20,000 users over 200,000 songs, D 64, two horizons, H 128;
`code` ones follow from the arrays that the code holds.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import Any

from rayrec.data.shards import divisors
from rayrec.embeddings.word2vec import MAX_WORKERS
from rayrec.errors import InputError
from rayrec.evaluation.protocol import COUNTED_BUCKETS
from rayrec.importing.fragments import ROWS_PER_CHUNK
from rayrec.importing.import_plan import MAX_PIECES, UNGROUPED_UNITS, bucket_groups
from rayrec.importing.staging import PLAYS_PER_ROW_GROUP
from rayrec.jobs.planning.cluster_file import GIB, ClusterFile, NodeType
from rayrec.jobs.planning.formulas import (
    EVALUATE_PASSES,
    INDEX_REQUESTS,
    ROW_BYTES,
    ImportSize,
    embed_requests,
    evaluate_requests,
    histories_bytes,
    histories_requests,
    import_requests,
    input_requests,
    rank_requests,
    recommend_requests,
    recommendations_bytes,
    retrieval_requests,
    shared_memory,
    songs_bytes,
    states_bytes,
    taste_requests,
    tastes_bytes,
    train_requests,
)
from rayrec.jobs.planning.plan_inputs import (
    ASSUMED_SKEW,
    BUILT_IN,
    BUILT_IN_FROM,
    CSV_BYTES,
    TRAIN_ON_GPU,
    DataSize,
    PlanConfig,
)
from rayrec.model.train_config import TrainConfig
from rayrec.recommend.retrieval.stored_retrieval import song_ranges
from rayrec.recommend.two_step_config import RankConfig, RetrievalConfig

READ_BYTES = 275  # of a play while a unit is read; measured peak
MERGE_BYTES = 210  # of a play while a bucket is merged; measured peak
KEY_BYTES = 12  # of a song in the object store while buckets are merged: a uint64 and an int32; code
VOCABULARY_BYTES = 200  # of a song on the driver of an import: two copies of key, id, title and artist; code
UNIT_BYTES = 64 << 20  # of a file, read by one task
FLOAT = 4
GENSIM_WORD = 172  # of a word beside its two vectors: 22 measured with the arrays, the rest is its counts' dict; code
WORKER = int(0.35 * GIB)  # of a worker of taste beside vectors: measured largest 327 MiB at 500,000 users
TRAINER = GIB  # of a training worker beside vectors: torch, a pool of windows; code
SHARDS = TrainConfig().shards
_RETRIEVAL = RetrievalConfig()
RANK_QUERIES = RankConfig().queries
COLUMNS = 3  # of histories that a stage reads: user, songs, moments
RULE_DISTANCE = 10  # plays ahead that a rule reaches; code
RULE_ENTRY = 12  # bytes of a rule: an int32 and an int64; code
SESSION_ENTRY = 9  # bytes of a posting, an int32 and a byte, and of its song in the session; code
GPU_SLACK = 2 * GIB  # of a GPU: CUDA's own, activations of a batch; not measured


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: where it runs and what it takes there."""

    stage: str
    node: str  # its type
    nodes: int  # of it, at once
    workers: int  # processes over all nodes
    memory: int  # bytes a node needs
    memory_there: int  # bytes a node has for it
    batches: int  # units of work
    batch_of: str  # what such a unit is
    requests: int | None  # of object storage; None where no formula is known
    hours: float | None  # None where nobody has measured a rate
    rate: float | None  # work a second of one worker
    rate_from: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All stages, what they leave in the bucket, and what will not work."""

    stages: list[StagePlan]
    storage: dict[str, int]  # what -> bytes in the bucket
    disk: int  # bytes on the node of embed
    states: int  # bytes of the server's store of user states
    problems: list[str]
    notes: list[str]
    data: DataSize
    cluster: str
    skew: dict[str, Any] = field(default_factory=dict)

    def to_mapping(self) -> dict[str, Any]:
        """As JSON holds it."""
        hours = [stage.hours for stage in self.stages if stage.hours is not None]
        return {**asdict(self), "hours": round(sum(hours), 2), "storage_total": sum(self.storage.values())}


def make_plan(
    data: DataSize,
    cluster: ClusterFile,
    config: PlanConfig,
    rates: dict[str, float] | None = None,
    skew: dict[str, Any] | None = None,
) -> Plan:
    """The plan. `rates` are measured ones by name, of `rayrec bench --save`; the built-in ones fill in and are marked.

    Raises `InputError` for a cluster without any node that work lands on.
    """
    planner = _Planner(data, cluster, config, rates or {})
    stages = planner.stages()
    disk = planner.corpus_bytes()
    problems = [*planner.missing(), *(problem for stage in stages for problem in _too_little(stage))]
    return Plan(
        stages=stages,
        storage=planner.storage(),
        disk=disk,
        states=planner.states_bytes(),
        problems=[*problems, *planner.other_problems(disk)],
        notes=planner.notes(stages),
        data=data,
        cluster=cluster.name,
        skew=skew or {},
    )


class _Planner:
    """The arithmetic, stage by stage."""

    def __init__(self, data: DataSize, cluster: ClusterFile, config: PlanConfig, rates: dict[str, float]) -> None:
        self.data, self.cluster, self.config, self.rates = data, cluster, config, rates
        plain = [node for node in cluster.workers if not node.gpus] or cluster.workers
        if not plain:
            raise InputError(f"cluster {cluster.name} has no worker node with CPUs; give workers CPUs")
        # The kind that holds least a CPU is the one that runs out first; the largest one gets what runs on one node.
        self.tight = min(plain, key=lambda node: node.memory / node.cpus)
        self.large = max(plain, key=lambda node: (node.cpus, node.memory))
        self.nodes = config.nodes or min(cluster.most_nodes, sum(node.most for node in plain))
        self.cpus = self.nodes * self.tight.cpus
        with_gpu = [node for node in cluster.workers if node.gpus]
        self.gpu = min(with_gpu, key=lambda node: (node.gpu_memory or 0, node.memory)) if with_gpu else None
        self.vectors = data.songs * config.dim * FLOAT

    def stages(self) -> list[StagePlan]:
        """In the order in which they run."""
        return [
            *(self.importing(), self.embed(), self.train(), self.retrieval(), self.rank(), self.taste()),
            *(self.index(), self.evaluate(), self.recommend()),
        ]

    def importing(self) -> StagePlan:
        """Units of text are read and buckets merged, one a CPU; the larger of the two decides."""
        unit = ROWS_PER_CHUNK * READ_BYTES
        bucket = self.data.largest_bucket * MERGE_BYTES
        needed = self.tight.cpus * (WORKER + max(unit, bucket)) + self.data.songs * KEY_BYTES
        return self._spread("import", needed, self.data.buckets, "bucket of users", self.data.plays)

    def embed(self) -> StagePlan:
        """gensim's two tables, its words, and three copies of the result; one node, threads of which few help."""
        needed = WORKER + self.data.songs * (5 * self.config.dim * FLOAT + GENSIM_WORD)
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
        """Host: the vectors of both fits, the best network and one on its way to a checkpoint.

        The table and Adam's two moments are on the device, so on the host where that is a CPU.
        """
        node = self.gpu if self.config.gpu and self.gpu else self.large
        workers = self.train_workers()
        on_node = min(workers, node.gpus) if node.gpus else ceil(workers / self.nodes)
        tables = 2 * self.config.fits + 1 + (0 if self.config.gpu else 3)
        windows = ceil(self.data.plays / self.config.window)
        batch = self.config.batch or TrainConfig().batch * workers
        steps = ceil(windows / batch) * self.config.epochs * self.config.fits
        on_gpu = self.config.gpu and TRAIN_ON_GPU in self.rates
        return self._stage(
            "train",
            node,
            ceil(workers / on_node),
            workers,
            on_node * (TRAINER + tables * self.vectors),
            batches=steps,
            batch_of=f"step of {batch} windows",
            work=self.data.plays * self.config.epochs * self.config.fits,
            rate=TRAIN_ON_GPU if on_gpu else "train_plays_per_second_per_cpu",
        )

    def train_workers(self) -> int:
        """As many as asked for, or about one a GPU, or one a CPU node: as many as the shards can be divided by."""
        if self.config.workers:
            return self.config.workers
        most = self.nodes
        if self.config.gpu and self.gpu:
            gpus = sum(node.gpus * node.most for node in self.cluster.workers)
            most = min(gpus, self.cluster.most_nodes * self.gpu.gpus)
        return max(number for number in divisors(SHARDS) if number <= max(1, most))

    def retrieval(self) -> StagePlan:
        """Each CPU counts a group of buckets, one after another: rules of ten plays ahead, sorted once."""
        pairs = self.data.plays // max(1, self.data.buckets) * RULE_DISTANCE
        needed = self.tight.cpus * (WORKER + 3 * pairs * RULE_ENTRY)
        groups = len(bucket_groups(len(song_ranges(self.data.songs, self.data.plays)), self.data.buckets))
        return self._spread("retrieval", needed, groups, "group of buckets", self.data.plays)

    def retrieval_bytes(self) -> int:
        """Of the postings and rules that are kept of each song, both of which are bounded."""
        songs, plays = self.data.songs, self.data.plays
        sessions = min(plays, songs * _RETRIEVAL.sessions_per_song) * SESSION_ENTRY
        return sessions + min(RULE_DISTANCE * plays, songs * _RETRIEVAL.rules_per_song) * RULE_ENTRY

    def rank(self) -> StagePlan:
        """Queries of all buckets are collected on all CPUs; the trees, which take longer, grow on one node."""
        needed = WORKER + 2 * self.vectors + self.retrieval_bytes()
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
        """Every CPU runs a process; the song table is one memory-mapped copy a node."""
        needed = self.tight.cpus * WORKER + shared_memory(self.data.songs, self.config.dim)
        return self._spread("taste", needed, self.data.buckets, "bucket of users", self.data.plays)

    def index(self) -> StagePlan:
        """The vectors and the index over them; one node."""
        needed = WORKER + int(2.2 * self.vectors)
        return self._stage("index", self.large, 1, self.large.cpus, needed, batches=1, batch_of="index", work=None)

    def evaluate(self) -> StagePlan:
        """All histories are read; the queries are answered by two recommenders, memory-mapped once a node."""
        needed = self.tight.cpus * 2 * WORKER + 2 * self.vectors + self.retrieval_bytes()
        stage = self._spread(
            "evaluate", needed, self.data.buckets, "bucket of users", self.config.queries, "queries_per_second_per_cpu"
        )
        reading = self.rate("read_plays_per_second_per_cpu")
        hours = (stage.hours or 0) + EVALUATE_PASSES * self.data.plays / (reading * stage.workers) / 3600
        return replace(stage, hours=hours)

    def recommend(self) -> StagePlan:
        """`recommend --all`: every CPU answers the users of a bucket, from tables that a node holds once."""
        needed = self.tight.cpus * 2 * WORKER + 2 * self.vectors + self.retrieval_bytes()
        users = self.data.users
        return self._spread(
            "recommend", needed, self.data.buckets, "bucket of users", users, "users_per_second_per_cpu"
        )

    def requests(self, stage: str) -> int | None:
        """What a stage asks of object storage; an import reads text files."""
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
        """Bytes in the bucket, by what they are; what is there for a while only is named so."""
        sizes = {"dim": self.config.dim, "hidden_dim": self.config.hidden_dim, "horizons": 2}
        checkpoint = 4 * self.vectors
        return {
            "histories": histories_bytes(self.data.plays),
            "songs": songs_bytes(self.data.songs, described=True),
            "song embeddings": self.config.fits * self.vectors,
            "model": self.config.fits * self.vectors,
            "retrieval": self.retrieval_bytes(),
            "tastes": tastes_bytes(self.data.users, self.data.plays, **sizes),
            "index": int(1.1 * self.vectors),
            "recommendations": recommendations_bytes(self.data.users, self.config.k),
            "while it imports": int(self.data.plays * ROW_BYTES) + histories_bytes(self.data.plays),
            "while it trains": 2 * checkpoint + self.data.songs * 8 * self.config.fits,
        }

    def states_bytes(self) -> int:
        """Of the server's store of user states."""
        return states_bytes(
            self.data.users,
            self.data.plays,
            hidden_dim=self.config.hidden_dim,
            average_floats=len(TrainConfig().averages) * self.config.dim,
        )

    def corpus_bytes(self) -> int:
        """On the local disk of embed's node: a play is a song's row in decimal and a space."""
        return self.data.plays * (len(str(self.data.songs)) + 1)

    def missing(self) -> Iterator[str]:
        """What the cluster does not have at all."""
        if self.config.gpu and self.gpu is None:
            yield f"--gpu needs a node type with a GPU, and cluster {self.cluster.name} has no node type with a GPU"
        if SHARDS % self.train_workers():
            choices = ", ".join(map(str, divisors(SHARDS)))
            yield f"workers is {self.train_workers()}; expected a divisor of the {SHARDS} shards: {choices}"
        if 0 < self.config.batch < self.train_workers():
            yield (
                f"batch is {self.config.batch}, less than one window for each of {self.train_workers()} workers: "
                "use a larger --batch or fewer --workers"
            )

    def other_problems(self, disk: int) -> Iterator[str]:
        """Disk, the head and the GPU's memory."""
        if self.large.disk is not None and disk > 0.8 * self.large.disk:
            yield (
                f"embed writes a corpus of {gib(disk)} to the disk of one {self.large.name}, which has "
                f"{gib(self.large.disk)}; give it a larger disk, or import embeddings with embed --vectors"
            )
        driver = WORKER + self.data.songs * VOCABULARY_BYTES
        for head in (node for node in self.cluster.nodes if node.head):
            if driver > head.memory:
                yield (
                    f"the driver of an import holds the songs, {gib(driver)}, and {head.name} has {gib(head.memory)}; "
                    "give the head more memory"
                )
        if self.config.gpu and self.gpu is not None and self.gpu.gpu_memory is not None:
            needed = GPU_SLACK + 3 * self.vectors
            if needed > self.gpu.gpu_memory:
                yield (
                    f"train keeps the song table and Adam's two moments on the GPU, {gib(needed)}, and one of "
                    f"{self.gpu.name} has {gib(self.gpu.gpu_memory)}: a larger GPU or a smaller --dim"
                )

    def notes(self, stages: list[StagePlan]) -> list[str]:
        """What to know of these figures."""
        texts = []
        if any(stage.rate_from == BUILT_IN_FROM for stage in stages):
            texts.append(f"rates were measured on {BUILT_IN_FROM}; measure yours with rayrec bench scale --save FILE")
        if self.config.gpu and TRAIN_ON_GPU not in self.rates:
            texts.append(f"no GPU rate ({TRAIN_ON_GPU}): each GPU counts as one CPU")
        if not self.data.looked_at:
            texts.append(f"the largest bucket is assumed to be {ASSUMED_SKEW} times the mean; --workspace measures it")
        if self.config.gpu and self.gpu is not None and self.gpu.gpu_memory is None:
            texts.append(f"{self.gpu.name} does not name its GPU: GPU memory is not checked")
        return texts

    def rate(self, name: str) -> float:
        """A rate of the file, or the built-in one."""
        return self.rates.get(name, BUILT_IN[name])

    def _spread(
        self, stage: str, memory: int, units: int, unit: str, work: int, per_second: str = "plays_per_second_per_cpu"
    ) -> StagePlan:
        """A stage over all buckets on all CPU nodes."""
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
            batches=batches,
            batch_of=batch_of,
            requests=self.requests(stage),
            hours=None if speed is None or work is None else work / (speed * workers) / 3600,
            rate=speed,
            rate_from="not measured" if speed is None else origin,
        )


ADVICE: dict[str, str] = {
    "import": "more --buckets, fewer CPUs a node or more memory",
    "embed": "a smaller --dim or more memory",
    "train": "fewer training workers a node, a smaller --dim or more memory",
    "taste": "fewer CPUs a node, a smaller --dim or more memory",
}


def _too_little(stage: StagePlan) -> Iterator[str]:
    if stage.memory > stage.memory_there:
        advice = ADVICE.get(stage.stage, "more memory")
        yield (
            f"{stage.stage} needs {gib(stage.memory)} of memory on a {stage.node}, which has "
            f"{gib(stage.memory_there)}: use {advice}"
        )


def gib(size: int) -> str:
    """Bytes in GiB."""
    return f"{size / GIB:,.1f} GiB"
