"""A key/value cache with one row per running request, for rows of different lengths.

Each row is a sequence of its own: a forward writes its new keys at the row's own end and attends to that row only up
to there, so what else runs beside a request cannot change its result. The object is passed to the language model as
`past_key_values`; before a forward the runner says with `begin` which rows and positions it is about. Buffers grow
with the longest row. Layout `[rows, heads, positions, width]`: attention reads each head's keys one after the other.
"""

from dataclasses import dataclass

import torch

from pixellm.errors import ConfigError

LayerStates = tuple[torch.Tensor, torch.Tensor]
_GROWTH_STEP = 256


@dataclass
class _Forward:
    """The forward under way: which rows it covers and where each one writes.

    Attributes:
        rows: long [B], cache rows; None = the rows 0 … B−1, which can be read without a copy.
        write_rows: long [B, 1], rows to write to.
        positions: long [B, Q], where the new keys go.
        length: keys of each row that are attended to, masked or not.
    """

    rows: torch.Tensor | None
    write_rows: torch.Tensor
    positions: torch.Tensor
    length: int


class SlotCache:
    """Keys and values of up to `num_rows` sequences. Rows are handed out lowest first."""

    def __init__(self, num_rows: int, max_length: int, device: torch.device) -> None:
        """Reserves nothing yet: buffers appear with the first keys.

        Args:
            num_rows: sequences that can be held.
            max_length: positions that a row may reach.
            device: where the model runs.
        """
        self.num_rows = num_rows
        self.max_length = max_length
        self.device = device
        self.capacity = 0
        self.valid = torch.ones((num_rows, 0), dtype=torch.bool, device=device)
        self._layers: list[LayerStates] = []
        self._free = list(range(num_rows))
        self._forward: _Forward | None = None
        self._has_fixed_addresses = False

    def allocate(self) -> int:
        """Hands out the lowest free row."""
        if not self._free:
            raise ConfigError(f"all {self.num_rows} cache rows are taken; raise max_batch_size")
        row = min(self._free)
        self._free.remove(row)
        return row

    def release(self, row: int) -> None:
        """Takes a row back; its keys become garbage that the next owner overwrites."""
        self.valid[row] = True
        self._free.append(row)

    def move(self, source: int, target: int) -> None:
        """Moves a taken row into a free one."""
        self._free.remove(target)
        for keys, values in self._layers:
            keys[target].copy_(keys[source])
            values[target].copy_(values[source])
        self.valid[target] = self.valid[source]
        self.release(source)

    def ensure_capacity(self, length: int) -> None:
        """Makes room for rows of `length` positions; buffers double, so that growing costs little over time."""
        if length <= self.capacity:
            return
        doubled = min(max(length, 2 * self.capacity), max(length, self.max_length))
        capacity = -(-doubled // _GROWTH_STEP) * _GROWTH_STEP
        self._layers = [(_grown(keys, capacity), _grown(values, capacity)) for keys, values in self._layers]
        valid = torch.ones((self.num_rows, capacity), dtype=torch.bool, device=self.device)
        valid[:, : self.capacity] = self.valid
        self.valid, self.capacity = valid, capacity

    def fix_capacity(self) -> None:
        """Reserves the longest rows at once, at addresses that do not change: what compiled graphs need."""
        self.ensure_capacity(self.max_length)
        self._has_fixed_addresses = True

    def begin_row(self, row: int, start: int, count: int) -> None:
        """Announces a forward of `count` new positions of one row, from `start` on."""
        self.ensure_capacity(start + count)
        positions = torch.arange(start, start + count, device=self.device)[None]
        rows = torch.tensor([row], device=self.device)
        self._forward = _Forward(None if row == 0 else rows, rows[:, None], positions, start + count)

    def begin_span(self, positions_B: torch.Tensor, length: int) -> None:
        """Announces a forward of one new position for each of the rows 0 … B−1, at `positions_B` (long [B])."""
        self.ensure_capacity(length)
        rows = torch.arange(len(positions_B), device=self.device)
        self._forward = _Forward(None, rows[:, None], positions_B[:, None], length)

    def begin_rows(self, rows_B: torch.Tensor, starts_B: torch.Tensor, count: int, length: int) -> None:
        """Announces a forward of `count` new positions for each of some rows, from their own starts on (long [B])."""
        self.ensure_capacity(length)
        positions = starts_B[:, None] + torch.arange(count, device=self.device)
        self._forward = _Forward(rows_B, rows_B[:, None], positions, length)

    def allowed_keys(self) -> torch.Tensor:
        """bool [B, Q, length] of the announced forward: each row's own valid keys up to each query's position."""
        forward = self._current()
        rows = forward.write_rows[:, 0]
        keys = torch.arange(forward.length, device=self.device)
        is_past = keys <= forward.positions[..., None]
        return is_past & self.valid[rows, None, : forward.length]

    def mark_valid(self, row: int, valid_P: torch.Tensor) -> None:
        """Says which of a row's first P keys may be attended to (bool [P])."""
        self.ensure_capacity(len(valid_P))
        self.valid[row, : len(valid_P)] = valid_P

    def export_row(self, row: int, length: int) -> list[LayerStates]:
        """Copies the first `length` keys and values of a row, per layer [heads, length, width]."""
        return [(keys[row, :, :length].clone(), values[row, :, :length].clone()) for keys, values in self._layers]

    def import_row(self, row: int, states: list[LayerStates]) -> None:
        """Writes exported keys and values to the start of a row."""
        length = states[0][0].shape[1]
        self.ensure_capacity(length)
        for layer, (keys, values) in enumerate(states):
            own_keys, own_values = self._layer(layer, keys[None], values[None])
            own_keys[row, :, :length] = keys
            own_values[row, :, :length] = values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> LayerStates:
        """Called by each attention layer: writes the new states, returns all that the forward attends to.

        Args:
            key_states: [B, heads, Q, width].
            value_states: [B, heads, Q, width].
            layer_idx: which layer.

        Returns:
            Keys and values [B, heads, length, width].
        """
        forward = self._current()
        keys, values = self._layer(layer_idx, key_states, value_states)
        keys[forward.write_rows, :, forward.positions] = key_states.transpose(1, 2)
        values[forward.write_rows, :, forward.positions] = value_states.transpose(1, 2)
        rows: torch.Tensor | slice = slice(len(key_states)) if forward.rows is None else forward.rows
        return keys[rows, :, : forward.length], values[rows, :, : forward.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions before the announced forward, as transformers asks for a two-dimensional mask."""
        del layer_idx
        forward = self._current()
        return forward.length - forward.positions.shape[1]

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the first query among the keys."""
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys, and the index of the first."""
        del query_length, layer_idx
        return self._current().length, 0

    def _current(self) -> _Forward:
        if self._forward is None:
            raise ConfigError("the cache was used without begin_row, begin_span or begin_rows before the forward")
        return self._forward

    def _layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> LayerStates:
        """The buffers of a layer, created on first use for states of [B, heads, Q, width]."""
        while len(self._layers) <= index:
            own_keys, own_values = (
                states.new_zeros((self.num_rows, states.shape[1], self.capacity, states.shape[3]))
                for states in (keys, values)
            )
            if self._has_fixed_addresses:
                torch._dynamo.mark_static_address(own_keys)
                torch._dynamo.mark_static_address(own_values)
            self._layers.append((own_keys, own_values))
        return self._layers[index]


def _grown(states: torch.Tensor, capacity: int) -> torch.Tensor:
    grown = states.new_zeros((*states.shape[:2], capacity, states.shape[3]))
    grown[:, :, : states.shape[2]] = states
    return grown
