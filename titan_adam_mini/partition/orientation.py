"""Which way round a matrix is stored, told from the shapes of the model it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from titan_adam_mini.partition.rules import fits


@dataclass(frozen=True)
class Orientation:
    """Looks at all shapes of a model (cleaned name -> shape) to tell `[out, in]` from `[in, out]`."""

    shapes: Mapping[str, tuple[int, ...]]

    def transposed(self, evidence: str, name: str) -> bool:
        """Does the parameter have its outputs along the last dim?

        `evidence` is a rule's `orientation`. Raises ValueError if the shapes do not tell.
        """
        if evidence == "c_attn":
            return self._one_answer(self._c_attn)
        if evidence == "experts":
            return self._experts(name.rpartition(".")[0])
        assert not evidence, evidence
        return False

    @cached_property
    def _c_attn(self) -> frozenset[bool]:
        """GPT-2: `c_attn` makes more outputs than it has inputs, so its longer dim is the output.

        Asked of the whole model, because `attn.c_proj` is square. Models with a query of its own use `Linear`.
        """
        votes = set()
        for name, shape in self.shapes.items():
            if any(fits(query, name) for query in ("attn.c_q.weight", "self_attn.q_proj.weight")):
                votes.add(False)
            elif fits("attn.c_attn.weight", name) and len(shape) == 2 and shape[0] != shape[1]:
                votes.add(shape[1] > shape[0])
        return frozenset(votes)

    @staticmethod
    def _one_answer(votes: frozenset[bool]) -> bool:
        if len(votes) != 1:
            raise ValueError(
                "it may be stored [out, in] or [in, out], and "
                + ("the c_attn of this model disagree" if votes else "there is no c_attn to tell which")
                + ": give it a role of your own, with .T after it if it is [in, out]"
            )
        return next(iter(votes))

    def _experts(self, module: str) -> bool:
        """Fused experts: `gate_up_proj` makes 2 I outputs of H inputs, `down_proj` H of I; the pair tells which."""
        up = self.shapes.get(f"{module}.gate_up_proj", ())
        down = self.shapes.get(f"{module}.down_proj", ())
        if len(up) == len(down) == 3:
            if up[1] == 2 * down[2] and up[2] == down[1]:
                return False
            if up[2] == 2 * down[1] and up[1] == down[2]:
                return True
        raise ValueError(
            "it may be stored [expert, out, in] or [expert, in, out], and gate_up_proj and down_proj of the module do "
            "not tell which: give it the role 'experts' or 'experts.T'"
        )
