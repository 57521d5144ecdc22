"""A causal LM of a few lines whose blocks hand things to each other in every way that models do."""

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

WIDTH = 16


class Block(nn.Module):
    """Mixes each token with the mean of those before it; `form` makes its output, `inner` may be another's."""

    def __init__(self, form=None, inner: nn.Module | None = None):
        super().__init__()
        self.inner = inner or nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, WIDTH))
        self.form = form or (lambda hidden, **_: hidden)

    def forward(self, hidden: Tensor, **handed):
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.form(hidden + self.inner(hidden + past), **handed)


class Body(nn.Module):
    def __init__(self, blocks: list[nn.Module], walk):
        super().__init__()
        self.embed = nn.Embedding(96, WIDTH)
        self.layers = nn.ModuleList(blocks)
        self.walk = walk

    def forward(self, input_ids: Tensor, use_cache: bool = False, return_dict: bool = True):
        return BaseModelOutput(last_hidden_state=self.walk(self.layers, self.embed(input_ids), input_ids) * 2)


class Toy(nn.Module):
    """walk(blocks, embedded, tokens) is what the body does; by default one block after the other."""

    def __init__(self, blocks: list[nn.Module], walk=None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Body(blocks, walk or in_turn), nn.Linear(WIDTH, 96)
        self.config, self.dtype = SimpleNamespace(), torch.float32
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def forward(self, input_ids: Tensor, use_cache: bool = False, return_dict: bool = True):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids)[0]))


def in_turn(blocks, hidden: Tensor, _tokens: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden)
        hidden = hidden if isinstance(hidden, Tensor) else hidden[0]
    return hidden
