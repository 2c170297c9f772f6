"""The stages of the check, one module each, with `run(context) -> Result`."""
