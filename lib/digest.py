"""The key of a model's weights, by their content."""

import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from . import ranks
from .esd import published_precision
from .memory import copy_to_host
from .progress import progress

THREADS = min(8, os.cpu_count() or 1)  # each hashes 1.4 GB/s, where a GPU hands over 50


def digest(model) -> str:
    """SHA-256 of the prunable matrices' names and values, as the metrics read them: in float16, so that it depends on
    --dtype only where that is bfloat16 and the checkpoint is not.

    A few matrices are hashed at a time, beside the reading of the next; `model` is a LanguageModel.
    """
    groups, found = list(model.groups()), {}
    owners = ranks.balance([sum(matrix.size for matrix in group) for group in groups])
    share = [group for group, owner in zip(groups, owners, strict=True) if owner == ranks.rank()]
    under_way: deque = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for group in progress(share, "reading weights", "tensor"):
            with model.resident(group):
                for matrix in group:
                    if len(under_way) == THREADS:
                        name, hashed = under_way.popleft()
                        found[name] = hashed.result()
                    weight = copy_to_host(published_precision(matrix.weight).contiguous())
                    under_way.append((matrix.name, pool.submit(_hash, matrix.name, weight)))
        found |= {name: hashed.result() for name, hashed in under_way}
    for others in ranks.all_gather(found):
        found |= others
    return hashlib.sha256(b"".join(found[matrix.name] for matrix in model.matrices)).hexdigest()


def _hash(name: str, weight: Tensor) -> bytes:
    hashed = hashlib.sha256(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
    hashed.update(weight.view(torch.uint8).numpy())
    return hashed.digest()
