"""Whether a matrix is stored `[out, in]` or `[in, out]`, inferred from the shapes of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from titan_adam_mini.partition.rules import EITHER_ORIENTATION, Rule, matches

PASS_ALL = "pass all named parameters of the model to the optimizer, frozen ones too (they are not updated)"


@dataclass(frozen=True)
class Orientation:
    """Distinguishes `[out, in]` from `[in, out]` by all shapes of a model (cleaned name -> shape)."""

    shapes: Mapping[str, tuple[int, ...]]

    def transposed(self, rule: Rule, name: str) -> bool:
        """Whether the parameter `name`, to which `rule` applies, has its outputs along the last dim.

        The parameter's own bias, whose length is the number of outputs, decides if it can; else the other matrices of
        the model do. Raises ValueError if the shapes are not sufficient.
        """
        if not rule.orientation:
            return False
        if (own := self._by_bias(name)) is not None:
            return own
        return self._gpt2(rule.role) if rule.orientation == "c_attn" else self._experts(name.rpartition(".")[0])

    def _by_bias(self, name: str) -> bool | None:
        """Whether the bias has the length of the last dim (True) or the one before (False); None if neither or both."""
        stem, _, last = name.rpartition(".")
        bias = self.shapes.get(f"{stem}.bias" if last == "weight" else f"{name}_bias", ())
        sizes = self.shapes[name][-2:]
        if not bias or len(sizes) < 2 or sizes[0] == sizes[1] or bias[-1] not in sizes:
            return None
        return bias[-1] == sizes[1]

    @cached_property
    def _votes(self) -> frozenset[bool]:
        """Evidence from GPT-2's matrices; all of a model have the same orientation.

        `c_attn` has more outputs than inputs, so its longer dim is the output. Any of them may have a bias that
        decides. Models with separate queries use `Linear`.
        """
        votes = set()
        for name, shape in self.shapes.items():
            if any(matches(query, name) for query in ("attn.c_q.weight", "self_attn.q_proj.weight")):
                votes.add(False)
            elif any(evidence == "c_attn" and matches(pattern, name) for pattern, _, evidence in EITHER_ORIENTATION):
                if (own := self._by_bias(name)) is not None:
                    votes.add(own)
                elif matches("attn.c_attn.weight", name) and len(shape) == 2 and shape[0] != shape[1]:
                    votes.add(shape[1] > shape[0])
        return frozenset(votes)

    def _gpt2(self, role: str) -> bool:
        if len(self._votes) == 1:
            return next(iter(self._votes))
        reason = (
            "attn.c_attn.weight and the biases of this model contradict each other: "
            if self._votes
            else "only the shape of attn.c_attn.weight, or a bias, shows which, and neither was given: "
            + PASS_ALL
            + ", or "
        )
        raise ValueError(
            f"it may be stored [out, in] or [in, out], and {reason}give it the role {role!r}, or '{role}.T' if it is "
            "[in, out]"
        )

    def _experts(self, module: str) -> bool:
        """Fused experts: `gate_up_proj` has 2 I outputs and H inputs, `down_proj` H and I; the pair decides."""
        up = self.shapes.get(f"{module}.gate_up_proj", ())
        down = self.shapes.get(f"{module}.down_proj", ())
        if len(up) == len(down) == 3:
            if up[1] == 2 * down[2] and up[2] == down[1]:
                return False
            if up[2] == 2 * down[1] and up[1] == down[2]:
                return True
        missing = [name for name, shape in (("gate_up_proj", up), ("down_proj", down)) if not shape]
        raise ValueError(
            "it may be stored [expert, out, in] or [expert, in, out], and "
            + (
                f"{module}.{missing[0]}, whose shape shows which, was not given: {PASS_ALL}, or "
                if missing
                else "the shapes of gate_up_proj and down_proj do not show which: "
            )
            + "give it the role 'experts' or 'experts.T'"
        )
