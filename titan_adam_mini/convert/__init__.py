"""The command `convert`: checkpoints of AdamW to AdamMini, and back."""
