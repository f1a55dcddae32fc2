"""The taste network, R(.; W) of the paper, and its input: padded plays with the context features c_j.

Shapes: B rows of plays, L plays, D embedding dimensions, H hidden units, F features, N songs, Q queries, K discounts,
X = H + K·D head inputs (the numbers that the head reads after each play).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu, linear, normalize, threshold
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rayrec.compat import scaled_rows, scaled_rows_gradient
from rayrec.data.histories import Histories
from rayrec.data.moments import HOUR_MS
from rayrec.data.windows import NEVER
from rayrec.model.train_config import FeatureSpec, ModelConfig

LONGEST_GAP_S = 30 * 24 * 3600.0  # longer gaps, and a missing previous play, count as this gap
LOG_LONGEST_GAP = float(np.log1p(LONGEST_GAP_S))
FIRST_HOUR = 3 * 24  # 1970 began on a Thursday; hour 0 of the week is the first hour of Monday
CHUNK = 16  # plays per chunk: one matrix product adds up each chunk, another carries the sums from chunk to chunk
FASTEST, SLOWEST = -200.0, -1e-12  # limits of log2 γ: one play later nothing of a play is left, or all of it
NOT_YET = 1e18  # distance given to plays that are still to come: any discount turns it into weight 0
SONG_TABLE, INPUT_TABLE = "songs.weight", "inputs.weight"  # the parameters that grow with the catalog
TABLES = (SONG_TABLE, INPUT_TABLE)


@dataclass(frozen=True, kw_only=True)
class PlayBatch:
    """Rows of plays, padded on the right to the length of the longest row."""

    songs_BL: Tensor  # int64, 0 where padded
    gap_BL: Tensor  # float32 in [0, 1], scaled time Δ since the previous play
    position_BL: Tensor  # float64, distance in plays from the play before the row; with `pause_hours`, pauses add to it
    length_B: Tensor  # int64, plays per row; on the CPU, as `pack_padded_sequence` requires
    contexts_BL: Tensor | None = None  # int32 bit sets
    hour_BL: Tensor | None = None  # int64, hour of the week in [0, 168)
    skipped_BL: Tensor | None = None  # bool

    def to(self, device: torch.device) -> "PlayBatch":
        """Return the batch on another device, except the lengths, which stay on the CPU."""
        return self.each(lambda values: values.to(device, non_blocking=True), self.length_B)

    def shortened(self, length_B: Tensor) -> "PlayBatch":
        """Return only the first `length_B` plays of each row; if no row has any, one column of padding."""
        longest = max(1, int(length_B.max())) if len(length_B) else 1
        return self.each(lambda values: values[:, :longest], length_B)

    def each(self, transform: Callable[[Tensor], Tensor], length_B: Tensor) -> "PlayBatch":
        """Return the batch with `transform` applied to every tensor except the lengths, which become `length_B`."""

        def transform_optional(values: Tensor | None) -> Tensor | None:
            return None if values is None else transform(values)

        return PlayBatch(
            songs_BL=transform(self.songs_BL),
            gap_BL=transform(self.gap_BL),
            position_BL=transform(self.position_BL),
            length_B=length_B,
            contexts_BL=transform_optional(self.contexts_BL),
            hour_BL=transform_optional(self.hour_BL),
            skipped_BL=transform_optional(self.skipped_BL),
        )


def scale_gap(seconds: np.ndarray) -> np.ndarray:
    """float32: log(1 + seconds), clipped and scaled to [0, 1]. A negative gap counts as 0."""
    clipped = np.clip(seconds, 0.0, LONGEST_GAP_S)
    return np.asarray(np.log1p(clipped) / LOG_LONGEST_GAP, dtype=np.float32)


def gap_seconds(since: np.ndarray, until: np.ndarray) -> np.ndarray:
    """float64: seconds between two times in ms UTC; LONGEST_GAP_S if `since` is NEVER."""
    is_never = since == NEVER
    return np.where(is_never, LONGEST_GAP_S, (until - np.where(is_never, 0, since)) / 1000.0)


def pad(plays: Histories, previous_at: np.ndarray, spec: FeatureSpec) -> PlayBatch:
    """Pad the rows of `plays` to one length; `previous_at`, int64 (B,), is the time of the play before each row.

    The batch holds only the features that `spec` names. If the plays have no contexts or skips, their values are 0
    and False.
    """
    lengths = plays.lengths
    mask = np.arange(lengths.max(initial=1)) < lengths[:, None]

    def pad_values(values: np.ndarray, dtype: type) -> Tensor:
        array: np.ndarray = np.zeros(mask.shape, dtype=dtype)
        array[mask] = values
        return torch.from_numpy(array)

    def pad_optional(values: np.ndarray | None, dtype: type) -> Tensor:
        return pad_values(np.zeros(plays.num_plays, dtype) if values is None else values, dtype)

    previous_played_at = np.empty_like(plays.played_at)
    previous_played_at[1:] = plays.played_at[:-1]
    starts = plays.offsets[:-1][lengths > 0]
    previous_played_at[starts] = previous_at[lengths > 0]
    hours = (plays.played_at // HOUR_MS + FIRST_HOUR) % 168
    seconds = gap_seconds(previous_played_at, plays.played_at).clip(0, LONGEST_GAP_S)
    steps = np.ones(mask.shape)
    if spec.pause_hours:
        steps[mask] += seconds / (3600 * spec.pause_hours)
    return PlayBatch(
        songs_BL=pad_values(plays.songs, np.int64),
        gap_BL=pad_values(scale_gap(seconds), np.float32),
        position_BL=torch.from_numpy(steps.cumsum(axis=1)),
        length_B=torch.from_numpy(lengths),
        contexts_BL=pad_optional(plays.contexts, np.int32) if spec.contexts else None,
        hour_BL=pad_values(hours, np.int64) if spec.hour or spec.weekday else None,
        skipped_BL=pad_optional(plays.skipped, np.bool_) if spec.skipped else None,
    )


def encode(batch: PlayBatch, spec: FeatureSpec) -> list[Tensor]:
    """Return the context features of plays, without their songs: float32 (B, L, width) each, whose widths total F."""
    parts: list[Tensor] = []
    if spec.contexts and batch.contexts_BL is not None:
        bits = torch.arange(len(spec.contexts), device=batch.contexts_BL.device)
        parts.append((batch.contexts_BL.unsqueeze(-1) >> bits & 1).float())
    if spec.gap:
        parts.append(batch.gap_BL.unsqueeze(-1))
    if spec.hour and batch.hour_BL is not None:
        parts.append(torch.nn.functional.one_hot(batch.hour_BL % 24, 24).float())
    if spec.weekday and batch.hour_BL is not None:
        parts.append(torch.nn.functional.one_hot(batch.hour_BL // 24, 7).float())
    if spec.skipped and batch.skipped_BL is not None:
        parts.append(batch.skipped_BL.unsqueeze(-1).float())
    return parts


def log_discounts(discounts: Sequence[float]) -> Tensor:
    """float32 (K,): log2 γ. For γ = 0 and 1 it is clamped to a finite value below 0, so that it can be multiplied."""
    return torch.tensor(discounts).log2().clamp(min=FASTEST, max=SLOWEST)


def running_sums(songs_BLD: Tensor, position_BL: Tensor, log_discount_K: Tensor, start_BKD: Tensor) -> Tensor:
    """(B, L, K, D): the discounted sums after each play i, Σ_j γ^(n_i − n_j) s_j over the plays j up to i.

    `start_BKD` are the sums before the first play, at n = 0; they are discounted in the same way. γ is that of the
    paper, given as its logarithm to base 2; positions n are those of `PlayBatch`. γ = 0 keeps only the last song,
    γ = 1 adds up all songs [the recurrence is ours]. The number of tensor operations does not grow with L.
    """
    rows, length, dim = songs_BLD.shape
    chunks = -(-length // CHUNK)
    padding, dtype = chunks * CHUNK - length, songs_BLD.dtype
    songs = torch.nn.functional.pad(songs_BLD, (0, 0, 0, padding)).view(rows * chunks, CHUNK, dim)
    position = torch.cat([position_BL, position_BL[:, -1:].expand(-1, padding)], dim=1).view(rows, chunks, CHUNK)
    play_weights = _play_weights(position.flatten(0, 1), log_discount_K, dtype)
    chunk_sums = torch.bmm(play_weights.flatten(1, 2), songs).view(rows, chunks, CHUNK, len(log_discount_K), dim)
    # The sums before each chunk: the start and the sums of all earlier chunks, discounted since then.
    chunk_start_BM = torch.cat([torch.zeros_like(position[:, :1, -1]), position[:, :-1, -1]], dim=1)
    sums_before_BMKD = torch.cat([start_BKD.to(dtype).unsqueeze(1), chunk_sums[:, :-1, -1]], dim=1)
    carried_BMKD = torch.einsum(
        "bmkn,bnkd->bmkd", _play_weights(chunk_start_BM, log_discount_K, dtype), sums_before_BMKD
    )
    distance = (position - chunk_start_BM.unsqueeze(-1)).unsqueeze(-1)
    sums = torch.addcmul(
        chunk_sums, torch.exp2(log_discount_K * distance).to(dtype).unsqueeze(-1), carried_BMKD.unsqueeze(2)
    )
    return sums.flatten(1, 2)[:, :length]


def _play_weights(position: Tensor, log_discount_K: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., L, K, L): γ^(n_i − n_j), the weight of play j after play i; 0 if play j comes after play i."""
    distance = threshold(position.unsqueeze(-1) - position.unsqueeze(-2), -0.5, NOT_YET).to(dtype)
    # On a CPU, exp is much slower than exp2 if results are close to 0, as most of these weights are.
    return (distance.unsqueeze(-2) * log_discount_K.to(dtype).unsqueeze(-1)).exp2_()


def as_state(sums_BKD: Tensor, width: int) -> Tensor:
    """(rows, B, H): the sums as rows of H = `width` numbers; the last row is filled up with zeros."""
    flat = sums_BKD.flatten(1)
    rows = -(-flat.shape[1] // width)
    padded = torch.nn.functional.pad(flat, (0, rows * width - flat.shape[1]))
    return padded.reshape(len(flat), rows, width).transpose(0, 1)


def from_state(state_RBH: Tensor, count: int, dim: int) -> Tensor:
    """(B, K, D): the sums in the rows that `as_state` returned."""
    rows = state_RBH.transpose(0, 1)
    return rows.flatten(1)[:, : count * dim].reshape(len(rows), count, dim)


class TasteModel(nn.Module):
    """GRU or LSTM, dense leaky-rectifier layer, one linear head per horizon [paper; the shared trunk is ours].

    Step j reads x_j = s_j ⊕ c_j. The head also reads the time from the last play to the request, and discounted
    averages of the songs played. These averages are added to the output of the head as well, so that songs near those
    just played are found without passing through the hidden units; therefore they average the vectors that taste
    vectors are compared with, not the input vectors. If times are real, pauses discount the averages as plays do. The
    taste vector of the long horizon starts from that of the short one [all ours]. Taste vectors and song vectors are
    compared by cosine.
    """

    def __init__(
        self,
        config: ModelConfig,
        song_vectors: Tensor,
        input_vectors: Tensor | None = None,
        *,
        shared: bool = False,
    ) -> None:
        """`song_vectors`, float32 (N, D), are the song table, or its first values if it is trained.

        `input_vectors`, of the same shape, are the same for the separate table of songs as inputs, if the network has
        one; None: that table starts as the song table. Tables are copies of these tensors unless `shared` is true.
        """
        super().__init__()
        for vectors in (song_vectors,) if input_vectors is None else (song_vectors, input_vectors):
            if tuple(vectors.shape) != (config.num_songs, config.embedding_dim):
                expected = (config.num_songs, config.embedding_dim)
                raise ValueError(f"song embeddings have shape {tuple(vectors.shape)}; expected {expected}")
        self.config = config
        num_averages = len(config.averages)
        # Training looks up and updates rows itself, so that the cost of a step does not grow with the catalog.
        self.songs = _new_table(song_vectors, shared)
        self.inputs = None
        if config.input_table:
            initial_inputs = song_vectors if input_vectors is None else input_vectors
            self.inputs = _new_table(initial_inputs, shared and input_vectors is not None)
        self.map = SongMap(config.embedding_dim) if config.song_table == "mapped" else None
        self.added_rows: Tensor | None  # int64 (n,), ascending: songs added after training
        self.added_averaged: Tensor | None  # float32 (n, D), their vectors in the averages
        self.added_inputs: Tensor | None  # float32 (n, D), their vectors as inputs of the cells
        for name in ("added_rows", "added_averaged", "added_inputs"):
            self.register_buffer(name, None, persistent=False)  # buffers, because `to` moves them with the network
        self.exported = False  # True if the song table already holds mapped vectors, as in a stored network
        # torch's LSTM has no peephole weights, which the paper's symbols include; Greff et al. 2015 found no gain.
        self.rnn = (nn.LSTM if config.cell == "lstm" else nn.GRU)(
            config.embedding_dim + config.features.dim,
            config.hidden_dim,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        head_width = config.hidden_dim + num_averages * config.embedding_dim + int(config.features.request_gap)
        self.dense = nn.Linear(head_width, config.hidden_dim)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_dim, config.embedding_dim) for name in config.horizons}
        )
        if num_averages:
            self.log_discount_K: Tensor
            self.register_buffer("log_discount_K", log_discounts(config.averages), persistent=False)
            self.average_weights = nn.ParameterDict({name: torch.zeros(num_averages) for name in config.horizons})
            self.linked = nn.ParameterDict({name: torch.ones(()) for name in [*config.horizons][1:]})

    def song_vectors(self, songs: Tensor) -> Tensor:
        """Normalized vectors of songs, (..., D), that taste vectors are compared with."""
        vectors = self.songs(songs)
        return normalize(vectors, dim=-1) if self.exported else self.compared(vectors)

    def input_vectors(self, songs: Tensor) -> Tensor:
        """Normalized vectors of songs, (..., D), as the network reads them."""
        return self.song_vectors(songs) if self.inputs is None else normalize(self.inputs(songs), dim=-1)

    def add_songs(self, rows: Tensor, averaged: Tensor, inputs: Tensor) -> None:
        """Let `trunk` read songs that are not in the tables: `rows`, int64 (n,), ascending, and their vectors.

        For these songs, `averaged` and `inputs`, float32 (n, D) each, replace the results of `song_vectors` and
        `input_vectors`.
        """
        added = [values.to(self.songs.weight.device) for values in (rows, averaged, inputs)]
        self.added_rows, self.added_averaged, self.added_inputs = added if len(rows) else (None, None, None)

    def _played_vectors(
        self, songs_BL: Tensor, vectors_of: Callable[[Tensor], Tensor], added_nD: Tensor | None
    ) -> Tensor:
        """(B, L, D): the vectors of songs, including added songs; zeros for all other songs from row N on."""
        is_known_BL = songs_BL < self.config.num_songs
        songs_BLD = vectors_of(songs_BL.where(is_known_BL, 0)) * is_known_BL.unsqueeze(-1)
        if self.added_rows is None or added_nD is None:
            return songs_BLD
        songs_BL = songs_BL.to(self.added_rows.dtype)
        added_index_BL = torch.searchsorted(self.added_rows, songs_BL.contiguous()).clamp(max=len(self.added_rows) - 1)
        is_added_BL = self.added_rows[added_index_BL] == songs_BL
        return torch.where(is_added_BL.unsqueeze(-1), added_nD[added_index_BL], songs_BLD)

    def compared(self, rows: Tensor) -> Tensor:
        """Turn rows of the song table, (..., D), into the normalized vectors that taste vectors are compared with."""
        return normalize(rows if self.map is None else self.map(rows), dim=-1)

    def trunk(self, batch: PlayBatch, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return head inputs after every play, (B, L, X), and states after each row's last play, (state layers, B, H).

        `state` is the state before the first play; None means zeros. Songs newer than the network, rows from N on,
        have a vector of zeros unless they were added.
        """
        songs_BLD = self._played_vectors(batch.songs_BL, self.input_vectors, self.added_inputs)
        if state is None:
            state = songs_BLD.new_zeros(self.config.state_layers, len(songs_BLD), self.config.hidden_dim)
        packed = pack_padded_sequence(
            self._step_inputs(songs_BLD, batch), batch.length_B, batch_first=True, enforce_sorted=False
        )
        recurrent = state[: self.config.recurrent_layers]
        if self.config.cell == "gru":
            output, last_state = self.rnn(packed, recurrent.contiguous())
        else:
            output, last_states = self.rnn(packed, tuple(part.contiguous() for part in recurrent.chunk(2)))
            last_state = torch.cat(last_states)
        hidden_BLH, _ = pad_packed_sequence(output, batch_first=True)
        if not self.config.averages:
            return hidden_BLH, last_state
        if self.inputs is not None:
            songs_BLD = self._played_vectors(batch.songs_BL, self.song_vectors, self.added_averaged)
        sums_BLKD = running_sums(songs_BLD, batch.position_BL, self.log_discount_K, self._state_sums(state))
        last_sums = sums_BLKD[torch.arange(len(sums_BLKD)), batch.length_B.to(sums_BLKD.device) - 1]
        return _join_head_inputs(hidden_BLH, sums_BLKD), torch.cat(
            [last_state, as_state(last_sums, self.config.hidden_dim)]
        )

    def head_inputs_of(self, state: Tensor) -> Tensor:
        """(B, X): the head inputs that follow from states alone, (state layers, B, H)."""
        hidden_BH = state[self.config.num_layers - 1]
        return _join_head_inputs(hidden_BH, self._state_sums(state)) if self.config.averages else hidden_BH

    def head(self, head_inputs: Tensor, request_gap: Tensor, horizon: str) -> Tensor:
        """Return normalized taste vectors (..., D) from head inputs (..., X) and scaled gaps to the request (...)."""
        return self._taste_vectors(head_inputs, request_gap, last_horizon=horizon)[horizon]

    def forward(
        self,
        batch: PlayBatch,
        request_gap_BL: Tensor,
        songs_BLD: Tensor | None = None,
        averaged_BLD: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return normalized taste vectors (B, L, D) after every play, by horizon.

        Training passes the vectors that it has looked up: `songs_BLD`, the input vectors of the plays, and
        `averaged_BLD`, the vectors of the same songs that taste vectors are compared with. Sequences are not packed,
        since padding on the right does not change earlier results and unpacked sequences train up to twice as fast.
        """
        if songs_BLD is None or averaged_BLD is None:
            songs_BLD, averaged_BLD = self.input_vectors(batch.songs_BL), self.song_vectors(batch.songs_BL)
        step_inputs = self._apply_dropout(self._step_inputs(songs_BLD, batch))
        # Autocast would run cuDNN's cells in float16 whatever its dtype, and gradients would need loss scaling. In
        # float32, cuDNN multiplies in TF32.
        with torch.autocast(step_inputs.device.type, enabled=False):
            hidden_BLH, _ = self.rnn(step_inputs.to(self.dense.weight.dtype))
        hidden_BLH = self._apply_dropout(hidden_BLH)
        if not self.config.averages:
            return self._taste_vectors(hidden_BLH, request_gap_BL)
        return self._taste_vectors_of_windows(hidden_BLH, request_gap_BL, averaged_BLD, batch.position_BL)

    def _taste_vectors_of_windows(
        self, hidden_BLH: Tensor, request_gap_BL: Tensor, songs_BLD: Tensor, position_BL: Tensor
    ) -> dict[str, Tensor]:
        """Return the same as `_tastes` for whole windows, with few operations over the averages of all plays."""
        config, (rows, length, dim) = self.config, songs_BLD.shape
        if not config.features.pause_hours:
            position_BL = position_BL[:1]  # without pauses, the same for all rows
        play_weights = _play_weights(position_BL, self.log_discount_K, songs_BLD.dtype).flatten(1, 2)
        average_weights_HK = torch.stack([self.average_weights[name] for name in config.horizons])
        widths = [config.hidden_dim, len(config.averages) * dim, int(config.features.request_gap)]
        hidden_weight, averages_weight, gap_weight = torch.split(self.dense.weight, widths, dim=1)
        dense, weighted_averages_NHD = _Averages.apply(  # type: ignore[no-untyped-call]
            songs_BLD, averages_weight, average_weights_HK, play_weights
        )
        head_inputs = hidden_BLH.flatten(0, 1)
        if config.features.request_gap:
            head_inputs = torch.cat([head_inputs, request_gap_BL.reshape(-1, 1)], dim=1)
        dense = leaky_relu(dense + linear(head_inputs, torch.cat([hidden_weight, gap_weight], dim=1), self.dense.bias))
        heads = [self.heads[name] for name in config.horizons]
        head_outputs = linear(
            dense, *(torch.cat([getattr(head, name) for head in heads]) for name in ("weight", "bias"))
        )
        taste_vectors_NHD = unit(head_outputs.view(-1, dim)).view(-1, len(heads), dim) + weighted_averages_NHD
        tastes_by_horizon: dict[str, Tensor] = {}
        for name, taste_vectors in zip(config.horizons, taste_vectors_NHD.unbind(1), strict=True):
            if name in self.linked:
                taste_vectors = taste_vectors + self.linked[name] * next(iter(tastes_by_horizon.values()))
            tastes_by_horizon[name] = unit(taste_vectors)
        return {name: taste_vectors.view(rows, length, dim) for name, taste_vectors in tastes_by_horizon.items()}

    def _apply_dropout(self, values: Tensor) -> Tensor:
        if not self.training or not self.config.dropout:
            return values
        dropped, _ = torch.native_dropout(values, self.config.dropout, True)  # dropout() takes five operations on a CPU
        return dropped

    def _step_inputs(self, songs_BLD: Tensor, batch: PlayBatch) -> Tensor:
        return torch.cat([songs_BLD, *encode(batch, self.config.features)], dim=-1)

    def _state_sums(self, state: Tensor) -> Tensor:
        rows = state[self.config.recurrent_layers :]
        return from_state(rows, len(self.config.averages), self.config.embedding_dim)

    def _taste_vectors(self, head_inputs: Tensor, request_gap: Tensor, last_horizon: str = "") -> dict[str, Tensor]:
        """Return taste vectors by horizon, ending with `last_horizon` if given; later horizons build on the first."""
        directions = head_inputs[..., self.config.hidden_dim :]
        if self.config.features.request_gap:
            head_inputs = torch.cat([head_inputs, request_gap.unsqueeze(-1)], dim=-1)
        dense = leaky_relu(self.dense(head_inputs))
        tastes_by_horizon: dict[str, Tensor] = {}
        for name in self.config.horizons:
            taste_vectors = self.heads[name](dense)
            if self.config.averages:
                averages = directions.reshape(
                    *directions.shape[:-1], len(self.config.averages), self.config.embedding_dim
                )
                weighted_averages = self.average_weights[name].unsqueeze(-1) * averages
                taste_vectors = normalize(taste_vectors, dim=-1) + weighted_averages.sum(-2)
                if name in self.linked:
                    taste_vectors = taste_vectors + self.linked[name] * next(iter(tastes_by_horizon.values()))
            tastes_by_horizon[name] = normalize(taste_vectors, dim=-1)
            if name == last_horizon:
                break
        return tastes_by_horizon


class SongMap(nn.Module):
    """A trained map of given song vectors, (..., D) to (..., D), that starts as the identity [ours].

    It can also map the vectors of songs that did not exist at training.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim, bias=False)
        nn.init.zeros_(self.outer.weight)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors into the space in which the network scores songs."""
        correction: Tensor = self.outer(leaky_relu(self.inner(vectors)))
        return vectors + correction


class _Averages(torch.autograd.Function):
    """Normalizes running sums and multiplies them by two weights: part of the dense layer, and the averages' weights.

    The first product is part of the dense layer's output; the second one is added to the taste vectors. The normalized
    sums (directions) are as large as all head inputs, so the class uses as few operations as possible forward and
    backward: both products are one matrix product. N = B · L plays, O outputs of the dense layer, H horizons.
    """

    @staticmethod
    def forward(
        ctx: Any, songs_BLD: Tensor, weight_OX: Tensor, average_weights_HK: Tensor, play_weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return both products, (N, O) and (N, H, D), float32 under autocast.

        `play_weights`, (B or 1, L · K, L), are the weights that `_play_weights` returns.
        """
        device, (horizons, count), dim = songs_BLD.device.type, average_weights_HK.shape, songs_BLD.shape[2]
        if torch.is_autocast_enabled(device):  # sums of many plays need more precision than bfloat16
            songs_BLD, weight_OX, average_weights_HK = songs_BLD.float(), weight_OX.float(), average_weights_HK.float()
        with torch.autocast(device, enabled=False):
            play_weights = play_weights.to(songs_BLD.dtype)
            sums = torch.bmm(play_weights.expand(len(songs_BLD), -1, -1), songs_BLD).view(-1, dim)
            ones = _ones(sums)
            directions, norms = scaled_rows(sums, ones)
            diagonal_weights_HDKD = average_weights_HK[:, None, :, None] * _eye(sums)[:, None]
            weight = torch.cat([weight_OX, diagonal_weights_HDKD.view(horizons * dim, count * dim)])
            ctx.save_for_backward(sums, ones, directions, norms, weight, play_weights)
            ctx.shape = (len(weight_OX), horizons, count, dim)
            dense_NO, weighted_averages_N = torch.mm(directions.view(-1, count * dim), weight.T).tensor_split(
                [len(weight_OX)], 1
            )
            return dense_NO, weighted_averages_N.view(-1, horizons, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Return the gradients by songs, by the weight of the dense layer, and by the weights of the averages."""
        sums, ones, directions, norms, weight, play_weights = ctx.saved_tensors
        outputs, horizons, count, dim = ctx.shape
        with torch.autocast(sums.device.type, enabled=False):
            grad = torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)
            grad_weight = torch.mm(grad.T, directions.view(-1, count * dim))
            grad_average_weights_HK = (
                grad_weight[outputs:].view(horizons, dim, count, dim).diagonal(dim1=1, dim2=3).sum(-1)
            )
            grad_sums = scaled_rows_gradient(torch.mm(grad, weight).view(-1, dim), sums, ones, norms)
            grad_sums = grad_sums.view(-1, play_weights.shape[-1] * count, dim)
            grad_songs = torch.bmm(play_weights.mT.expand(len(grad_sums), -1, -1), grad_sums)
        return grad_songs, grad_weight[:outputs], grad_average_weights_HK, None


def unit(vectors: Tensor) -> Tensor:
    """Scale rows (n, D) to length 1, by the fused operation of weight normalization. No row may be zero."""
    directions, _ = scaled_rows(vectors.contiguous(), _ones(vectors))
    return directions


def _ones(vectors: Tensor) -> Tensor:
    """(n, 1): ones, the lengths to which rows (n, D) are scaled."""
    rows = len(vectors)
    if torch.compiler.is_compiling():
        return vectors.new_ones(rows, 1)
    return _cached_ones(1 << rows.bit_length(), vectors.dtype, vectors.device)[:rows]


def _eye(vectors: Tensor) -> Tensor:
    """(D, D): the identity matrix for vectors (n, D)."""
    if torch.compiler.is_compiling():
        return torch.eye(vectors.shape[1], dtype=vectors.dtype, device=vectors.device)
    return _cached_eye(vectors.shape[1], vectors.dtype, vectors.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # training may use the cached tensor
def _cached_eye(dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(dim, dtype=dtype, device=device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached_ones(rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(rows, 1, dtype=dtype, device=device)


def _new_table(vectors: Tensor, shared: bool) -> nn.Embedding:
    """Return a table that uses `vectors`, float32 (N, D), as its weight if `shared`, else a copy of them."""
    rows, dim = vectors.shape
    return nn.Embedding(rows, dim, _weight=vectors if shared else vectors.clone()).requires_grad_(False)


def _join_head_inputs(hidden: Tensor, sums: Tensor) -> Tensor:
    """(..., X): head inputs, the hidden outputs (..., H) followed by the normalized sums (..., K, D)."""
    return torch.cat([hidden, normalize(sums, dim=-1).flatten(-2)], dim=-1)
