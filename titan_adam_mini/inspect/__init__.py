"""Where one second moment per block loses information, measured on AdamW's elementwise second moments.

Let v be AdamW's second moments of a parameter and v^ an estimate of them from fewer numbers: the mean of v over every
block, or, factored (arXiv 1804.04235), a row's mean times a column's mean over the mean of all. Then

    noise = mean of (v / v^ - 1)^2 over the parameter's elements with v > 0          snr = 1 / noise

Elements with v = 0, such as tokens that were never seen, have had no gradient and get no update, whatever v^ is.

In one block this is SlimAdam's signal-to-noise ratio (arXiv 2503.01843), mean(v)^2 / variance(v), exactly so if no v is
0. Over several blocks the noise is averaged, weighted by elements: `snr` is the weighted harmonic mean of the blocks.
The paper takes the plain mean of the blocks' ratios without infinite ones; that is `block_snr` here (for a factored
estimate, over the matrices that it factors). It can be far higher, since a few even blocks hide all others, and it
cannot compare estimates with different blocks: decisions are therefore based on `snr`. Noise up to `EXACT`, float32's
own rounding, counts as none.

The result shows for each parameter which estimate would lose less, and for the whole model what each `second_moment`
loses. `inspect` takes the result of `moments_of(model, optimizer)`, for any model with a `Partition`; the command
`titan-adam-mini inspect` reads torchtitan's checkpoints.
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
