"""The dense model that a student learns from, whatever its size.

Its last hidden states of all windows are computed once, its blocks read one at a time, and kept in memory or in a file;
in training only its head is left, which makes the exact distribution of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .. import ranks
from ..activations import Activations, Store
from ..blockwise import last_hidden_states
from ..errors import RunError
from ..model import LanguageModel


class Teacher:
    """Logits of windows by their number.

    windows (n, S) are those that are trained on, of which every rank computes its share and holds all. Raises RunError
    where the teacher does not have the `vocabulary` of the student.
    """

    def __init__(self, model: LanguageModel, windows: Tensor, batch_size: int, store: Store, vocabulary: int):
        self._model = model
        self._states = Activations(model.device, len(windows), store)
        own = self._states if ranks.world_size() == 1 else self._states.new_empty()
        for _, hidden in last_hidden_states(model, ranks.shard(windows), batch_size, store):
            for state in hidden.split(1):
                own.put(len(own), state)
        if own is not self._states:
            self._share(own, len(windows))
        if (width := model.logits(self._states[0][:, :1]).shape[-1]) != vocabulary:
            raise RunError(f"--teacher {model.name}: has {width} tokens, and the model that learns has {vocabulary}")

    def _share(self, own: Activations, windows: int) -> None:
        """Every rank's states on every rank."""
        for index in range(windows):
            owner, like = index % ranks.world_size(), own[0]
            state = own[index // ranks.world_size()] if owner == ranks.rank() else torch.empty_like(like)
            sent = ranks.broadcast(state.contiguous().view(torch.uint8), owner)  # bytes, for gloo lacks types
            self._states.put(index, sent.view(like.dtype))

    def logits(self, numbers: list[int]) -> Tensor:
        """(B, S, vocabulary) of the windows of these numbers; no gradients."""
        return self._model.logits(torch.cat([self._states[number] for number in numbers]))


@contextmanager
def teacher_errors(name: str) -> Iterator[None]:
    """While the teacher is found and read: what is said of a model is said of its flag."""
    try:
        yield
    except RunError as error:
        raise RunError(str(error).replace(f"--model {name}", f"--teacher {name}")) from error
