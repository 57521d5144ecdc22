"""Which GPUs a model lies on: one where it fits there with what a run needs, several where it does not."""

import torch

from .model import LanguageModel


def device_map_options(model: LanguageModel, tokens: int = 0, beside: tuple[int, int] = (0, 0)) -> dict:
    """Arguments of from_pretrained by which a model lies on one GPU or several; `model` needs no values.

    On the first GPU with room for the weights and `memory_needed(model, tokens, beside)`. Where there is none, on
    several, each of which keeps that much free: a block is pruned where it lies. Where they cannot, they take what
    they can.
    """
    weights, free = sum(parameter.nbytes for parameter in model.model.parameters()), {}
    reserved = memory_needed(model, tokens, beside)
    for index in range(torch.cuda.device_count()):  # asking one takes memory on it, so no more are asked than needed
        free[index] = torch.cuda.mem_get_info(index)[0]
        if weights + reserved <= free[index]:
            return {"device_map": {"": f"cuda:{index}"}}
    limits = {index: max(0, size - reserved) for index, size in free.items()}
    largest = max(sum(parameter.nbytes for parameter in block.parameters()) for block in model.blocks)
    if weights + len(limits) * largest <= sum(limits.values()):  # a block goes to a GPU whole
        return {"device_map": "auto", "max_memory": limits}
    return {"device_map": "auto"}


def memory_needed(model: LanguageModel, tokens: int, beside: tuple[int, int]) -> int:
    """Bytes that a run needs beside the weights at most, by the formulas of docs/scaling.md.

    tokens of calibration, whose hidden states are held twice (the second for the dense model), and `beside` the
    prunable weights copies of them and further bytes a weight. Statistics are taken to be Gram matrices, of each
    matrix its own.
    """
    blocks = [model.matrices_of(index) for index in range(len(model.blocks))]
    statistics = max(sum(4 * matrix.shape[1] ** 2 for matrix in block) for block in blocks)
    factor = 12 * max(matrix.shape[1] for matrix in model.matrices) ** 2
    pruning = 24 * max(matrix.size for matrix in model.matrices)
    value = model.model.dtype.itemsize
    hidden = 2 * value * tokens * model.model.get_input_embeddings().weight.shape[1]
    copies, further = beside
    return statistics + factor + pruning + hidden + (copies * value + further) * model.prunable_parameters
