"""A checkpoint of AdamW becomes one of AdamMini, and back: the command `convert`."""
