"""Which GPUs a model lies on: one where it fits there with what a run needs, several where it does not."""

import torch

from .model import LanguageModel


def place(model: LanguageModel, tokens: int = 0, copies: int = 0) -> dict | str:
    """The device_map of a model that may lie on any GPU; `model` needs no values.

    The first GPU with room for the weights and for `room(model, tokens, copies)`; "auto" where none has it.
    """
    weights = sum(parameter.nbytes for parameter in model.model.parameters())
    needed = weights + room(model, tokens, copies)
    for index in range(torch.cuda.device_count()):  # asking one takes memory on it, so no more are asked than needed
        if needed <= torch.cuda.mem_get_info(index)[0]:
            return {"": f"cuda:{index}"}
    return "auto"


def room(model: LanguageModel, tokens: int, copies: int) -> int:
    """Bytes that a run needs beside the weights at most, by the formulas of docs/SCALING.md.

    tokens of calibration, whose hidden states are held twice (the second for the dense model), and `copies` of the
    prunable weights. Statistics are taken to be Gram matrices, of each matrix its own.
    """
    blocks = [model.matrices_of(index) for index in range(len(model.blocks))]
    statistics = max(sum(4 * matrix.shape[1] ** 2 for matrix in block) for block in blocks)
    factor = 12 * max(matrix.shape[1] for matrix in model.matrices) ** 2
    pruning = 24 * max(matrix.size for matrix in model.matrices)
    value = model.model.dtype.itemsize
    hidden = 2 * value * tokens * model.model.get_input_embeddings().weight.shape[1]
    return statistics + factor + pruning + hidden + copies * value * model.prunable_parameters
