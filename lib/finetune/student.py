"""What is trained of a pruned model, and how its weights are made of that: three kinds of student.

A student's weights are computed before each forward pass and put in the place of the model's own wherever it reads
them, so that it does not matter how an architecture stores or uses its matrices, and nothing of the model is replaced.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..errors import RunError, reason_of
from ..model import LanguageModel, Matrix
from .config import ALL
from .teacher import Teacher


class DivergedError(RunError):
    """Training has left no numbers; from what it saved nothing can go on."""


class Student(nn.Module):
    """The loss of a pruned model on windows, as the Trainer wants it.

    With a teacher it is (1 - share) times the cross-entropy plus share times the Kullback-Leibler divergence of the
    student's distribution from the teacher's, both in nats a token. `passes` is the type that products are computed in.
    """

    def __init__(self, model: LanguageModel, passes: torch.dtype, teacher: Teacher | None = None, share: float = 0.0):
        super().__init__()
        self.forward_pass = _ForwardPass(model)
        self.language_model, self.passes, self.teacher, self.share = model, passes, teacher, share
        self.names = {id(parameter): f"model.{name}" for name, parameter in model.model.named_parameters()}
        if model.device.type == "cuda":  # says to the Trainer that it lies where it should
            self.hf_device_map = {str(index): str(device) for index, device in enumerate(model.devices)}

    def weights(self) -> dict[str, Tensor]:
        """What stands in for the model's parameters in a forward pass, by name."""
        return {}

    def finish(self) -> None:
        """Put what was trained into the model, and let go of it."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def decayed(self) -> list[nn.Parameter]:
        """Those of them that weight decay is for."""
        return list(self.trained().values())

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (B, S, vocabulary) of token ids (B, S)."""
        device = self.language_model.device.type
        with torch.autocast(device, enabled=False):
            weights = self.weights()
        with torch.autocast(device, torch.bfloat16, enabled=self.passes == torch.bfloat16):
            return functional_call(self.forward_pass, weights, (tokens,))

    @torch.no_grad()
    def choose_precision(self, tokens: Tensor) -> bool:
        """Whether the model's code runs in the type of its passes; where it adds up tensors of two types, they are in
        the model's own type from then on. Changes nothing else.
        """
        try:
            self.logits(tokens)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if self.passes == torch.float32:
                raise
            self.passes = torch.float32
            return False
        return True

    def forward(self, input_ids: Tensor, window: Tensor) -> dict[str, Tensor]:
        """The mean loss a token of windows (B, S), whose numbers among all are `window` (B,)."""
        logits = self.logits(input_ids)[:, :-1].float()  # (B, S-1, vocabulary)
        targets = input_ids[:, 1:].to(logits.device)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if self.teacher is not None:
            wanted = self.teacher.logits(window.tolist())[:, :-1].to(logits.device).float()
            divergence = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
            loss = (1 - self.share) * loss + self.share * divergence / targets.numel()
        return {"loss": loss}

    def state_dict(self, *_, **__) -> dict[str, Tensor]:
        """Of what is trained alone: all that a broken run goes on from."""
        return {name: parameter.detach() for name, parameter in self.trained().items()}

    def load_state_dict(self, state_dict, *_, **__):
        """The counterpart of `state_dict`."""
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(state_dict[name])
        return nn.modules.module._IncompatibleKeys([], [])


class _ForwardPass(nn.Module):
    """The model's own forward pass, as a module whose parameters can be replaced for one call."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.model, self._own_logits = model.model, model.forward_logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self._own_logits(tokens)


class MaskedLora(Student):
    """Every matrix W is W + mask * (alpha / rank) B A in the forward pass, and so it is merged.

    The mask is where W is not zero. B and A are peft's, of its layer for parameters: each expert of a stack has its
    own. They act on the weight and not on the input, so there is no dropout of the input to speak of.
    """

    def __init__(self, model: LanguageModel, rank: int, alpha: float, targets: tuple[str, ...], *rest):
        super().__init__(model, *rest)
        layer, config = _masked_layer(), _config(r=rank, lora_alpha=alpha)
        self.updates = nn.ModuleList(
            layer(matrix.module, ADAPTER, matrix.parameter, config, r=rank, lora_alpha=alpha)
            for matrix in stored_once(targeted(model, targets))
        )
        for update in self.updates:
            update.get_param().requires_grad_(False)
            for half in (update.lora_A, update.lora_B):
                half.float()

    def weights(self) -> dict[str, Tensor]:
        made = {}
        for update in self.updates:
            stored = update.get_param()
            weight = stored + update.get_delta_weight(ADAPTER)
            made[self.names[id(stored)]] = weight.to(self.passes) if self.passes == torch.bfloat16 else weight
        return made

    def finish(self) -> None:
        for update in self.updates:
            update.merge()
        self.updates = nn.ModuleList()


class MaskedFull(Student):
    """All weights are trained, of the prunable matrices those that are not zero.

    Of each such matrix there is one vector, its survivors in float32, so that gradients and the optimiser's state are
    of survivors alone and no rule of any optimiser can reach a zero. What is no prunable matrix (embeddings, norms,
    biases, the head, routers) is trained as it is. What a tensor shares with another stays shared.
    """

    def __init__(self, model: LanguageModel, *rest):
        super().__init__(model, *rest)
        prunable = {id(matrix.stored) for matrix in model.matrices}
        self.parts = [parameter for parameter in model.model.parameters() if parameter.is_floating_point()]
        self.masks = [part.data != 0 if id(part) in prunable else None for part in self.parts]
        self.shapes = [part.shape for part in self.parts]
        self.masters = nn.ParameterList(
            (part.data if mask is None else part.data[mask]).float().clone()
            for part, mask in zip(self.parts, self.masks, strict=True)
        )
        self.dtypes = [part.dtype for part in self.parts]
        for part in self.parts:
            part.data = part.data.new_empty(0)  # until `finish`

    def decayed(self) -> list[nn.Parameter]:
        """Matrices and embeddings; norms and biases are not drawn to zero."""
        return [master for master, shape in zip(self.masters, self.shapes, strict=True) if len(shape) > 1]

    def _whole(self, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """Each parameter from what is trained of it; matrices in `dtype`, if given."""
        for master, mask, shape in zip(self.masters, self.masks, self.shapes, strict=True):
            if mask is None:
                yield master.view(shape)
            else:
                values = master.to(dtype or master.dtype)
                yield torch.zeros(shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)

    def weights(self) -> dict[str, Tensor]:
        whole = self._whole(self.passes)
        return {self.names[id(part)]: made for part, made in zip(self.parts, whole, strict=True)}

    @torch.no_grad()
    def finish(self) -> None:
        for part, made, dtype in zip(self.parts, self._whole(None), self.dtypes, strict=True):
            part.data = made.to(dtype).clone()
        self.masters, self.masks, self.parts = nn.ParameterList(), [], []


class PlainLora(Student):
    """An ordinary adapter of peft, which acts beside the weights and knows of no zeros."""

    def __init__(self, model: LanguageModel, rank: int, alpha: float, targets: tuple[str, ...], *rest):
        from peft import get_peft_model

        chosen = targeted(model, targets)
        plain = [matrix for matrix in chosen if matrix.expert is None]
        modules = [matrix.name for matrix in plain]
        stacks = [_path(model, matrix) for matrix in stored_once(chosen) if matrix.expert is not None]
        config = _config(
            r=rank, lora_alpha=alpha, target_modules=modules or None, target_parameters=stacks or None,
            fan_in_fan_out=bool(plain) and all(matrix.transposed for matrix in plain), task_type="CAUSAL_LM",
        )  # fmt: skip
        try:
            adapted = get_peft_model(model.model, config)
        except (ValueError, AttributeError, TypeError) as error:
            raise _no_adapter(model, error) from error
        super().__init__(model, *rest)
        self.adapter = (adapted,)  # not as a module, of which it is one already

    def choose_precision(self, tokens: Tensor) -> bool:
        try:
            return super().choose_precision(tokens)
        except (ValueError, AttributeError, TypeError) as error:  # of code that reads what peft has wrapped
            raise _no_adapter(self.language_model, error) from error


ADAPTER = "default"


def _no_adapter(model: LanguageModel, error: Exception) -> RunError:
    return RunError(
        f"--keep_adapter: peft makes no adapter of {type(model.model).__name__} ({reason_of(error)}); leave it out to "
        "train masked updates, which are merged"
    )


def targeted(model: LanguageModel, targets: tuple[str, ...]) -> list[Matrix]:
    """The matrices with one of these names among the parts of their own. Raises RunError for a name of none."""
    if ALL in targets:
        return model.matrices
    known: dict[str, list[Matrix]] = {}
    for matrix in model.matrices:
        for part in matrix.name.split("."):
            if not part.isdigit():
                known.setdefault(part, []).append(matrix)
    for name in targets:
        if name not in known:
            ends = dict.fromkeys(
                [part for part in matrix.name.split(".") if not part.isdigit()][-1] for matrix in model.matrices
            )
            raise RunError(f"--lora_targets: {model.name} has no matrix called {name}; it has {', '.join(ends)}")
    wanted = {id(matrix) for name in targets for matrix in known[name]}
    return [matrix for matrix in model.matrices if id(matrix) in wanted]


def stored_once(matrices: list[Matrix]) -> list[Matrix]:
    """One of the matrices for every tensor that stores some."""
    return list({id(matrix.stored): matrix for matrix in matrices}.values())


def _path(model: LanguageModel, matrix: Matrix) -> str:
    """The full name of the parameter that stores it."""
    return next(name for name, parameter in model.model.named_parameters() if parameter is matrix.stored)


def _config(**options):
    from peft import LoraConfig

    return LoraConfig(lora_dropout=0.0, bias="none", **options)


def _masked_layer() -> type:
    """peft's layer for one parameter, with its update where the parameter is not zero."""
    from peft.tuners.lora.layer import ParamWrapper

    class Masked(ParamWrapper):
        def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> Tensor:
            return super().get_delta_weight(adapter_name, *args, **kwargs) * (self.get_param() != 0)

    return Masked
