"""The taste network, R(.; W) of the paper.

Shapes: B rows, L plays, D embedding, H hidden units, F features, N songs, Q questions.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, normalize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rayrec.taste.config import ModelConfig
from rayrec.taste.features import PlayBatch, encode

SONG_TABLE = "songs.weight"  # the parameter that grows with the catalog


class TasteModel(nn.Module):
    """GRU or LSTM, dense leaky-rectifier layer, one linear head per horizon [paper; the shared trunk is ours].

    Step j sees x_j = s_j ⊕ c_j. The head also sees the time from the last play to the request
    [ours]. Taste vectors and song vectors are compared by cosine.
    """

    def __init__(self, config: ModelConfig, song_vectors: Tensor) -> None:
        """`song_vectors` float32 (N, D) start the song table, or are it where it is frozen."""
        super().__init__()
        if tuple(song_vectors.shape) != (config.num_songs, config.embedding_dim):
            raise ValueError(f"song vectors {tuple(song_vectors.shape)} do not fit {config}")
        self.config = config
        trained = config.song_table == "trained"
        # Sparse gradients keep the cost of a step independent of the size of the catalog.
        self.songs = nn.Embedding(config.num_songs, config.embedding_dim, sparse=trained, _weight=song_vectors.clone())
        self.songs.weight.requires_grad_(trained)
        # torch's LSTM has no peephole weights, which the paper's symbols include; Greff et al. 2015 found no gain.
        self.rnn = (nn.LSTM if config.cell == "lstm" else nn.GRU)(
            config.embedding_dim + config.features.dim,
            config.hidden_dim,
            config.num_layers,
            batch_first=True,
            dropout=config.dropout if config.num_layers > 1 else 0.0,
        )
        self.dropout = nn.Dropout(config.dropout)
        self.dense = nn.Linear(config.hidden_dim + int(config.features.request_gap), config.hidden_dim)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_dim, config.embedding_dim) for name in config.horizons}
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))  # of cosine logits: the inverse temperature

    def song_vectors(self, songs: Tensor) -> Tensor:
        """Normalized vectors of songs, (..., D)."""
        return normalize(self.songs(songs), dim=-1)

    def trunk(self, batch: PlayBatch, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden output after every play (B, L, H), and the state after each row's last play (state layers, B, H).

        `state` is the one before the first play, zeros where None. Songs newer than the network, rows
        from N on, count as a vector of zeros.
        """
        known_BL = batch.songs_BL < self.config.num_songs
        songs_BL = batch.songs_BL.where(known_BL, 0)
        x_BLX = self._steps(self.song_vectors(songs_BL) * known_BL.unsqueeze(-1), batch)
        packed = pack_padded_sequence(x_BLX, batch.length_B, batch_first=True, enforce_sorted=False)
        if self.config.cell == "gru":
            output, last = self.rnn(packed, state)
        else:
            output, pair = self.rnn(
                packed, None if state is None else tuple(part.contiguous() for part in state.chunk(2))
            )
            last = torch.cat(pair)
        hidden_BLH, _ = pad_packed_sequence(output, batch_first=True)
        return hidden_BLH, last

    def head(self, hidden: Tensor, request_gap: Tensor, horizon: str) -> Tensor:
        """Normalized taste vectors (..., D) from hidden outputs (..., H) and scaled gaps (...)."""
        return self._project(self._dense(hidden, request_gap), horizon)

    def forward(self, batch: PlayBatch, request_gap_BL: Tensor) -> dict[str, Tensor]:
        """Normalized taste vectors (B, L, D) after every play, per horizon."""
        # Padding on the right changes nothing before it, and unpacked sequences train up to twice as fast.
        # It looks up the row's first song: a song that is looked up is moved on by its momentum, gradient or not.
        position_L = torch.arange(batch.songs_BL.shape[1], device=batch.songs_BL.device)
        inside_BL = position_L < batch.length_B.to(batch.songs_BL.device, non_blocking=True).unsqueeze(-1)
        songs_BL = batch.songs_BL.where(inside_BL, batch.songs_BL[:, :1])
        hidden_BLH, _ = self.rnn(self.dropout(self._steps(self.song_vectors(songs_BL), batch)))
        dense_BLH = self._dense(self.dropout(hidden_BLH), request_gap_BL)
        return {name: self._project(dense_BLH, name) for name in self.heads}

    def _steps(self, songs_BLD: Tensor, batch: PlayBatch) -> Tensor:
        return torch.cat([songs_BLD, *encode(batch, self.config.features)], dim=-1)

    def _dense(self, hidden: Tensor, request_gap: Tensor) -> Tensor:
        if self.config.features.request_gap:
            hidden = torch.cat([hidden, request_gap.unsqueeze(-1)], dim=-1)
        return leaky_relu(self.dense(hidden))

    def _project(self, dense: Tensor, horizon: str) -> Tensor:
        return normalize(self.heads[horizon](dense), dim=-1)
