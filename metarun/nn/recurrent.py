"""Recurrent layers and cells computed step by step, since torch's fused ones work neither under vmap nor twice."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import UserError
from metarun.nn.noise import dropped

Cell = Callable[..., Any]
"""(input already multiplied by its weights, state, weights of the state, bias) → next state."""


def lstm_cell(x: Tensor, state: tuple[Tensor, Tensor], hidden_weight: Tensor, bias: Tensor | None) -> Any:
    """One step of an LSTM (Hochreiter and Schmidhuber 1997) as in torch; ``x`` is already multiplied by its weights."""
    hidden, cell = state
    gates = x + F.linear(hidden, hidden_weight, bias)
    enter, keep, new, leave = gates.chunk(4, -1)
    cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def gru_cell(x: Tensor, hidden: Tensor, hidden_weight: Tensor, bias: Tensor | None) -> Tensor:
    """One step of a gated recurrent unit (Cho et al. 2014) as in torch: the reset gate acts after the product."""
    x_reset, x_update, x_new = x.chunk(3, -1)
    h_reset, h_update, h_new = F.linear(hidden, hidden_weight, bias).chunk(3, -1)
    reset, update = (x_reset + h_reset).sigmoid(), (x_update + h_update).sigmoid()
    new = (x_new + reset * h_new).tanh()
    return new + update * (hidden - new)


def plain_cell(activation: Callable[[Tensor], Tensor]) -> Cell:
    """One step of an Elman network."""

    def cell(x: Tensor, hidden: Tensor, hidden_weight: Tensor, bias: Tensor | None) -> Tensor:
        return activation(x + F.linear(hidden, hidden_weight, bias))

    return cell


def single_step(cell: Cell) -> Cell:
    """``torch.lstm_cell`` and its siblings: (input, state, weights and biases) → the next state."""

    def step(
        input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        return cell(F.linear(input, w_ih, b_ih), tuple(hx) if isinstance(hx, list) else hx, w_hh, b_hh)

    return step


def one_direction(cell: Cell, x: Tensor, state: Any, weights: list[Tensor], biases: bool, back: bool) -> Any:
    """A layer in one direction: ``x [steps, batch, features]`` → outputs of all steps, and the last state."""
    projected = len(weights) == (5 if biases else 3)
    w_ih, w_hh, *rest = weights
    b_ih, b_hh = rest[:2] if biases else (None, None)
    outputs = []
    for now in (x.flip(0) if back else x) @ w_ih.T + (0 if b_ih is None else b_ih):
        state = cell(now, state, w_hh, b_hh)
        if projected:
            state = (state[0] @ weights[-1].T, state[1])
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs[::-1] if back else outputs), state


def recurrent(name: str, cell: Cell) -> Cell:
    """``torch.lstm`` and its siblings for padded batches: several layers, both directions, dropout between layers."""

    def run(
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: Any,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool | None = None,
    ) -> Any:
        if batch_first is None:
            raise UserError(f"A packed sequence cannot go through torch.{name} here: pad it, and mask what is padding.")
        x = input.transpose(0, 1) if batch_first else input
        pair = isinstance(hx, tuple | list)
        directions = 2 if bidirectional else 1
        each = len(params) // (num_layers * directions)
        last: list[Any] = []
        for layer in range(num_layers):
            outputs = []
            for back in range(directions):
                index = layer * directions + back
                state = (hx[0][index], hx[1][index]) if pair else hx[index]
                own = list(params[index * each : (index + 1) * each])
                out, state = one_direction(cell, x, state, own, has_biases, bool(back))
                outputs.append(out)
                last.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if layer < num_layers - 1:
                x = dropped(x, dropout, train, False, tuple(x.shape), False)
        x = x.transpose(0, 1) if batch_first else x
        if pair:
            return x, torch.stack([state[0] for state in last]), torch.stack([state[1] for state in last])
        return x, torch.stack(last)

    return run
