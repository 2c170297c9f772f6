"""AdamMini: the plan of its parameters, their state, and the order of a step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from . import kernels, momentum
from .arguments import check_hyper_parameters, check_options, refuse_unsupported
from .exchange import Exchange, Item, mesh_axes
from .groups import Named, match_groups, named_group, named_parameters, some_of
from .kernels import ParamStep, Spec, vectorized
from .kernels.tensorwise import Tensorwise
from .partition import Blocks, Partition
from .plan import BlockPlan
from .report import NO_GRADIENT, exchange_summary, table
from .sharding import as_state, local, shard_of
from .state import SECOND_MOMENTS, adopt_all, check_state, follow_parameter, new_state

log = logging.getLogger("titan_adam_mini")


class AdamMini(Optimizer):
    """AdamW with one second moment per block of the Hessian instead of one per element (arXiv 2406.16793).

    Parameters may be plain tensors or DTensors on any mesh; sharding does not change the result.

    Args:
        params: `model.named_parameters()`, or param groups with such pairs or with torch's `param_names`.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment; positive.
        weight_decay: decoupled, as in AdamW; the partition decides to which parameters it applies (default: all).
        n_heads: number of query heads, for the default transformer partition.
        n_kv_heads: number of key heads; `n_heads` if None.
        head_dim: rows per head; a query's rows / `n_heads` and a key's rows / `n_kv_heads` if None.
        partition: a custom `Partition`; excludes the three above.
        value_blocks: "neuron", or "tensor" for one block per value projection.
        second_moment: "blocks", as in the paper; "channels": queries and keys by rows, outputs of attention and MLPs by
            columns (after SlimAdam, arXiv 2503.01843); or "factored": row means times column means for every matrix, as
            in Adafactor (arXiv 1804.04235).
        momentum_dtype: dtype of `exp_avg`; None for the parameter's. torch.int8 has a float32 scale per run of 128
            columns, for tensors of two or more dims whose columns are a multiple of 128; others stay float32.
        maximize: ascend instead of descend.
        foreach, fused: select the engine (see `kernels.choose`); None and None for the fastest available.
        capturable: for capture in a CUDA graph; needs the fused engine, and `lr` as a tensor if it is to change.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias, instead of to nearest.
        seed: for stochastic rounding; the same bits for the same seed, step and element on every mesh.

    State per parameter: `exp_avg` (shape and placements of the parameter), `exp_avg_sq` (the block grid, float32, or
    float64 for float64 parameters), `step` (0-d float32); with int8, `exp_avg_scale` (float32, same placements); if
    factored, `exp_avg_sq` has the rows, `exp_avg_sq_col` the columns, `exp_avg_sq_mean` the mean of the matrix.

    Raises:
        ValueError: for an invalid hyper-parameter, missing names, or a parameter that no rule of the partition matches.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        partition: Partition | None = None,
        value_blocks: str = "neuron",
        second_moment: str = "blocks",
        momentum_dtype: torch.dtype | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        stochastic_rounding: bool = False,
        seed: int = 0,
        **unsupported: Any,
    ) -> None:
        refuse_unsupported(unsupported)
        check_options(foreach, fused, momentum_dtype)
        heads = (n_heads, n_kv_heads, head_dim)
        if partition is None:
            partition = Partition.transformer(
                n_heads=n_heads,
                n_kv_heads=n_kv_heads,
                head_dim=head_dim,
                value_blocks=value_blocks,
                second_moment=second_moment,
            )
        elif any(heads) or value_blocks != "neuron" or second_moment != "blocks":
            raise ValueError(
                "pass n_heads, n_kv_heads, head_dim, value_blocks and second_moment to the partition, not beside it"
            )
        self.partition, self.momentum_dtype = partition, momentum_dtype
        self.stochastic_rounding, self.seed = stochastic_rounding, seed
        self._flags = (foreach, fused, capturable)
        self._names = WeakIdKeyDictionary()  # parameter -> name
        self._dims: dict[str, int] = {}
        self._checked = self._stepped = self._warned = False
        self._forget_plan()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._blocks = self._assign()

    # Groups

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters (see `params` of the class); blocks and exchange are replanned.

        Raises ValueError, and leaves the groups unchanged, if the group is invalid.
        """
        group = named_group(param_group)
        check_hyper_parameters({**self.defaults, **group})
        super().add_param_group(group)
        try:
            self._named()
            if hasattr(self, "_blocks"):  # not while the first groups are added
                self._blocks = self._assign()
        except ValueError:
            self.param_groups.pop()
            for param in group["params"]:
                self._dims.pop(self._names.pop(param, ""), None)
            raise
        self._checked = False
        self._forget_plan()

    def _named(self) -> Named:
        """(name, parameter, group) of every parameter in the groups, in order, after names were synchronised."""
        return named_parameters(self.param_groups, self._names, self._dims)

    def _assign(self, *, complete: bool = False, also: Collection[str] = ()) -> dict[str, Blocks]:
        """The blocks of all parameters that are or were trainable, and of those in `also`; freezing changes none.

        Parameters that were always frozen need no role, but are considered for patterns and orientation.

        Raises ValueError if a parameter has no blocks, or cannot be captured although `capturable` is set; with
        `complete` (no more groups will be added) also for a custom pattern that matches no parameter.
        """
        wanted = {*getattr(self, "_blocks", ()), *also}
        shapes: dict[str, tuple[int, ...]] = {}
        frozen: dict[str, tuple[int, ...]] = {}
        for name, param, _ in self._named():
            into = shapes if param.requires_grad or name in wanted else frozen
            into[name] = tuple(param.shape)
            if self._flags[2] and param.device.type not in ("cuda", "meta"):
                raise ValueError("capturable=True needs all parameters on CUDA devices; leave it out")
        # A custom partition may not accept `others`.
        return self.partition.assign(shapes, partial=not complete, **({"others": frozen} if frozen else {}))

    # Plan and state

    def _forget_plan(self) -> None:
        self._exchange: Exchange | None = None
        self._param_steps: list[ParamStep] = []
        self._key: list[Any] = []

    def _current_key(self) -> list[Any]:
        """What invalidates the plan when it changes; compared at every step, so it is short."""
        params = [param for group in self.param_groups for param in group["params"]]
        key: list[Any] = [(id(param), param.requires_grad, param.shape) for param in params]
        return [*key, *map(id, self.param_groups), *(param.device for param in params[:1])]

    def _planned(self) -> Exchange:
        """The exchange of the trainable parameters; collective if it has to be planned first."""
        key = self._current_key()
        if self._exchange is None or key != self._key:
            self._forget_plan()
            self._blocks = self._assign(complete=not self._checked)
            self._checked = True
            self._drop_state_of_others()
            trainable = [(name, param) for name, param, _ in self._named() if param.requires_grad]
            items = []
            device = next((local(param).device for _, param in trainable), torch.device("cpu"))
            self.engine, self._engine_line = kernels.choose(*self._flags, device)
            for name, param in trainable:
                plans, data, exp_avg = self._plans(name, param), local(param), self._momentum(param)
                dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                spec = Spec(plans, data.device.type, data.dtype, exp_avg, dtype, self.stochastic_rounding)
                served = (self.engine.version, self.engine.fallback(spec))
                agreed = (exp_avg, self.stochastic_rounding, self.seed)
                items.append(Item(name, param, plans, mesh_axes(param), dtype, agreed, spec, served))
            exchange = Exchange(items)
            for item in items:
                if state := self.state.get(item.param):
                    check_state(item.name, item.param, item.plans, state)
            self._exchange, self._key = exchange, key
            self._log_plan(exchange)
        return self._exchange

    def _plans(self, name: str, param: Tensor) -> tuple[BlockPlan, ...]:
        """One per grid of second moments."""
        try:
            shard = shard_of(param)
            if self._momentum(param) == torch.int8:
                momentum.check_runs(param)
            return tuple(BlockPlan.of(layout, shard) for layout in self._blocks[name].layouts)
        except ValueError as error:
            raise ValueError(f"AdamMini cannot plan {name!r}: {error}") from None

    def _momentum(self, param: Tensor) -> torch.dtype:
        return momentum.dtype_of(self.momentum_dtype, param.dtype, tuple(param.shape))

    def _log_plan(self, exchange: Exchange) -> None:
        """Log the plan once, on the first of the ranks that share it."""
        if not self._logs():
            return
        types = momentum.summary(self._momentum(item.param) for item in exchange.items)
        log.info(
            f"AdamMini: engine {self._engine_line}; momentum {types}; "
            f"{exchange_summary(self._blocks, exchange.items, exchange.buffers)}\n{self.table()}"
        )

    def _logs(self) -> bool:
        """Whether this is the first of the ranks that share the plan."""
        channels = self._exchange.channels if self._exchange is not None else {}
        first = min(chain.from_iterable(channels), default=0)
        return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == first

    def table(self) -> str:
        """One row per kind of parameter: pattern, shape, role, blocks, decay, straddling, bytes exchanged per step."""
        exchange = self._planned()
        return table(self._blocks, exchange.items, exchange.buffers)

    @torch._disable_dynamo
    def init_state(self) -> None:
        """Plan, and create the state of all trainable parameters. Collective; needs no gradients.

        Existing state is kept, also of frozen parameters; state of tensors no longer in the groups is dropped.
        Raises ValueError for parameters on the meta device.
        """
        for item in self._planned().items:
            if not self.state.get(item.param):
                self.state[item.param] = self._new_state(item.name, item.param)

    def _new_state(self, name: str, param: Tensor) -> dict[str, Tensor]:
        plans = self._plans(name, param)
        return new_state(name, param, plans, self._momentum(param), self.engine.step_on_device)

    def _drop_state_of_others(self) -> None:
        members = {id(param) for group in self.param_groups for param in group["params"]}
        for param in [param for param in self.state if isinstance(param, Tensor) and id(param) not in members]:
            del self.state[param]

    # The step

    @torch._disable_dynamo  # compiled loops and addresses cannot be traced
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient on any rank. Collective if blocks straddle."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        exchange = self._planned()
        if not all(map(self.state.get, (item.param for item in exchange.items))):
            self.init_state()
        with torch.profiler.record_function("AdamMini.exchange"):
            param_steps = self._current_param_steps(exchange, exchange.gradients())
            self.engine.check(param_steps)
            exchange.start(param_steps, self.engine)
        with torch.profiler.record_function("AdamMini.update"):
            # Parameters that need no other rank come first, during the all-reduce.
            self.engine.update([p for p in param_steps if p.grad is not None and not p.waits])
            with torch.profiler.record_function("AdamMini.wait"):
                exchange.finish()
            self.engine.update([p for p in param_steps if p.waits or (p.grad is None and p.present is not None)])
        if not self._stepped:
            self._stepped = self._check_gradients(param_steps)
        for param_step in param_steps:
            param_step.release()
        return loss

    def _check_gradients(self, param_steps: Sequence[ParamStep]) -> bool:
        """Whether any parameter has a gradient on any rank. If none has or ever had, log a warning once."""
        if any(p.grad is not None or (p.present is not None and p.present.item() > 0) for p in param_steps):
            return True
        if param_steps and not self._warned and self._logs():
            log.warning(NO_GRADIENT)
        self._warned = True
        return False

    def _current_param_steps(self, exchange: Exchange, grads: Sequence[Tensor | None]) -> list[ParamStep]:
        """Every parameter as the engine needs it, with its current local tensors."""
        if not self._param_steps:
            groups = {id(param): group for _, param, group in self._named()}
            decay = {name: blocks.decay for name, blocks in self._blocks.items()}
            self._param_steps = exchange.param_steps(groups, decay, self.seed if self.stochastic_rounding else None)
        for param_step, item, grad in zip(self._param_steps, exchange.items, grads, strict=True):
            state, param_step.param, param_step.grad = self.state[item.param], local(item.param), grad
            follow_parameter(item.name, state, param_step.param, self.engine.step_on_device)
            param_step.step = state["step"]
            param_step.exp_avg, param_step.exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
            param_step.exp_avg_scale = local(state["exp_avg_scale"]) if "exp_avg_scale" in state else None
            for key, factor in zip(SECOND_MOMENTS[1:], param_step.factors, strict=False):
                factor.exp_avg_sq = local(state[key])
        return self._param_steps

    # Saving and loading

    @torch._disable_dynamo
    @torch.no_grad()
    def block_means(self, exp_avg_sq: Mapping[Tensor, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's second moments converted to AdamMini's: their mean over every block, by state key, with the state's
        placements. Collective.

        Args:
            exp_avg_sq: one per trainable parameter, with its shape and placements.
        """
        self.init_state()
        exchange = self._planned()
        # As roots, because the exchange sums squares.
        roots = [local(exp_avg_sq[item.param]).to(item.dtype).sqrt() for item in exchange.items]
        param_steps = self._current_param_steps(exchange, roots)
        for param_step in param_steps:
            param_step.step = torch.zeros(())  # this state predicts nothing about the moments to be averaged
        plain = Tensorwise("foreach", vectorized)
        exchange.start(param_steps, plain)
        exchange.finish()
        means: dict[Tensor, dict[str, Tensor]] = {}
        for param_step, item in zip(param_steps, exchange.items, strict=True):
            means[item.param] = {}
            for key, mean in zip(SECOND_MOMENTS, plain.block_means(param_step), strict=False):
                like = self.state[item.param][key]
                placements = like.placements if isinstance(like, DTensor) else ()
                means[item.param][key] = as_state(mean, item.param, like.shape, placements)
            param_step.release()
        return means

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's, `param_names` in the groups included. An optimizer that has not stepped has no state."""
        self._named()
        self._drop_state_of_others()
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict()`, on this mesh; dtypes and names of this optimizer are kept. Collective.

        Frozen parameters may have state, too. Trainable parameters without loaded state start with zero moments,
        which is logged; loading an empty state, of an optimizer that never stepped, clears the state.

        Raises ValueError, and changes nothing, if the groups or the state do not fit.
        """
        self._planned()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved, loaded = state_dict["param_groups"], state_dict["state"]
        named = self._named()
        key_of = match_groups(self.param_groups, saved)
        # torch.distributed.checkpoint fills what a flat state dict lacks with empty dicts.
        found = {param: (name, loaded.get(key_of[param], {})) for name, param, _ in named}
        stored = {
            param: (name, state)
            for param, (name, state) in found.items()
            if not all(isinstance(value, dict) for value in state.values())
        }
        self._blocks = self._assign(also=[name for name, _ in stored.values()])
        state = adopt_all(stored, self._new_state)
        for group, new in zip(self.param_groups, saved, strict=True):
            group.update(deepcopy({key: value for key, value in new.items() if key not in ("params", "param_names")}))
        self.state.clear()
        self.state.update(state)
        if state:
            absent = [name for name, param, _ in named if param.requires_grad and param not in stored]
            if absent and self._logs():
                log.warning(f"AdamMini: the loaded state lacks {some_of(absent)}: their moments start at zero")
            self.init_state()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but the plan, which has process groups and is rebuilt."""
        own = ["partition", "momentum_dtype", "stochastic_rounding", "seed", "_flags", "_blocks"]
        own += ["_dims", "_checked", "_stepped", "_warned"]
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._names = WeakIdKeyDictionary()
        self._named()
        self._forget_plan()
