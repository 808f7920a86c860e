"""Pure functions, one paper equation each: tensors in, per-example tensors out; no reduction, no configuration."""
