"""Where one second moment per block loses information, told from AdamW's elementwise ones.

Let v be AdamW's second moments of a parameter and v^ what an estimate makes of them from fewer numbers: the mean of
v over every block, or, factored (arXiv 1804.04235), a row's mean times a column's mean over the mean of all. Then

    noise = mean of (v / v^ - 1)^2 over the parameter's elements with v > 0          snr = 1 / noise

Elements with v = 0, such as tokens that were never seen, have had no gradient and get no update, whatever v^ is.

In one block this is SlimAdam's signal-to-noise ratio (arXiv 2503.01843), mean(v)^2 / variance(v), to the letter where
no v is 0. Over several blocks it is the noises that are averaged, weighted by elements: `snr` is the blocks' weighted
harmonic mean. The paper takes the plain mean of the blocks' ratios, infinite ones left out; that is `block_snr` here,
for a factored estimate over the matrices that it factors. It can be far higher, since a few even blocks hide all
others, and estimates with unlike blocks cannot be compared by it: so decisions are made by `snr`. Noise up to `EXACT`,
float32's own rounding, counts as none.

Every parameter is asked by itself which estimate would lose less, and the model as a whole what each `second_moment`
loses. `inspect` takes what `moments_of` makes of a model and its optimizer, for any model that a `Partition` knows; the
command `titan-adam-mini inspect` reads torchtitan's checkpoints.
"""

from typing import TYPE_CHECKING

from ..lazy import lazy_attributes

__all__ = ["EXACT", "Inspection", "Loss", "Moments", "Pattern", "Setting", "inspect", "moments_of"]

# torch takes seconds to import: the command line answers without it.
if TYPE_CHECKING:
    from .findings import Inspection, Pattern, Setting, inspect
    from .measure import EXACT, Loss
    from .moments import Moments, moments_of
else:
    __getattr__, __dir__ = lazy_attributes(
        __name__,
        {
            **dict.fromkeys(("Inspection", "Pattern", "Setting", "inspect"), "findings"),
            **dict.fromkeys(("EXACT", "Loss"), "measure"),
            **dict.fromkeys(("Moments", "moments_of"), "moments"),
        },
    )
