"""AdamMini: parameter groups, state, and the order of a step. Blocks, sharding and arithmetic live elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer

from . import kernels, momentum
from .arguments import NAMES_NEEDED, check_hyper_parameters, check_options, refuse_unsupported
from .exchange import Exchange, Item, bytes_exchanged, mesh_axes
from .kernels import Factor, ParamStep, Spec, int8, rounding, vectorized
from .kernels.tensorwise import Tensorwise
from .partition import Blocks, Partition, clean_name
from .plan import BlockPlan
from .report import heads_cut, table
from .sharding import as_state, local, shard_of
from .state import SECOND_MOMENTS, adopt_all

log = logging.getLogger("titan_adam_mini")


class AdamMini(Optimizer):
    """AdamW with one second moment per block of the Hessian instead of one per element (arXiv 2406.16793).

    Parameters may be plain tensors or DTensors on any mesh: sharding never changes the result.

    Args:
        params: `model.named_parameters()`, or param groups that hold such pairs or torch's `param_names`.
        lr: learning rate, a float or a 0-d tensor.
        betas: decay of the first and the second moment, each in [0, 1).
        eps: added to the root of the second moment; positive.
        weight_decay: decoupled, as in AdamW; which parameters it applies to is the partition's to say (all).
        n_heads: number of query heads, for the default transformer partition.
        n_kv_heads: number of key heads; `n_heads` if None.
        head_dim: rows per head; a query's rows / `n_heads` and a key's rows / `n_kv_heads` if None.
        partition: a `Partition` of your own; excludes the three above.
        value_blocks: "neuron", or "tensor" for one block per value projection.
        second_moment: "blocks", the paper's; "channels": queries and keys by rows, outputs of attention and MLPs by
            columns (after SlimAdam, arXiv 2503.01843); or "factored": row means times column means for every matrix, as
            Adafactor keeps them (arXiv 1804.04235).
        momentum_dtype: dtype of `exp_avg`; None for the parameter's. torch.int8 keeps a float32 scale per run of 128
            columns, for tensors of two dims or more whose columns are a multiple of 128; others stay float32.
        maximize: ascend instead of descend.
        foreach, fused: which engine computes (see `kernels.choose`); None and None for the best there is.
        capturable: may be captured in a CUDA graph; needs the fused engine, and `lr` as a tensor if it is to move.
        stochastic_rounding: round bfloat16 parameters up or down at random, without bias, instead of to nearest.
        seed: of that rounding; the same bits for the same seed, step and element on every mesh.

    State per parameter: `exp_avg` (shape and placements of the parameter), `exp_avg_sq` (the block grid, float32, or
    float64 for float64 parameters), `step` (0-d float32); with int8, `exp_avg_scale` (float32, placed likewise); where
    factored, `exp_avg_sq` is of the rows, `exp_avg_sq_col` of the columns, `exp_avg_sq_mean` of the whole.

    Raises:
        ValueError: for a wrong hyper-parameter, missing names, or a parameter that no rule of the partition knows.
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
                "n_heads, n_kv_heads, head_dim, value_blocks and second_moment belong to the partition if you pass one"
            )
        self.partition = partition
        self.momentum_dtype = momentum_dtype
        self.stochastic_rounding = stochastic_rounding
        self.seed = seed
        self._flags = (foreach, fused, capturable)
        self._names: list[list[str]] = []
        self._forget_plan()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._blocks = self._assign()

    # Groups

    @torch._disable_dynamo
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of named parameters (see `params` of the class); blocks and exchange are planned anew."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        group = dict(param_group)
        given = group.pop("param_names", None)
        params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        pairs = [one for one in params if isinstance(one, tuple)]
        if len(pairs) == len(params):
            names, params = [name for name, _ in pairs], [param for _, param in pairs]
        elif given is None or pairs or len(given) != len(params):
            raise ValueError(NAMES_NEEDED)
        else:
            names = list(given)
        known = set(chain.from_iterable(self._names))
        for name in names:
            if name in known:
                raise ValueError(f"two parameters are called {name!r}; names must be unique over all groups")
            known.add(name)
        group["params"] = params
        check_hyper_parameters({**self.defaults, **group})
        super().add_param_group(group)
        self._names.append(names)
        if hasattr(self, "_blocks"):  # not while the first groups are added
            try:
                self._blocks = self._assign()
            except ValueError:
                self.param_groups.pop()
                self._names.pop()
                raise
        self._forget_plan()

    def _named(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """(name, parameter, group) of every trainable parameter, in order."""
        return [
            (name, param, group)
            for names, group in zip(self._names, self.param_groups, strict=True)
            for name, param in zip(names, group["params"], strict=True)
            if param.requires_grad
        ]

    def _assign(self) -> dict[str, Blocks]:
        """The blocks of all parameters; ValueError if one has none, or cannot be captured and is to be."""
        blocks = self.partition.assign({name: tuple(param.shape) for name, param, _ in self._named()})
        if self._flags[2] and any(param.device.type not in ("cuda", "meta") for _, param, _ in self._named()):
            raise ValueError("capturable=True is for CUDA graphs, and there are parameters elsewhere; leave it out")
        return blocks

    # Plan and state

    def _forget_plan(self) -> None:
        self._exchange: Exchange | None = None
        self._works: list[ParamStep] = []
        self._key: list[Any] = []

    def _current_key(self) -> list[Any]:
        """What the plan stands and falls with; compared in every step, so it is short."""
        params = [param for group in self.param_groups for param in group["params"]]
        key: list[Any] = [(id(param), param.requires_grad) for param in params]
        return [*key, *map(id, self.param_groups), *(param.device for param in params[:1])]

    def _planned(self) -> Exchange:
        """The exchange of the tensors that are in the groups now; collective when it has to be planned."""
        key = self._current_key()
        if self._exchange is None or key != self._key:
            self._blocks = self._assign()
            items = []
            home = next((local(param).device for _, param, _ in self._named()), torch.device("cpu"))
            self.engine, self._engine_line = kernels.choose(*self._flags, home)
            for name, param, _ in self._named():
                try:
                    shard = shard_of(param)
                    plans = tuple(BlockPlan.of(layout, shard) for layout in self._blocks[name].layouts)
                    if self._momentum(param) == torch.int8:
                        momentum.check_runs(param)
                except ValueError as error:
                    raise ValueError(f"AdamMini cannot plan {name!r}: {error}") from None
                dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
                data, exp_avg = local(param), self._momentum(param)
                spec = Spec(plans, data.device.type, data.dtype, exp_avg, dtype, self.stochastic_rounding)
                served = (self.engine.version, self.engine.fallback(spec))
                agreed = (exp_avg, self.stochastic_rounding, self.seed)
                items.append(Item(name, param, plans, mesh_axes(param), dtype, agreed, spec, served))
            self._exchange, self._key, self._works = Exchange(items), key, []
            self._log_plan(self._exchange)
        return self._exchange

    def _momentum(self, param: Tensor) -> torch.dtype:
        return momentum.dtype_of(self.momentum_dtype, param.dtype, tuple(param.shape))

    def _log_plan(self, exchange: Exchange) -> None:
        """Say once, on the first rank of those that share this plan, what was decided."""
        ranks = set(chain.from_iterable(exchange.groups))
        if dist.is_available() and dist.is_initialized() and dist.get_rank() != min(ranks, default=0):
            return
        total = sum(bytes_exchanged(exchange.items, exchange.buffers).values())
        types = momentum.summary(self._momentum(item.param) for item in exchange.items)
        log.info(
            f"AdamMini: engine {self._engine_line}; momentum {types}; "
            f"{len(exchange.straddling)} of {len(exchange.items)} parameters have blocks on more than one rank, "
            f"{heads_cut(self._blocks, exchange.items)} heads cut, "
            f"{total:,} bytes exchanged per step\n{self.table()}"
        )

    def table(self) -> str:
        """One row per kind of parameter: pattern, shape, role, blocks, decay, straddling, bytes exchanged per step."""
        exchange = self._planned()
        return table(self._blocks, exchange.items, exchange.buffers)

    @torch._disable_dynamo
    def init_state(self) -> None:
        """Plan, and make the state of all trainable parameters at once. Collective; needs no gradients.

        State that is there stays; state of tensors that have left the groups is dropped.
        Raises ValueError for parameters on the meta device.
        """
        exchange = self._planned()
        members = {id(param) for group in self.param_groups for param in group["params"]}
        for param in [param for param in self.state if id(param) not in members]:
            del self.state[param]
        for item in exchange.items:
            if not self.state.get(item.param):
                self.state[item.param] = self._fresh_state(item)

    def _fresh_state(self, item: Item) -> dict[str, Tensor]:
        param = item.param
        data = local(param)
        if data.is_meta:
            raise ValueError(f"{item.name!r} is on the meta device: materialise the model (to_empty, then initialise)")
        same = param.placements if isinstance(param, DTensor) else ()
        exp_avg = torch.zeros_like(data, dtype=self._momentum(param))
        state = {
            "step": torch.zeros((), dtype=torch.float32, device=data.device if self.engine.step_on_device else "cpu"),
            "exp_avg": as_state(exp_avg, param, param.shape, same, param.stride()),
        }
        for key, plan in zip(SECOND_MOMENTS, item.plans, strict=False):
            grid = [one if axis in plan.aligned_axes else Replicate() for axis, one in enumerate(same)]
            zeros = torch.zeros(plan.grid_shape, dtype=item.dtype, device=data.device)
            state[key] = as_state(zeros, param, plan.layout.grid_shape, grid)
        if exp_avg.dtype == torch.int8:
            scale = torch.zeros(int8.scale_shape(data.shape), dtype=torch.float32, device=data.device)
            state["exp_avg_scale"] = as_state(scale, param, int8.scale_shape(param.shape), same)
        return state

    # The step

    @torch._disable_dynamo  # compiled loops and addresses are nothing to trace
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient on any rank. Collective where blocks straddle."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        exchange = self._exchange
        if exchange is None or len(self.state) != len(exchange.items) or self._current_key() != self._key:
            self.init_state()
            exchange = self._planned()
        with torch.profiler.record_function("AdamMini.exchange"):
            works = self._current_works(exchange, exchange.gradients())
            self.engine.check(works)
            exchange.start(works, self.engine)
        with torch.profiler.record_function("AdamMini.update"):
            # Whoever needs no other rank goes first, while the sums travel.
            alone = [work for work in works if work.grad is not None and not work.waits]
            self.engine.update(alone)
            with torch.profiler.record_function("AdamMini.wait"):
                exchange.finish()
            self.engine.update(
                [work for work in works if work.waits or (work.grad is None and work.present is not None)]
            )
        for work in works:
            work.grad = work.squares = None  # whoever drops the gradients wants their memory back
        return loss

    def _current_works(self, exchange: Exchange, grads: Sequence[Tensor | None]) -> list[ParamStep]:
        """What the engine gets of every parameter: local tensors, taken anew."""
        if not self._works:
            for index, (item, (name, _, group)) in enumerate(zip(exchange.items, self._named(), strict=True)):
                ((own, complete), *others), present = exchange.places(index)
                plan, *more = item.plans
                seed = rounding.seed_of(self.seed, clean_name(name)) if self.stochastic_rounding else None
                nothing = torch.empty(0)
                self._works.append(
                    ParamStep(
                        name=name,
                        plan=plan,
                        param=nothing,
                        grad=None,
                        exp_avg=nothing,
                        exp_avg_scale=None,
                        exp_avg_sq=nothing,
                        step=nothing,
                        group=group,
                        decay=self._blocks[name].decay,
                        seed=seed,
                        own_sums=own,
                        sums=complete,
                        present=present,
                        spec=item.spec,
                        factors=tuple(
                            Factor(factor, nothing, *sums) for factor, sums in zip(more, others, strict=True)
                        ),
                    )
                )
        for work, item, grad in zip(self._works, exchange.items, grads, strict=True):
            state = self.state[item.param]
            work.param, work.grad, work.step = local(item.param), grad, state["step"]
            work.exp_avg, work.exp_avg_sq = local(state["exp_avg"]), local(state["exp_avg_sq"])
            work.exp_avg_scale = local(state["exp_avg_scale"]) if "exp_avg_scale" in state else None
            for key, factor in zip(SECOND_MOMENTS[1:], work.factors, strict=False):
                factor.exp_avg_sq = local(state[key])
        return self._works

    # Saving and loading

    @torch._disable_dynamo
    @torch.no_grad()
    def block_means(self, exp_avg_sq: Mapping[Tensor, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """AdamW's second moments as AdamMini's: their mean over every block, by its key in the state, placed as the
        state is. Collective.

        Args:
            exp_avg_sq: one per trainable parameter, with its shape and placements.
        """
        self.init_state()
        exchange = self._planned()
        # As roots, because the exchange squares what it sums.
        roots = [local(exp_avg_sq[item.param]).to(item.dtype).sqrt() for item in exchange.items]
        works = self._current_works(exchange, roots)
        for work in works:
            work.step = torch.zeros(())  # the state here says nothing of the moments that are averaged
        plain = Tensorwise("foreach", vectorized)
        exchange.start(works, plain)
        exchange.finish()
        means: dict[Tensor, dict[str, Tensor]] = {}
        for work, item in zip(works, exchange.items, strict=True):
            means[item.param] = {}
            for key, mean in zip(SECOND_MOMENTS, plain.block_means(work), strict=False):
                like = self.state[item.param][key]
                placements = like.placements if isinstance(like, DTensor) else ()
                means[item.param][key] = as_state(mean, item.param, like.shape, placements)
            work.grad = work.squares = None
        return means

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the state of every trainable parameter, stepped or not. Collective the first time."""
        self.init_state()
        return super().state_dict()

    @torch._disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, on this mesh; dtypes stay this optimizer's.

        Raises ValueError, and leaves everything as it was, if the groups or the state do not fit.
        """
        self.init_state()
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved, groups = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in groups]:
            raise ValueError(
                f"the loaded state has groups of {[len(group['params']) for group in saved]} parameters, "
                f"this optimizer of {[len(group['params']) for group in groups]}"
            )
        keys = chain.from_iterable(group["params"] for group in saved)
        params = chain.from_iterable(group["params"] for group in groups)
        key_of = {param: key for key, param in zip(keys, params, strict=True)}
        named = {param: (name, key_of[param]) for name, param, _ in self._named()}
        loaded = adopt_all(named, self.state, state_dict["state"])
        for group, new in zip(groups, saved, strict=True):
            keep = {"params": group["params"]}
            group.update({**deepcopy({k: v for k, v in new.items() if k not in ("params", "param_names")}), **keep})
        self.state.update(loaded)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: everything but the plan, which holds process groups and is made anew."""
        own = {
            name: self.__dict__[name]
            for name in ("partition", "momentum_dtype", "stochastic_rounding", "seed", "_flags", "_names", "_blocks")
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plan()
